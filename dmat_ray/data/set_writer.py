"""How an on-manifold set comes to be: settings first, shards in any order, the manifest last.

The images of a source, in its order, are cut into shards; shard k is always the same images and the same file name. A shard
is one file that appears whole or not at all and also says which of its images could not be read and why. So whatever is
killed, what is there is finished work, and the next run does the rest. Images that have been repaired since come as
supplements (`part-000012-1.parquet`): what is finished is not projected again for their sake.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.data import manifold_set
from dmat_ray.data.manifold_set import MANIFEST, SHARDS
from dmat_ray.data.sources import Listing
from dmat_ray.errors import UserError
from dmat_ray.storage import Location

SETTINGS = "settings.json"
REJECTED = b"dmat_ray_rejected"
NAME = re.compile(r"part-(\d{6,})(?:-(\d+))?\.parquet")
# a raw image gains by compression, a PNG and the digits of a float do not
COMPRESSION = {"image.bytes": "none", "w.list.element": "none"}
GROUP_BYTES = 1 << 29
READERS = 16  # footers read at a time: an object store answers slowly, and many at once


@dataclass(frozen=True)
class Shard:
    """Images that become one file: `rows` of `Listing.table`."""

    name: str
    rows: pa.Table


@dataclass(frozen=True)
class Record:
    """What a finished shard says of itself: how many rows it has, and {id: reason} of the images that it lacks."""

    rows: int
    rejected: dict[str, str]


def plan(listing: Listing, shard_size: int) -> list[Shard]:
    """All images as shards of `shard_size`."""
    table = listing.table
    starts = range(0, table.num_rows, shard_size)
    return [Shard(f"part-{k:06d}.parquet", table.slice(start, shard_size)) for k, start in enumerate(starts)]


def begin(folder: Location, settings: dict[str, Any]) -> None:
    """Write the settings into the folder, or check that what is there was begun with the same.

    Raises UserError that names the setting that differs.
    """
    path = folder / SETTINGS
    try:
        old = path.read_json()
    except FileNotFoundError:
        path.write_json(settings)
        return
    for section in sorted(settings.keys() | old.keys()):
        before, now = old.get(section), settings.get(section)
        if before == now:
            continue
        if isinstance(now, dict) and isinstance(before, dict):
            key = next(k for k in sorted(now.keys() | before.keys()) if before.get(k) != now.get(k))
            section, before, now = f"{section}.{key}", before.get(key), now.get(key)
        raise UserError(
            f"the on-manifold set '{folder}' was begun with {section} = {before}, now it is {now}; give the old value, "
            "another --output, or remove the folder"
        )


def write_shard(folder: Location, name: str, table: pa.Table, rejected: dict[str, str]) -> None:
    """Write one shard, whole or not at all. A supplement that holds no image is not written."""
    if table.num_rows == 0 and _supplement(name):
        return
    metadata = {**(table.schema.metadata or {}), REJECTED: json.dumps(rejected)}
    buffer = io.BytesIO()
    codecs = {column: COMPRESSION.get(column, "zstd") for column in _leaves(table.schema)}
    schema = table.schema.with_metadata(metadata)
    with pq.ParquetWriter(buffer, schema, compression=codecs, write_page_checksum=True) as writer:
        # no row group of no rows, which Hugging Face datasets cannot read, and none of more bytes than pyarrow can
        for part in _groups(table):
            writer.write_table(part.cast(schema))
    (folder / SHARDS / name).write_bytes(buffer.getbuffer())


def _groups(table: pa.Table) -> Iterator[pa.Table]:
    rows = max(1, int(table.num_rows * GROUP_BYTES / max(table.nbytes, 1)))
    yield from (table.slice(start, rows) for start in range(0, table.num_rows, rows))


def _leaves(schema: pa.Schema) -> list[str]:
    leaves: list[str] = []
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves += [f"{field.name}.{part.name}" for part in field.type]
        else:
            leaves.append(f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name)
    return leaves


def read_record(folder: Location, name: str) -> Record | None:
    """The record of a shard; None if it is missing or damaged, which is to say not finished."""
    try:
        with (folder / SHARDS / name).open() as file:
            metadata = pq.read_metadata(file)
        return Record(metadata.num_rows, json.loads((metadata.metadata or {})[REJECTED]))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None


def read_records(folder: Location) -> dict[str, Record]:
    """The records of all finished shards, by name. Files of other names are left alone."""
    names = [found.name for found in (folder / SHARDS).files() if NAME.fullmatch(found.name)]
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda name: read_record(folder, name), names)
    return {name: record for name, record in zip(names, records, strict=True) if record is not None}


def unfinished(shards: Sequence[Shard], records: dict[str, Record]) -> list[Shard]:
    """What is still to be done: shards that are not there, and supplements for images that could not be read."""
    todo = []
    for shard in shards:
        latest = latest_name(shard.name, records)
        if latest is None:
            todo.append(shard)
        elif records[latest].rejected:
            again = pc.is_in(shard.rows["id"], value_set=pa.array(list(records[latest].rejected), pa.string()))
            todo.append(Shard(_numbered(shard.name, _supplement(latest) + 1), shard.rows.filter(again)))
    return todo


def latest_name(shard: str, records: dict[str, Record]) -> str | None:
    """The last of a shard and its supplements that is there; the rejected of that one are the shard's."""
    found = None
    count = 0
    while (name := _numbered(shard, count)) in records:
        found, count = name, count + 1
    return found


def _numbered(shard: str, count: int) -> str:
    return f"{shard.removesuffix('.parquet')}-{count}.parquet" if count else shard


def _supplement(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None, name
    return int(match[2] or 0)


def rejected_of(shards: Sequence[Shard], records: dict[str, Record]) -> dict[str, str]:
    """{id: reason} of all images that could not be read."""
    latest = [latest_name(shard.name, records) for shard in shards]
    return {id: reason for name in latest if name is not None for id, reason in records[name].rejected.items()}


def finish(folder: Location, settings: dict[str, Any], shards: Sequence[Shard], described: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest and return it; `described` is what else it says.

    Raises RuntimeError if an image is missing, is there twice, or has no place in the set.
    """
    records = read_records(folder)
    ours: list[str] = []
    for shard in shards:
        last = latest_name(shard.name, records)
        if last is None:
            raise RuntimeError(f"'{folder / SHARDS / shard.name}' is missing or damaged although it was written; run again")
        ours += [_numbered(shard.name, k) for k in range(_supplement(last) + 1)]
    rejected = rejected_of(shards, records)
    columns = ["id", "split", "label", "status", *manifold_set.ERRORS]
    table = pa.concat_tables(manifold_set.read_shard(folder, name, columns) for name in ours)
    _require_exactly_once(table["id"], rejected, shards)
    usable = table.filter(pc.equal(table["status"], "ok"))
    manifest = {
        "version": manifold_set.VERSION,
        **settings,
        "shards": {name: records[name].rows for name in ours},
        "count": table.num_rows,
        "splits": _counts(table, "split"),
        "status": _counts(table, "status"),
        "usable": _counts(usable, "split"),
        "means": {name: round(float(np.mean(table[name].to_numpy())), 6) for name in manifold_set.ERRORS},
        "rejected": dict(sorted(rejected.items())),
        **described,
    }
    (folder / MANIFEST).write_json(manifest)
    return manifest


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
    """True if `folder` holds the whole set of exactly these settings."""
    try:
        manifest = manifold_set.read_manifest(folder)
    except UserError:
        return False
    if any(manifest.get(key) != value for key, value in settings.items()):
        return False
    records = read_records(folder)
    return all(name in records and records[name].rows == rows for name, rows in manifest["shards"].items())
