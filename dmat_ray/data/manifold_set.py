"""The on-manifold set: Parquet shards of (x, w, g(w), label), and the manifest that says they are whole.

A set is a folder. `shards/*.parquet` hold one row per image, in the columns of `dmat_ray.data.set_format`; `manifest.json` is
written last, so that a set without one is unfinished by definition.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmat_ray.data.decoding import decode, to_unit
from dmat_ray.data.set_format import ERRORS as ERRORS
from dmat_ray.data.set_format import VERSION as VERSION
from dmat_ray.data.set_format import different_columns
from dmat_ray.data.set_format import fixed_list as fixed_list
from dmat_ray.data.set_format import from_lists as from_lists
from dmat_ray.data.set_format import from_netpbm as from_netpbm
from dmat_ray.data.set_format import schema as schema
from dmat_ray.data.set_format import to_netpbm as to_netpbm
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at
from dmat_ray.types import Batch

Place = str | Path | Location
MANIFEST = "manifest.json"
SHARDS = "shards"


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


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a finished set; raises UserError for one that is missing, unfinished or of another version."""
    folder = at(place)
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"there is no on-manifold set at '{folder}'; make it with jobs/project.py") from None
        raise UserError(
            f"the on-manifold set '{folder}' is unfinished: it has no {MANIFEST}; run jobs/project.py again"
        ) from None
    try:
        manifest: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{folder / MANIFEST}' is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"'{folder / MANIFEST}' is damaged: it holds a {type(manifest).__name__}, not an object")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"the set '{folder}' has format version {manifest.get('version')}, this program reads {VERSION}; project again into "
            "another folder"
        )
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """Names a set in checkpoints and evaluations."""
    return text_digest(json.dumps(manifest, sort_keys=True))


def read_shard(folder: Location, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's table; raises UserError if it is missing or damaged."""
    try:
        with (folder / SHARDS / name).open() as file:
            return pq.read_table(file, columns=None if columns is None else list(columns), page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"the set '{folder}' lacks its shard {name}; run jobs/project.py again") from None
    except (pa.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"shard {name} of '{folder}' is damaged ({reason}); remove it and run jobs/project.py again") from None


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
        return digest(self.manifest)

    def take(self, index: np.ndarray) -> "ManifoldSet":
        """The examples at these positions, as a set of their own."""
        return ManifoldSet(
            id=[self.id[i] for i in index],
            on_manifold=self.on_manifold[index],
            natural=self.natural[index],
            label=self.label[index],
            w=self.w[index],
            class_names=self.class_names,
            manifest=self.manifest,
        )

    def batch(self, index: np.ndarray, images: str) -> Batch:
        """Examples by position; `images` is 'on_manifold' (with w) or 'natural' (without: w does not render x)."""
        source = self.on_manifold if images == "on_manifold" else self.natural
        w = torch.from_numpy(self.w[index]) if images == "on_manifold" else None
        return Batch([self.id[i] for i in index], to_unit(source[index]), torch.from_numpy(self.label[index]), w)


def open_set(place: Place, split: str, *, include_poor: bool = False, only: Sequence[str] | None = None) -> ManifoldSet:
    """Read one split of a finished set, or `only` the examples of these ids.

    Memory: what is kept, and a shard; as much again while rows are put in order, if shards do not come in the order of ids.
    Raises UserError if the set is not whole, or has no images of that split.
    """
    folder, manifest = at(place), read_manifest(place)
    shape, count = manifest["shapes"]["on_manifold"], manifest["splits" if include_poor else "usable"].get(split, 0)
    count = count if only is None else len(only)
    if count == 0:
        raise UserError(f"the set '{folder}' has no usable image in its {split} split")
    on_manifold, natural = np.empty((count, *shape), np.uint8), np.empty((count, *shape), np.uint8)
    tables, end = [], 0
    for name, rows in sorted(manifest["shards"].items()):
        table = _read_rows(folder, name, rows, manifest)
        keep = pc.equal(table["split"], split)
        if not include_poor:
            keep = pc.and_(keep, pc.equal(table["status"], "ok"))
        if only is not None:
            keep = pc.and_(keep, pc.is_in(table["id"], value_set=pa.array(only, pa.string())))
        table = table.filter(keep)
        start, end = end, end + table.num_rows
        if end <= count:
            on_manifold[start:end] = from_netpbm(table["on_manifold"], shape)
            _decode_into(natural[start:end], table, f"shard {name} of '{folder}'")
        tables.append(table.select(["id", "label", "w"]))
    if end != count:
        wanted = "its manifest says" if only is None else "asked for were"
        raise UserError(f"the set '{folder}' has {end} images to read in its {split} split, {wanted} {count}")
    table = pa.concat_tables(tables)
    order = pc.sort_indices(table["id"]).to_numpy()
    ordered: Any = slice(None) if (order == np.arange(count)).all() else order
    return ManifoldSet(
        id=table["id"].take(order).to_pylist(),
        on_manifold=on_manifold[ordered],
        natural=natural[ordered],
        label=table["label"].to_numpy()[ordered],
        w=from_lists(table["w"], manifest["shapes"]["w"])[ordered],
        class_names=tuple(manifest["class_names"]),
        manifest=manifest,
    )


def _read_rows(folder: Location, name: str, rows: int, manifest: dict[str, Any]) -> pa.Table:
    """All columns of a shard, checked against the manifest."""
    table = read_shard(folder, name)
    if table.num_rows != rows:
        raise UserError(f"shard {name} of '{folder}' has {table.num_rows} rows, its manifest says {rows}")
    if odd := different_columns(table.schema, schema_of(manifest)):
        raise UserError(f"shard {name} of '{folder}' has other columns than its manifest says: {odd}")
    return table


def schema_of(manifest: dict[str, Any]) -> pa.Schema:
    """The schema of the shards that a manifest describes."""
    (channels, resolution, _), w = manifest["shapes"]["on_manifold"], manifest["shapes"]["w"]
    return schema(channels, resolution, w[0], w[1], manifest["class_names"])


def _decode_into(pixels_NCHW: np.ndarray, table: pa.Table, where: str) -> None:
    """Decode the natural images of a table; raises UserError for one that cannot be read."""
    _, channels, resolution, _ = pixels_NCHW.shape
    for i, content in enumerate(pc.struct_field(table["image"], "bytes")):
        try:
            pixels_NCHW[i] = decode(content.as_py(), resolution, channels)
        except ValueError as error:
            raise UserError(f"{where}: the natural image of '{table['id'][i]}' {error}") from None


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
