"""The encoded images of some rows of Parquet files.

An image is a binary, or a struct{bytes, path} as Hugging Face datasets write it, where bytes may be null if `path` leads,
from the Parquet file's folder, to a file.
"""

import itertools
import os
import posixpath
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmat_ray.data.file_digest import changed, file_digest
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, require_not_of_storage

# rows and bytes in memory, beside a page of the file's, while a row group is searched: it may be larger than memory
BATCH, BUFFER = 64, 8 << 20


class ColumnError(UserError):
    """A column is not there, or holds no images."""


def is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary))


def require_column(schema: pa.Schema, column: str, key: str, name: str) -> None:
    if schema.names.count(column) != 1:
        raise ColumnError(f"'{name}' has no column '{column}' ({key}); it has {', '.join(map(repr, schema.names)) or 'none'}")


def image_columns(schema: pa.Schema, column: str, name: str) -> list[str]:
    """The leaves of the image column that are read. Raises UserError if it holds no encoded images."""
    require_column(schema, column, "data.image_column", name)
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and "bytes" in kind.names and _is_binary(kind.field("bytes").type):
        with_path = "path" in kind.names and is_text(kind.field("path").type)
        return [f"{column}.{part}" for part in (("bytes", "path") if with_path else ("bytes",))]
    if _is_binary(kind):
        return [column]
    raise ColumnError(
        f"data.image_column '{column}' of '{name}' is of type {kind}; it must be binary or struct<bytes: binary, path: string>"
    )


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(check(kind) for check in (types.is_binary, types.is_large_binary, types.is_binary_view))


class Reader:
    """An open file, and how far its image column is read: rows from there on are read without what lies before them.

    A row group is read from its beginning or not at all, so that a new reader a call would take quadratic time.
    """

    def __init__(self, version: tuple[Any, ...], digest: int, place: Location, column: str) -> None:
        self.version, self.digest, self.place, self.content = version, digest, place, place.open()
        if file_digest(place, self.content) != digest:
            raise changed(place)
        # not `pre_buffer`, which fetches all of a row group at once
        self.file = pq.ParquetFile(self.content, buffer_size=BUFFER, page_checksum_verification=True, pre_buffer=False)
        self.columns = image_columns(self.file.schema_arrow, column, place.name)
        groups = [self.file.metadata.row_group(k).num_rows for k in range(self.file.num_row_groups)]
        self.ends = np.cumsum([0, *groups], dtype=np.int64)
        self.group = -1
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.row, self.values = 0, pa.nulls(0)  # the values of the batch that was read last, and the row of the first of them

    def __del__(self) -> None:
        if hasattr(self, "content"):
            self.content.close()

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(row, value of the image column, or the text of the reason why it cannot be read) of these rows, which ascend."""
        for k, (start, end) in enumerate(itertools.pairwise(self.ends)):
            inside = wanted[(wanted >= start) & (wanted < end)]
            if len(inside):
                yield from self._read_group(k, inside)
        count = self.ends[-1]
        yield from ((int(row), f"cannot be read: the file has {count} rows now") for row in wanted[wanted >= count])

    def _read_group(self, group: int, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        end = int(self.ends[group])
        try:
            if group != self.group or wanted[0] < self.row:
                self.batches = self.file.iter_batches(BATCH, row_groups=[group], columns=self.columns, use_threads=False)
                self.group, self.row, self.values = group, end, pa.nulls(0)
            while True:
                end = self.row + len(self.values)
                for row in wanted[(wanted >= self.row) & (wanted < end)]:
                    yield int(row), _value(self.values[int(row) - self.row])  # views cannot be taken
                if wanted[-1] < end:
                    return
                self.values, self.row = next(self.batches).column(0), end
        except (pa.ArrowException, OSError) as error:
            self.group = -1
            yield from ((int(row), reason(error, self.place)) for row in wanted[wanted >= end])


def group_starts(place: Location) -> np.ndarray:
    """The rows of a file at which its row groups begin, int64 (groups). Raises like `Location.open` and pyarrow."""
    with place.open() as content:
        metadata = pq.ParquetFile(content).metadata
    groups = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    return np.cumsum([0, *groups], dtype=np.int64)[:-1]


_OF_THREAD = threading.local()


def readers() -> dict[Location, Reader]:
    """What the last call in this thread has left open, by file; it ends with the thread."""
    found: dict[Location, Reader] = _OF_THREAD.__dict__.setdefault("readers", {})
    return found


def _version(place: Location, column: str) -> tuple[Any, ...]:
    """What a reader may be gone on with for. A process that was forked shares the place in an open file with its parent."""
    if place.scheme:
        return os.getpid(), column, place.version()
    stat = os.stat(place.key)
    return os.getpid(), column, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_rows(
    place: Location, digest: int, rows: Sequence[int], column: str, below: Location, max_bytes: int, kept: dict[Location, Reader]
) -> list[bytes | str]:
    """The encoded images in these rows of a file, or the text of the reason why one cannot be read.

    Only the column and the row groups that are needed are read, from where the reader of this file in `kept` is, if there is one;
    it is left there for rows further on. A `path` is followed only if it stays `below` this folder, and to a file of at most
    `max_bytes`. Raises StorageError for a storage that does not answer, and UserError for a file that had another `digest` when
    it was listed, or changes while it is read.
    """
    wanted = np.unique(np.asarray(rows, np.int64))
    found: dict[int, bytes | str] = {}
    reader = kept.pop(place, None)
    try:
        version = _version(place, column)
        if reader is None or (reader.version, reader.digest) != (version, digest):
            reader = Reader(version, digest, place, column)
        found.update(reader.read(wanted))
        if _version(place, column) != version:  # then what is open may be another file, and is not kept
            _require_same(place, digest)
        elif wanted[-1] + 1 < reader.ends[-1]:
            kept[place] = reader
    except (pa.ArrowException, OSError, ColumnError) as error:
        found.update((int(row), reason(error, place)) for row in wanted)
    return [_content(found[row], place, below, max_bytes) for row in rows]


def _require_same(place: Location, digest: int) -> None:
    """Raise UserError for a file that is not as it was listed, unlike one that was only touched or copied."""
    with place.open() as content:
        if file_digest(place, content) != digest:
            raise changed(place)


def _value(scalar: pa.Scalar) -> Any:
    """What a row of the image column holds; the text of the reason if that is a path that is no text."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        content = scalar["bytes"].as_py()
        return "has no bytes, and a path that is not UTF-8" if content is None else content


def _content(value: Any, place: Location, below: Location, max_bytes: int) -> bytes | str:
    """What the value of an image column holds or leads to."""
    if isinstance(value, bytes | str):
        return value
    if value is None or (value["bytes"] is None and value.get("path") is None):
        return "is null"
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    path = os.fsdecode(value["path"])
    key = posixpath.normpath(posixpath.join(place.parent.key, path))
    if "://" in path or "\0" in path or not key.startswith(f"{below.key}/"):
        return f"has no bytes, and its path {path!r} does not lead to a file below '{below}'"
    return read_file(Location(place.scheme, key), max_bytes)


def read_file(place: Location, max_bytes: int) -> bytes | str:
    """A file's content, or the text of the reason why it cannot be read, such as more than `max_bytes` of it.

    Raises StorageError for a storage that does not answer.
    """
    try:
        with place.open() as file:
            if (size := file.size()) > max_bytes:
                return f"has {size} bytes, more than any image of data.max_pixels"
            return bytes(file.read())
    except OSError as error:
        return reason(error, place)


def reason(error: Exception, place: Location) -> str:
    """Why an image cannot be read. Raises StorageError if that says nothing of the image, but of the storage."""
    require_not_of_storage(error, place)
    return f"cannot be read: {one_line(error)}"


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.splitlines()[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
