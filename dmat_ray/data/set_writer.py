"""How an on-manifold set comes to be: settings first, shards in any order, the manifest last.

The images of a source, in its order, are cut into shards; shard k is always the same images and the same file name. A shard
is one file that appears whole or not at all and also says which of its images could not be read and why. So whatever is
killed, what is there is finished work, and the next run does the rest. Images that have been repaired since come as
supplements (`part-000012-1.parquet`): what is finished is not projected again for their sake. What a shard still lacks is told
by its files alone, whichever of them are there; one that was lost is made again with the images that no other of them has.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.data import set_format, set_reader, set_settings
from dmat_ray.data.set_format import GIVEN_UP_IDS, MANIFEST, REJECTED, SHARDS
from dmat_ray.data.sources import Listing
from dmat_ray.errors import UserError
from dmat_ray.storage import READERS, Location, require_not_of_storage

# a raw image gains by compression, a PNG and the digits of a float do not
COMPRESSION = {"image.bytes": "none", "w.list.element": "none"}
GROUP_BYTES = 1 << 29


@dataclass(frozen=True)
class Shard:
    """Images that become one file: `rows` of `Listing.table`."""

    name: str
    rows: pa.Table

    @property
    def is_supplement(self) -> bool:
        """True for images that could not be read when their shard was written."""
        return _supplement(self.name) > 0


@dataclass(frozen=True)
class Record:
    """What a file says of itself: how many rows it has, {id: reason} of what could not be read, the ids of the rows, of how
    many the search broke off, and the rows' `set_format.pixel_keys`, if it tells them.
    """

    rows: int
    rejected: dict[str, str]
    ids: tuple[str, ...] = ()
    given_up: int = 0
    pixel_keys: np.ndarray | None = dataclasses.field(default=None, compare=False)


def plan(listing: Listing, shard_size: int) -> list[Shard]:
    """All images as shards of `shard_size`."""
    table = listing.table
    starts = range(0, table.num_rows, shard_size)
    return [Shard(f"part-{k:06d}.parquet", table.slice(start, shard_size)) for k, start in enumerate(starts)]


def write_shard(folder: Location, name: str, table: pa.Table, rejected: dict[str, str]) -> bool:
    """Write one shard, whole or not at all. A supplement that holds no image is not written; returns whether there is a file."""
    if table.num_rows == 0 and _supplement(name):
        return False
    metadata = {**(table.schema.metadata or {}), REJECTED: json.dumps(rejected)}
    buffer = io.BytesIO()
    codecs = {column: COMPRESSION.get(column, "zstd") for column in _leaves(table.schema)}
    schema = table.schema.with_metadata(metadata)
    with pq.ParquetWriter(buffer, schema, compression=codecs, write_page_checksum=True) as writer:
        # no row group of no rows, which Hugging Face datasets cannot read, and none of more bytes than pyarrow can
        for part in _groups(table):
            writer.write_table(part.cast(schema))
    (folder / SHARDS / name).write_bytes(buffer.getbuffer())
    return True


def _groups(table: pa.Table) -> Iterator[pa.Table]:
    """The table in parts of about GROUP_BYTES, by the size of each natural image: all large ones may lie together."""
    sizes = pc.binary_length(pc.struct_field(table["image"], "bytes")).fill_null(0).to_numpy().astype(np.int64)
    others = max(0, table.nbytes - int(sizes.sum())) // max(1, table.num_rows)
    number = np.cumsum(sizes + others) // GROUP_BYTES
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    for start, end in itertools.pairwise([*starts.tolist(), table.num_rows]):
        yield table.slice(start, end - start)


def _leaves(schema: pa.Schema) -> list[str]:
    leaves: list[str] = []
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves += [f"{field.name}.{part.name}" for part in field.type]
        else:
            leaves.append(f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name)
    return leaves


def read_record(folder: Location, name: str, *, ids: bool = True) -> Record | None:
    """The record of a file, with `ids` or without; None if it is missing or damaged, which is to say not finished.

    Raises StorageError for a storage that does not answer: what is there must not be made again for that.
    """
    place = folder / SHARDS / name
    try:
        with place.open() as file, pq.ParquetFile(file) as parquet:
            said = parquet.metadata.metadata or {}
            rejected, given_up = json.loads(said[REJECTED]), json.loads(said.get(GIVEN_UP_IDS, b"[]"))
            held = parquet.read(columns=["id"])["id"].to_pylist() if ids else ()
            rows = parquet.metadata.num_rows
            return Record(rows, rejected, tuple(held), len(given_up), set_format.pixel_keys(said, rows) if ids else None)
    except (pa.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        require_not_of_storage(error, place)
        return None


def read_records(folder: Location, *, ids: bool = True) -> dict[str, Record]:
    """The records of all finished files, by name, with `ids` or without. Files of other names are left alone."""
    names = set_format.shard_names(folder)
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda name: read_record(folder, name, ids=ids), names)
    return {name: record for name, record in zip(names, records, strict=True) if record is not None}


def unfinished(shards: Sequence[Shard], records: dict[str, Record]) -> list[Shard]:
    """What is still to be done: shards that are not there, and supplements for images that none of a shard's files has."""
    files = _files(records)
    todo = []
    for shard in shards:
        mine = files.get(shard.name, {})
        held = {id for record in mine.values() for id in record.ids}
        rest = shard.rows.filter(pc.invert(pc.is_in(shard.rows["id"], value_set=pa.array(list(held), pa.string()))))
        if 0 not in mine:
            todo.append(Shard(shard.name, rest))
        elif rest.num_rows:
            number = next(k for k in range(1, len(mine) + 1) if k not in mine)
            todo.append(Shard(f"{shard.name.removesuffix('.parquet')}-{number}.parquet", rest))
    return todo


def _files(records: dict[str, Record]) -> dict[str, dict[int, Record]]:
    """Shard -> number -> record of its files, the latest last: itself, 0, and its supplements."""
    found: dict[str, dict[int, Record]] = {}
    for name in sorted(records, key=_supplement):
        number = _supplement(name)
        found.setdefault(f"{name.rsplit('-', 1)[0]}.parquet" if number else name, {})[number] = records[name]
    return found


def _supplement(name: str) -> int:
    match = set_format.NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2] or 0)


def rejected_of(shards: Sequence[Shard], records: dict[str, Record]) -> dict[str, str]:
    """{id: reason} of all images that could not be read."""
    rejected: dict[str, str] = {}
    files = _files(records)
    for shard in shards:
        mine = files.get(shard.name, {}).values()
        held = {id for record in mine for id in record.ids}
        rejected |= {id: reason for record in mine for id, reason in record.rejected.items() if id not in held}
    return rejected


def finish(
    folder: Location,
    settings: dict[str, Any],
    shards: Sequence[Shard],
    records: dict[str, Record],
    described: dict[str, Any],
) -> dict[str, Any]:
    """Write the manifest and return it; `records` are those of now, and `described` is what else it says.

    Files of our names that have no record are removed. Raises RuntimeError if an image is missing, is there twice, or has no
    place in the set.
    """
    for shard in shards:
        if shard.name not in records:
            raise RuntimeError(f"'{folder / SHARDS / shard.name}' is missing or damaged although it was written; run again")
    for name in set(set_format.shard_names(folder)) - records.keys():
        (folder / SHARDS / name).unlink()
    rejected = rejected_of(shards, records)
    columns = ["id", "split", "label", "status", *set_format.ERRORS]
    table = set_reader.read_columns(folder, sorted(records), columns)
    _require_exactly_once(table["id"], rejected, shards)
    usable = table.filter(pc.equal(table["status"], "ok"))
    manifest = {
        "version": set_format.VERSION,
        **settings,
        "shards": {name: record.rows for name, record in sorted(records.items())},
        "count": table.num_rows,
        "splits": _counts(table, "split"),
        "status": _counts(table, "status"),
        "usable": _counts(usable, "split"),
        "means": {name: round(_mean(table[name].to_numpy()), 6) for name in set_format.ERRORS},
        "rejected": dict(sorted(rejected.items())),
        **described,
    }
    if given_up := sum(record.given_up for record in records.values()):
        manifest[set_format.GIVEN_UP] = given_up
    if copies := _trained_on(table["split"], [records[name].pixel_keys for name in sorted(records)]):
        manifest[set_format.COPIES] = copies
    if lost := _places([shard.rows for shard in shards]) - _places([usable]):
        names, splits = settings["class_names"], sorted({split for split, _ in lost})
        manifest[set_format.LOST] = {split: [names[k] for s, k in sorted(lost) if s == split] for split in splits}
    (folder / MANIFEST).write_json(manifest)
    return manifest


def _trained_on(splits: pa.ChunkedArray, keys: Sequence[np.ndarray | None]) -> int:
    """How many test images are training images, too, by the pixels' keys of all rows; 0 where some files do not tell them."""
    known = [part for part in keys if part is not None]
    if len(known) < len(keys):
        return 0
    every, split = np.concatenate([np.empty(0, "<u8"), *known]), splits.to_numpy()
    return int(np.isin(every[split == "test"], every[split == "train"]).sum())


def first_copies(folder: Location, most: int = 3) -> list[tuple[str, str]]:
    """Ids of the first test images of a finished set that are training images, too, each with that of a training image."""
    records = read_records(folder)
    names = sorted(name for name, record in records.items() if record.pixel_keys is not None)
    if not names:
        return []
    table = set_reader.read_columns(folder, names, ["id", "split"])
    ids, split = table["id"].to_numpy(), table["split"].to_numpy()
    keys = np.concatenate([records[name].pixel_keys for name in names])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    known, first = np.unique(keys[train], return_index=True)
    copies = test[np.isin(keys[test], known)][:most]
    return [(ids[i], ids[train[first[np.searchsorted(known, keys[i])]]]) for i in copies]


def _places(tables: Iterable[pa.Table]) -> set[tuple[str, int]]:
    """The splits and labels that occur together."""
    found = (table.select(["split", "label"]).group_by(["split", "label"]).aggregate([]).to_pylist() for table in tables)
    return {(row["split"], row["label"]) for rows in found for row in rows}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0


def _require_exactly_once(ids: pa.ChunkedArray, rejected: Iterable[str], shards: Sequence[Shard]) -> None:
    wanted = pa.chunked_array([chunk for s in shards for chunk in s.rows["id"].chunks], pa.string())
    found = pa.chunked_array([*ids.chunks, pa.array(list(rejected), pa.string())], pa.string())
    if not found.sort().equals(wanted.sort()):
        missing = pc.sum(pc.invert(pc.is_in(wanted, value_set=found))).as_py()
        raise RuntimeError(
            f"the shards hold {len(found)} images, {missing} of {len(wanted)} are missing: remove the set's folder and run again"
        )


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    return {r["values"]: r["counts"] for r in sorted(table[column].value_counts().to_pylist(), key=lambda r: r["values"])}


def is_finished(folder: Location, settings: dict[str, Any]) -> bool:
    """True if `folder` holds the whole set of exactly these settings. Raises StorageError for a storage that does not answer."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = set_reader.read_manifest(folder)
    except UserError:
        return False
    if not set_settings.are_of(manifest, settings):
        return False
    records = read_records(folder, ids=False)
    return all(name in records and records[name].rows == rows for name, rows in manifest["shards"].items())
