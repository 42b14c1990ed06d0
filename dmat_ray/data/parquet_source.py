"""Natural images in Parquet files: which rows there are, with which labels. Labels are integers or names."""

import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.config import DataConfig
from dmat_ray.data.file_digest import file_digest
from dmat_ray.data.folder_source import text
from dmat_ray.data.parquet_rows import image_columns, is_text, one_line, require_column
from dmat_ray.data.set_format import OURS, SHARDS
from dmat_ray.errors import UserError
from dmat_ray.storage import READERS, Location, require_not_of_storage

SUFFIX = ".parquet"
LARGE_GROUP = 1 << 29  # bytes of images in a row group that a process should not read to come by the last of them


@dataclass(frozen=True)
class _File:
    """What a Parquet file says of its rows."""

    name: str
    labels: pa.ChunkedArray
    ids: pa.ChunkedArray | None
    class_names: list[str] | None
    largest: tuple[int, int]
    """Bytes of images and rows of a row group, the largest."""
    digest: int

    def where(self, row: int) -> str:
        """Names a row; also its id, if no column does."""
        return f"{self.name}#{row:06d}"


@dataclass(frozen=True)
class Rows:
    """All rows of some files in order: ids, labels 0 .. n-1 of the classes that occur; rows and digest of each file.

    `also` are the numbers that the files have for classes whose names are known.
    """

    ids: pa.ChunkedArray
    labels: np.ndarray
    class_names: tuple[str, ...]
    counts: list[int]
    digests: list[int]
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
    largest = max(files, key=lambda file: file.largest)
    if largest.largest[0] > LARGE_GROUP:
        size, count = largest.largest
        warnings.warn(
            f"'{largest.name}' has {count} images in one row group ({size / 2**30:.1f} GiB), and every process that reads some "
            "reads all that lie before them; write it anew with pyarrow.parquet.write_table(table, path, row_group_size=1000)",
            stacklevel=2,
        )
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
    counts, digests = [len(file.labels) for file in files], [file.digest for file in files]
    return Rows(pa.chunked_array(ids, pa.string()), labels, class_names, counts, digests, also)


def sets_below(root: Location, paths: Sequence[str]) -> list[str]:
    """The folders below `root` that are on-manifold sets of ours, not `root` itself, by a shard of each.

    Raises StorageError for a storage that does not answer.
    """
    shards = {path.rsplit("/", 2)[0]: path for path in paths if path.endswith(SUFFIX) and path.split("/")[1:-1][-1:] == [SHARDS]}
    found = []
    for folder, path in shards.items():
        try:
            with (root / path).open() as file:
                if OURS in (pq.read_schema(file).metadata or {}):
                    found.append(folder)
        except (pa.ArrowException, OSError) as error:
            require_not_of_storage(error, root / path)
    return found


def is_labelled(root: Location, name: str, config: DataConfig, labelled: bool) -> bool:
    """False for a file whose labels are kept secret, which are all negative then. Raises UserError like `list_rows`."""
    labels = _read_file(root, name, config, labelled).labels
    return not pa.types.is_integer(labels.type) or bool(len(labels) and pc.max(labels).as_py() >= 0)


def _read_file(root: Location, name: str, config: DataConfig, labelled: bool) -> _File:
    place = root / name
    name = text(name or root.name)
    try:
        with place.open() as content:
            digest = file_digest(place, content)
            file = pq.ParquetFile(content, page_checksum_verification=True)
            schema = file.schema_arrow
            leaves = image_columns(schema, config.image_column, name)
            if not labelled and config.label_column not in schema.names:
                labels = pa.chunked_array([np.zeros(file.metadata.num_rows, np.int64)])
            else:
                labels = _column(file, config.label_column, "data.label_column", name)
            ids = None
            if config.id_column is not None:
                ids = _column(file, config.id_column, "data.id_column", name).cast(pa.string())
            named, largest = _class_names(schema, config.label_column), _largest_group(file.metadata, leaves)
            return _File(name, labels, ids, named, largest, digest)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"'{place}' cannot be read: {one_line(error)}") from None
    except (pa.ArrowException, OSError) as error:
        require_not_of_storage(error, place)
        raise UserError(f"'{place}' is damaged or no Parquet file: {one_line(error)}") from None


def _largest_group(metadata: pq.FileMetaData, leaves: Sequence[str]) -> tuple[int, int]:
    """Bytes of these leaves, uncompressed, and rows of the row group that has the most."""
    places = [k for k in range(metadata.num_columns) if metadata.schema.column(k).path in leaves]
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    sizes = [(sum(group.column(k).total_uncompressed_size for k in places), group.num_rows) for group in groups]
    return max(sizes, default=(0, 0))


def _column(file: pq.ParquetFile, column: str, key: str, name: str) -> pa.ChunkedArray:
    """A column of labels or ids, as int64 or string."""
    require_column(file.schema_arrow, column, key, name)
    found = file.read(columns=[column])[column]
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    if not pa.types.is_integer(kind) and not is_text(kind):
        raise UserError(f"{key} '{column}' of '{name}' is of type {found.type}; it must be integers or text")
    try:
        found = found.cast(kind).cast(pa.int64() if pa.types.is_integer(kind) else pa.string())
        found.validate(full=True)  # text of a foreign file need not be UTF-8
    except pa.ArrowInvalid as error:
        raise UserError(f"{key} '{column}' of '{name}' cannot be used: {one_line(error)}") from None
    return found


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
