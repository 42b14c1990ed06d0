"""That a set which is gone on with, or taken as it is, is made of the files of many images that it was begun with."""

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.config import DataConfig
from dmat_ray.data import packed, set_writer
from dmat_ray.data.folder_source import text
from dmat_ray.data.reading import read
from dmat_ray.data.set_format import SHARDS
from dmat_ray.data.set_writer import Record
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at

FILES = "files.json"  # in the set's folder: digests of the source's files of many images
LOOKED_INTO, EACH, FEW = 64, 8, 8  # finished shards in all (one a file at least) and of a file's images; rows at most of each


def require_same_files(folder: Location, rows: pa.Table, config: DataConfig) -> None:
    """Note the digests of the source's files that hold many images each, of `Listing.table`, or check that those that were noted
    are the same, or hold the same images as some finished rows of the set: one that could not be read may have been repaired.

    An image is known by its place in such a file, unless `data.id_column` has its id, so that two halves of a set would be of two
    files. Raises UserError for another one. A set begun before this was noted is not compared.
    """
    now, noted = _digests(rows, config), _noted(folder)
    if not now:
        return
    others = _others(now, noted)
    _require_same_images(folder, others, rows, config)
    if noted is None or others:
        (folder / FILES).write_json(_by_name(now))


def are_unchanged(folder: Location, rows: pa.Table, config: DataConfig) -> bool:
    """Whether the images of a finished set, of `Listing.table`, are known to be those that it was made of: by digests of files of
    many images, if they were noted. False where the ids alone tell, as of images that are files of their own, or a few images
    besides, as of a file of another digest.

    Raises UserError for a file of other images, like `require_same_files`. Writes nothing.
    """
    now, noted = _digests(rows, config), _noted(folder)
    if not now or not noted:
        return False
    others = _others(now, noted)
    _require_same_images(folder, others, rows, config)
    # the digests of then stay: the rows that are not compared may be of other images
    return not others


def _digests(rows: pa.Table, config: DataConfig) -> dict[bytes, int]:
    """Of the source's files that hold many images each, which are known by their places in them."""
    many = rows.filter(pc.is_valid(rows["file_digest"])).group_by(["file", "file_digest"]).aggregate([])
    now = {row["file"]: row["file_digest"] for row in many.to_pylist()}
    if config.id_column is not None:  # of Parquet; CIFAR and MNIST have none
        now = {file: digest for file, digest in now.items() if packed.is_packed(os.fsdecode(file))}
    return now


def _by_name(digests: dict[bytes, int]) -> dict[str, int]:
    return {text(os.fsdecode(file)): digest for file, digest in digests.items()}


def _noted(folder: Location) -> dict[str, Any] | None:
    """The digests that were noted; None for a set begun before any were."""
    try:
        noted = (folder / FILES).read_json()
    except FileNotFoundError:
        return None
    return noted if isinstance(noted, dict) else {}


def _others(now: dict[bytes, int], noted: dict[str, Any] | None) -> list[bytes]:
    """The files of other digests than those that were noted of them."""
    return [file for file in sorted(now) if (noted or {}).get(text(os.fsdecode(file)), now[file]) != now[file]]


def _require_same_images(folder: Location, others: list[bytes], rows: pa.Table, config: DataConfig) -> None:
    """Raise UserError for one of these files that has other images in the places of finished rows of the set."""
    finished = _shards_of(set_writer.read_records(folder), rows) if others else {}
    for file in others:
        shards = finished.get(file, [])
        looked = min(EACH, max(1, LOOKED_INTO // len(others)), len(shards))
        some = [shards[k] for k in np.unique(np.linspace(0, len(shards) - 1, looked).astype(np.int64))]
        if not _holds_the_same(folder, some, rows.filter(pc.equal(rows["file"], pa.scalar(file, pa.binary()))), config):
            place = at(config.source) / os.fsdecode(file)
            raise UserError(
                f"'{place}' is another file than when the on-manifold set '{folder}' was begun, which knows images by their "
                "places in it, and has other images in the places of those that are finished; put the file of then back, give "
                "another --output, or remove the folder"
            )


def _holds_the_same(folder: Location, shards: list[str], rows: pa.Table, config: DataConfig) -> bool:
    """Whether these images have the bytes that finished rows of the set have, as far as a few rows of shards tell, if any."""
    stored: dict[str, bytes] = {}
    for name in shards:
        stored |= _stored(folder / SHARDS / name, rows["id"])
    here = rows.filter(pc.is_in(rows["id"], value_set=pa.array(list(stored), pa.string())))
    return all(stored[id] == content for id, content in zip(here["id"].to_pylist(), read(here, config), strict=True))


def _shards_of(records: dict[str, Record], rows: pa.Table) -> dict[bytes, list[str]]:
    """The finished shards that hold images of each file, in their order."""
    shards = [(name, id) for name, record in sorted(records.items()) for id in record.ids]
    places = pc.index_in(pa.array([id for _, id in shards], pa.string()), value_set=rows["id"].combine_chunks())
    files = rows["file"].take(places).to_pylist()
    found: dict[bytes, dict[str, None]] = {}
    for (name, _), file in zip(shards, files, strict=True):
        if file is not None:
            found.setdefault(file, {})[name] = None
    return {file: list(names) for file, names in found.items()}


def _stored(shard: Location, ids: pa.ChunkedArray) -> dict[str, bytes]:
    """The images as encoded of the first few rows of a shard that have one of these ids, by id."""
    with shard.open() as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(FEW, columns=["id", "image.bytes"]):
            found = batch.filter(pc.is_in(batch["id"], value_set=ids))
            if found.num_rows:
                images = pc.struct_field(found["image"], "bytes").to_pylist()
                return dict(zip(found["id"].to_pylist(), images, strict=True))
    return {}
