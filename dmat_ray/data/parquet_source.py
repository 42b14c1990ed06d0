"""Natural images in Parquet files: which rows there are with which labels, and their encoded bytes.

An image is a binary, or a struct{bytes, path} as Hugging Face datasets write it, where bytes may be null if `path` leads,
from the Parquet file's folder, to a file. Labels are integers or names.
"""

import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.config import DataConfig
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, require_not_of_storage

SUFFIX = ".parquet"
READERS = 16  # files read at a time: an object store answers slowly, and many at once
BATCH, BUFFER = 64, 8 << 20  # rows and bytes in memory while a row group is searched: a row group may be larger than memory


class _ColumnError(UserError):
    """A column is not there, or holds no images."""


@dataclass(frozen=True)
class _File:
    """What a Parquet file says of its rows."""

    name: str
    labels: pa.ChunkedArray
    ids: pa.ChunkedArray | None
    class_names: list[str] | None

    def where(self, row: int) -> str:
        """Names a row; also its id, if no column does."""
        return f"{self.name}#{row:06d}"


@dataclass(frozen=True)
class Rows:
    """All rows of some files in order: ids, labels 0 .. n-1 of the classes that occur, and the number of rows of each file.

    `also` are the numbers that the files have for classes whose names are known.
    """

    ids: pa.ChunkedArray
    labels: np.ndarray
    class_names: tuple[str, ...]
    counts: list[int]
    also: tuple[str, ...] | None = None


def list_rows(root: Location, names: Sequence[str], config: DataConfig, labelled: bool) -> Rows:
    """Ids and labels of the Parquet files `names` below `root` ('': itself); of the images nothing is read.

    Raises UserError for files that are no Parquet, lack a column, or have labels or ids that cannot be used.
    """
    with ThreadPoolExecutor(READERS) as pool:
        files = list(pool.map(lambda name: _read_file(root, name, config, labelled), names))
    for file in files:
        _require_no_nulls(file, file.labels, "data.label_column", config.label_column)
        if file.ids is not None:
            _require_no_nulls(file, file.ids, "data.id_column", str(config.id_column))
    labels, class_names, also = _classes(files, config.label_column, bool(config.classes))
    ids = [
        chunk
        for file in files
        for chunk in (
            pa.chunked_array([[file.where(row) for row in range(len(file.labels))]], pa.string())
            if file.ids is None
            else file.ids
        ).chunks
    ]
    return Rows(pa.chunked_array(ids, pa.string()), labels, class_names, [len(file.labels) for file in files], also)


def is_labelled(root: Location, name: str, config: DataConfig) -> bool:
    """False for a file whose labels are kept secret, which are all negative then. Raises UserError like `list_rows`."""
    labels = _read_file(root, name, config, True).labels
    return not pa.types.is_integer(labels.type) or bool(len(labels) and pc.max(labels).as_py() >= 0)


def _read_file(root: Location, name: str, config: DataConfig, labelled: bool) -> _File:
    place = root / name
    name = os.fsencode(name or root.name).decode("utf-8", "backslashreplace")
    try:
        with place.open() as content:
            file = pq.ParquetFile(content, page_checksum_verification=True)
            schema = file.schema_arrow
            _image_columns(schema, config.image_column, name)
            if not labelled and config.label_column not in schema.names:
                labels = pa.chunked_array([np.zeros(file.metadata.num_rows, np.int64)])
            else:
                labels = _column(file, config.label_column, "data.label_column", name)
            ids = None
            if config.id_column is not None:
                ids = _column(file, config.id_column, "data.id_column", name).cast(pa.string())
            return _File(name, labels, ids, _class_names(schema, config.label_column))
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"'{place}' cannot be read: {_one_line(error)}") from None
    except (pa.ArrowException, OSError) as error:
        require_not_of_storage(error, place)
        raise UserError(f"'{place}' is damaged or no Parquet file: {_one_line(error)}") from None


def _column(file: pq.ParquetFile, column: str, key: str, name: str) -> pa.ChunkedArray:
    """A column of labels or ids, as int64 or string."""
    _require_column(file.schema_arrow, column, key, name)
    found = file.read(columns=[column])[column]
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    if not pa.types.is_integer(kind) and not _is_text(kind):
        raise UserError(f"{key} '{column}' of '{name}' is of type {found.type}; it must be integers or text")
    try:
        found = found.cast(kind).cast(pa.int64() if pa.types.is_integer(kind) else pa.string())
        found.validate(full=True)  # text of a foreign file need not be UTF-8
    except pa.ArrowInvalid as error:
        raise UserError(f"{key} '{column}' of '{name}' cannot be used: {_one_line(error)}") from None
    return found


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary))


def _require_column(schema: pa.Schema, column: str, key: str, name: str) -> None:
    if schema.names.count(column) != 1:
        raise _ColumnError(f"'{name}' has no column '{column}' ({key}); it has {', '.join(map(repr, schema.names)) or 'none'}")


def _image_columns(schema: pa.Schema, column: str, name: str) -> list[str]:
    """The leaves of the image column that are read. Raises UserError if it holds no encoded images."""
    _require_column(schema, column, "data.image_column", name)
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and "bytes" in kind.names and _is_binary(kind.field("bytes").type):
        with_path = "path" in kind.names and _is_text(kind.field("path").type)
        return [f"{column}.{part}" for part in (("bytes", "path") if with_path else ("bytes",))]
    if _is_binary(kind):
        return [column]
    raise _ColumnError(
        f"data.image_column '{column}' of '{name}' is of type {kind}; it must be binary or struct<bytes: binary, path: string>"
    )


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(check(kind) for check in (types.is_binary, types.is_large_binary, types.is_binary_view))


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names that Hugging Face's metadata give to the numbers of a label column, if they do."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _require_no_nulls(file: _File, column: pa.ChunkedArray, key: str, name: str) -> None:
    if column.null_count:
        first = pc.index(column.is_null(), True).as_py()
        raise UserError(
            f"{column.null_count} of {len(column)} rows of '{file.name}' have null in {key} '{name}', the first is row {first}; "
            "fill or remove them"
        )


def _classes(
    files: Sequence[_File], column: str, unnamed: bool = False
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...] | None]:
    """Labels as 0 .. n-1, their names, and their numbers where names are known; classes without images are left out.

    `unnamed` lets numbers pass for which the metadata have no name, as -1 is for a test set whose labels are kept secret.
    """
    for file in files:
        if file.labels.type != files[0].labels.type:
            raise UserError(
                f"data.label_column '{column}' is of type {files[0].labels.type} in '{files[0].name}' and "
                f"{file.labels.type} in '{file.name}'"
            )
    labels = pa.chunked_array([chunk for file in files for chunk in file.labels.chunks], files[0].labels.type)
    if pa.types.is_string(labels.type):
        names = sorted(labels.unique().to_pylist())
        return pc.index_in(labels, pa.array(names, pa.string())).to_numpy().astype(np.int64), tuple(names), None
    numbers, places = np.unique(labels.to_numpy(), return_inverse=True)
    known = next((file for file in files if file.class_names is not None), None)
    if known is None or known.class_names is None:
        return places, tuple(str(number) for number in numbers), None
    for file in files:
        if file.class_names not in (None, known.class_names):
            raise UserError(f"the metadata of '{file.name}' name other classes for '{column}' than those of '{known.name}'")
    wrong = [int(number) for number in numbers if not 0 <= number < len(known.class_names)]
    if wrong and not unnamed:
        raise UserError(
            f"label {wrong[0]} occurs in column '{column}', but the metadata of '{known.name}' name {len(known.class_names)} "
            f"classes (0 to {len(known.class_names) - 1}); remove the rows without a class"
        )
    named = tuple(str(number) if number in wrong else known.class_names[number] for number in numbers)
    return places, named, tuple(str(number) for number in numbers)


def read_rows(place: Location, rows: Sequence[int], column: str, below: Location, max_bytes: int) -> list[bytes | str]:
    """The encoded images in these rows of a file, or the text of the reason why one cannot be read.

    Only the column and the row groups that are needed are read. A `path` is followed only if it stays `below` this folder, and to
    a file of at most `max_bytes`. Raises UserError for a storage that does not answer.
    """
    wanted = np.unique(np.asarray(rows, np.int64))
    found: dict[int, bytes | str] = {}
    try:
        with place.open() as content:
            file = pq.ParquetFile(content, buffer_size=BUFFER, page_checksum_verification=True)
            columns = _image_columns(file.schema_arrow, column, place.name)
            ends = np.cumsum([0] + [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)], dtype=np.int64)
            for k in range(file.num_row_groups):
                inside = wanted[(wanted >= ends[k]) & (wanted < ends[k + 1])]
                found.update(_read_group(file, k, int(ends[k]), inside, columns, place))
            found.update((int(row), f"cannot be read: the file has {ends[-1]} rows now") for row in wanted[wanted >= ends[-1]])
    except (pa.ArrowException, OSError, _ColumnError) as error:
        found.update((int(row), reason(error, place)) for row in wanted)
    return [_content(found[row], place, below, max_bytes) for row in rows]


def _read_group(
    file: pq.ParquetFile, group: int, start: int, wanted: np.ndarray, columns: list[str], place: Location
) -> Iterator[tuple[int, Any]]:
    """(row, value of the image column) for these rows of a row group that begins at row `start`."""
    if not len(wanted):
        return
    try:
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns, use_threads=False):
            here = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
            yield from ((int(row), _value(batch.column(0)[int(row) - start])) for row in here)  # views cannot be taken
            start += batch.num_rows
            if start > wanted[-1]:
                return
    except (pa.ArrowException, OSError) as error:
        yield from ((int(row), reason(error, place)) for row in wanted[wanted >= start])


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

    Raises UserError for a storage that does not answer.
    """
    try:
        with place.open() as file:
            if (size := file.size()) > max_bytes:
                return f"has {size} bytes, more than any image of data.max_pixels"
            return bytes(file.read())
    except OSError as error:
        return reason(error, place)


def reason(error: Exception, place: Location) -> str:
    """Why an image cannot be read. Raises UserError if that says nothing of the image, but of the storage."""
    require_not_of_storage(error, place)
    return f"cannot be read: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.splitlines()[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
