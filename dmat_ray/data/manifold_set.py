"""The on-manifold set: Parquet shards of (x, w, g(w), label), and the manifest that says they are whole.

A set is a folder. `shards/*.parquet` hold one row per image; `manifest.json` is written last, so that a set without
one is unfinished by definition. Columns are plain Arrow types that any reader opens: `image` is struct{bytes, path}
(the Hugging Face Image layout), `w` and `on_manifold` are fixed-size lists whose shapes stand in the manifest and in
the schema's metadata.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmat_ray.data.sources import decode, to_unit
from dmat_ray.errors import UserError
from dmat_ray.types import Batch

VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"


def schema(channels: int, resolution: int, num_ws: int, w_dim: int) -> pa.Schema:
    """Arrow schema of a shard."""
    shapes = {"on_manifold": [channels, resolution, resolution], "w": [num_ws, w_dim]}
    return pa.schema(
        [
            ("id", pa.string()),
            ("split", pa.string()),
            ("label", pa.int64()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("on_manifold", pa.list_(pa.uint8(), channels * resolution * resolution)),
            ("w", pa.list_(pa.float32(), num_ws * w_dim)),
            ("lpips", pa.float32()),
            ("l1", pa.float32()),
            ("l2", pa.float32()),
            ("steps", pa.int32()),
            ("status", pa.string()),
        ],
        metadata={"dmat_ray": json.dumps({"version": VERSION, "shapes": shapes})},
    )


def fixed_list(array: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    """(N, ...) array -> Arrow fixed-size lists of its flattened rows."""
    flat = array.reshape(len(array), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel(), type=kind), flat.shape[1])


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Hex sha256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """JSON written whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises UserError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished set; raises UserError for one that is missing, unfinished or of another version."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"there is no on-manifold set at '{folder}'; make it with jobs/project.py")
    if not path.is_file():
        raise UserError(f"the on-manifold set '{folder}' is unfinished: it has no {MANIFEST}; run jobs/project.py again")
    manifest: dict[str, Any] = read_json(path)
    if manifest.get("version") != VERSION:
        raise UserError(f"the set '{folder}' has format version {manifest.get('version')}, this program reads {VERSION}")
    return manifest


@dataclass(frozen=True)
class ManifoldSet:
    """A split of a finished set in memory, sorted by id. Images stay uint8 until a batch is made of them."""

    id: list[str]
    on_manifold: np.ndarray
    natural: np.ndarray
    label: np.ndarray
    w: np.ndarray
    class_names: tuple[str, ...]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.id)

    @property
    def sha256(self) -> str:
        """Digest of the manifest: names the set in checkpoints."""
        return text_digest(json.dumps(self.manifest, sort_keys=True))

    def batch(self, index: np.ndarray, images: str) -> Batch:
        """Examples by position; `images` is 'on_manifold' (with w) or 'natural' (without: w does not render x)."""
        source = self.on_manifold if images == "on_manifold" else self.natural
        w = torch.from_numpy(self.w[index]) if images == "on_manifold" else None
        return Batch([self.id[i] for i in index], to_unit(source[index]), torch.from_numpy(self.label[index]), w)


def open_set(folder: Path, split: str, *, include_poor: bool = False) -> ManifoldSet:
    """Read one split of a finished set; raises UserError if it is not whole, or has no images of that split."""
    manifest = read_manifest(folder)
    tables = []
    for name, rows in sorted(manifest["shards"].items()):
        path = folder / SHARDS / name
        if not path.is_file():
            raise UserError(f"the set '{folder}' lacks its shard {name}; run jobs/project.py again")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"shard {name} of '{folder}' is damaged ({str(error).splitlines()[0]}); remove it and run jobs/project.py again"
            ) from None
        if table.num_rows != rows:
            raise UserError(f"shard {name} of '{folder}' has {table.num_rows} rows, its manifest says {rows}")
        tables.append(table)
    table = pa.concat_tables(tables).sort_by("id")
    keep = pc.equal(table["split"], split)
    if not include_poor:
        keep = pc.and_(keep, pc.equal(table["status"], "ok"))
    table = table.filter(keep)
    if table.num_rows == 0:
        raise UserError(f"the set '{folder}' has no usable image in its {split} split")
    channels, resolution, _ = manifest["shapes"]["on_manifold"]

    def array(column: str, shape: list[int]) -> np.ndarray:
        flat: np.ndarray = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(table.num_rows, *shape)

    natural = np.stack([decode(i["bytes"], resolution, channels) for i in table["image"].to_pylist()])
    return ManifoldSet(
        id=table["id"].to_pylist(),
        on_manifold=array("on_manifold", manifest["shapes"]["on_manifold"]),
        natural=natural,
        label=table["label"].to_numpy(),
        w=array("w", manifest["shapes"]["w"]),
        class_names=tuple(manifest["class_names"]),
        manifest=manifest,
    )


def require_generator(manifest: dict[str, Any], sha: str, what: str) -> None:
    """Raise UserError unless the set was made with the generator of this sha256."""
    if manifest["generator_sha256"] != sha:
        raise UserError(
            f"{what} was made with generator {manifest['generator_sha256'][:12]}, but the one given is {sha[:12]}; "
            "give the same generator.path, or project again into another folder"
        )


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Steps of an epoch over `size` examples, none of them with more than `batch_size`."""
    return math.ceil(size / batch_size)


def epoch_batches(
    data: ManifoldSet,
    index: np.ndarray,
    *,
    images: str,
    batch_size: int,
    epoch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This worker's part of every global batch of an epoch over the examples at `index`.

    The global order depends on (seed, epoch) alone and is the same for any number of workers; worker r takes
    examples r, r + world_size, ... of each global batch. The batches of an epoch are as equal as can be: a short last
    one would weigh its examples more, and one of a single example has no batch statistics. A batch that does not divide
    by the workers is topped up from the epoch's beginning, so that all workers have equal parts.
    """
    order = index[np.random.default_rng([seed, epoch]).permutation(len(index))]
    for part in np.array_split(order, steps_per_epoch(len(order), batch_size)):
        short = -len(part) % world_size
        part = np.concatenate([part, order[:short]])
        yield data.batch(part[rank::world_size], images)


def quantise(x: Tensor) -> np.ndarray:
    """float in [0, 1] -> uint8, rounded to nearest."""
    return np.asarray((x * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
