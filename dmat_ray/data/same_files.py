"""That a set which is gone on with is made of the files of many images that it was begun with."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.config import DataConfig
from dmat_ray.data import packed, set_writer
from dmat_ray.data.folder_source import text
from dmat_ray.data.set_format import SHARDS
from dmat_ray.data.set_writer import Record
from dmat_ray.data.sources import read
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at

FILES = "files.json"  # in the set's folder: digests of the source's files of many images
LOOKED_INTO, FEW = 8, 8  # finished shards of a file's images, and rows at most of each of them


def require_same_files(folder: Location, rows: pa.Table, config: DataConfig) -> None:
    """Note the digests of the source's files that hold many images each, of `Listing.table`, or check that those that were noted
    are the same, or hold the same images as some finished rows of the set: one that could not be read may have been repaired.

    An image is known by its place in such a file, unless `data.id_column` has its id, so that two halves of a set would be of two
    files. Raises UserError for another one. A set begun before this was noted is not compared.
    """
    path, many = folder / FILES, rows.filter(pc.is_valid(rows["file_digest"])).group_by(["file", "file_digest"]).aggregate([])
    now = {row["file"]: row["file_digest"] for row in many.to_pylist()}
    if config.id_column is not None:  # of Parquet; CIFAR and MNIST have none
        now = {file: digest for file, digest in now.items() if packed.is_packed(os.fsdecode(file))}
    if not now:
        return
    files = {text(os.fsdecode(file)): digest for file, digest in now.items()}
    try:
        before = path.read_json()
    except FileNotFoundError:
        before = files
        path.write_json(files)
    others = [
        file for file in sorted(now) if isinstance(before, dict) and before.get(text(os.fsdecode(file)), now[file]) != now[file]
    ]
    records = set_writer.read_records(folder) if others else {}
    for file in others:
        if not _holds_the_same(folder, records, rows.filter(pc.equal(rows["file"], pa.scalar(file, pa.binary()))), config):
            place = at(config.source) / os.fsdecode(file)
            raise UserError(
                f"'{place}' is another file than when the on-manifold set '{folder}' was begun, which knows images by their "
                "places in it, and has other images in the places of those that are finished; put the file of then back, give "
                "another --output, or remove the folder"
            )
    if others:
        path.write_json(files)


def _holds_the_same(folder: Location, records: dict[str, Record], rows: pa.Table, config: DataConfig) -> bool:
    """Whether these images have the bytes that finished rows of the set have, as far as a few rows tell, if there are any."""
    stored: dict[str, bytes] = {}
    finished = [name for name, record in sorted(records.items()) if _any_of(rows, record.ids)]
    for place in np.unique(np.linspace(0, len(finished) - 1, min(LOOKED_INTO, len(finished))).astype(np.int64)):
        stored |= _stored(folder / SHARDS / finished[place], rows["id"])
    here = rows.filter(pc.is_in(rows["id"], value_set=pa.array(list(stored), pa.string())))
    return all(stored[id] == content for id, content in zip(here["id"].to_pylist(), read(here, config), strict=True))


def _any_of(rows: pa.Table, ids: tuple[str, ...]) -> bool:
    return bool(pc.any(pc.is_in(pa.array(ids, pa.string()), value_set=rows["id"])).as_py())


def _stored(shard: Location, ids: pa.ChunkedArray) -> dict[str, bytes]:
    """The images as encoded of the first few rows of a shard that have one of these ids, by id."""
    with shard.open() as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(FEW, columns=["id", "image.bytes"]):
            found = batch.filter(pc.is_in(batch["id"], value_set=ids))
            if found.num_rows:
                images = pc.struct_field(found["image"], "bytes").to_pylist()
                return dict(zip(found["id"].to_pylist(), images, strict=True))
    return {}
