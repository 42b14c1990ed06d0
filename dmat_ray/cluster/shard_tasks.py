"""What reads and writes shards, as tasks of Ray Data. Their processes need no torch, which would be most of their memory.

Between them a shard is one row, and its table travels as bytes, which are not copied when they are opened again.
"""

import functools
import json
import os
import platform
from collections import Counter
from collections.abc import Sized
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmat_ray.cluster.nodes import require_like_driver
from dmat_ray.config import DataConfig
from dmat_ray.data import set_format, set_reader, set_writer
from dmat_ray.data.reading import read_good, read_images
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import Location, at


def as_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def pack(name: str, table: pa.Table, rejected: dict[str, str]) -> pa.Table:
    """A shard as one row. Its table travels as bytes, which are not copied when they are opened again."""
    content = as_bytes(table)
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    payload = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content])
    return pa.table({"name": [name], "payload": payload, "rejected": [json.dumps(rejected)]})


def work(name: str, table: pa.Table) -> dict[str, Any]:
    """A row of plain values for `ray.data.from_items`, of which nothing is rejected yet; `unpack` takes it."""
    return {"name": name, "payload": as_bytes(table).to_pybytes(), "rejected": json.dumps({})}


def unpack(row: pa.Table) -> tuple[str, pa.Table, dict[str, str]]:
    """What `pack` or `work` was given."""
    table = pa.ipc.open_stream(row["payload"][0].as_buffer()).read_all()
    return row["name"][0].as_py(), table, json.loads(row["rejected"][0].as_py())


@functools.cache
def _look_at_this_machine() -> None:
    """It may have come after the others were looked at. Once a process; raises like `require_like_driver`."""
    require_like_driver()


def _require_source(wanted: pa.Table, source: str, rejected: Sized) -> None:
    """Raise StorageError if all were rejected because this machine sees no file that the driver has listed: none is at fault."""
    files = [at(source) / os.fsdecode(file) for file in pc.unique(wanted["file"]).to_pylist() if file is not None]
    if files and len(rejected) == wanted.num_rows and not any(file.is_file() for file in (at(source), *files)):
        raise StorageError(
            f"node {platform.node()} sees none of the files that the driver has listed, such as '{files[0]}'; mount their folder "
            "on all nodes, or give an s3:// or gs:// URL"
        )


def read_shard(row: pa.Table, *, data: dict[str, Any]) -> pa.Table:
    """A task: the images of a shard, encoded and decoded; those that cannot be read are set aside with the reason."""
    _look_at_this_machine()
    name, wanted, _ = unpack(row)
    config = DataConfig.model_validate(data)
    images, rejected = read_images(wanted, config)
    _require_source(wanted, config.source, rejected)
    return pack(name, images, rejected)


def read_pictures(row: pa.Table, *, data: dict[str, Any]) -> pa.Table:
    """A task: the decoded images of a part of a folder; those that cannot be read are set aside with the reason."""
    _look_at_this_machine()
    name, wanted, _ = unpack(row)
    config = DataConfig.model_validate(data)
    keep, images, rejected = read_good(wanted, config)
    _require_source(wanted, config.source, rejected)
    ids, pixels = wanted["id"].take(pa.array(keep, pa.int64())), set_format.fixed_list(images, pa.uint8())
    return pack(name, pa.table({"id": ids, "pixels": pixels}), rejected)


def write_shard(row: pa.Table, *, folder: str) -> pa.Table:
    """A task: writes a shard into the set, and returns what the driver wants to know of it."""
    _look_at_this_machine()
    name, table, rejected = unpack(row)
    try:
        written = set_writer.write_shard(at(folder), name, table, rejected)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror or error}") from None
    summary = {"name": name, "rows": table.num_rows, "rejected": len(rejected), "written": written}
    return pa.table({key: [value] for key, value in summary.items()})


def read_examples(
    row: pa.Table, *, place: str, images: str, manifest: dict[str, Any], without: list[str], twice: list[str]
) -> pa.Table:
    """A task: the usable training examples of some shards, but for those `without`; those in `twice` come a second time."""
    _look_at_this_machine()
    parts = [_read_shard(at(place), name, images, manifest, without, twice) for name in row["shards"][0].as_py()]
    return pa.concat_tables(parts)


def _read_shard(
    folder: Location, name: str, images: str, manifest: dict[str, Any], without: list[str], twice: list[str]
) -> pa.Table:
    wanted = ["on_manifold", "w"] if images == "on_manifold" else ["image"]
    table = set_reader.read_shard(folder, name, ["id", "split", "status", "label", *wanted])
    keep = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["status"], "ok"))
    table = table.filter(pc.and_(keep, pc.invert(pc.is_in(table["id"], value_set=pa.array(without, pa.string())))))
    if images == "on_manifold":
        pixels = set_format.from_netpbm(table["on_manifold"], manifest["shapes"]["on_manifold"])
    else:
        pixels = set_reader.decoded(table, manifest, f"shard {name} of '{folder}'")
    # pixels take the place of encoded images before anything is taken, for which these may be too many bytes
    kept = table.select(["id", "label"]).append_column("pixels", set_format.fixed_list(pixels, pa.uint8()))
    if images == "on_manifold":
        kept = kept.append_column("w", table["w"])
    more = Counter(twice)
    again = [i for i, id in enumerate(kept["id"].to_pylist()) for _ in range(more[id])]
    return pa.concat_tables([kept, kept.take(pa.array(again, pa.int64()))])
