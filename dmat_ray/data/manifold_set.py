"""A split of an on-manifold set in memory, and the batches of its epochs."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dmat_ray.data.pixels import to_unit
from dmat_ray.data.set_format import from_lists, from_netpbm
from dmat_ray.data.set_reader import decoded, digest, none_usable, read_columns, read_manifest, read_shard, require_usable
from dmat_ray.errors import UserError
from dmat_ray.positions import Index, positions
from dmat_ray.storage import READERS, Place, at
from dmat_ray.types import Batch
from dmat_ray.wording import did_you_mean

AHEAD = 4  # shards with images that are read at a time
KINDS = ("on_manifold", "natural")


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

    def take(self, index: Index) -> "ManifoldSet":
        """The examples at these positions, or those of a mask, as a set of their own.

        Raises UserError for a mask of another length.
        """
        index = positions(index, len(self))
        return ManifoldSet(
            id=[self.id[i] for i in index],
            on_manifold=self.on_manifold[index] if len(self.on_manifold) else self.on_manifold,
            natural=self.natural[index] if len(self.natural) else self.natural,
            label=self.label[index],
            w=self.w[index],
            class_names=self.class_names,
            manifest=self.manifest,
        )

    def batch(self, index: Index, images: str) -> Batch:
        """Examples by position or mask; `images` is 'on_manifold' (with w) or 'natural' (without: w does not render x).

        Raises UserError for a mask of another length, and for images of another kind or that the set was opened without.
        """
        index = positions(index, len(self))
        _require_kind(images, KINDS)
        source = self.on_manifold if images == "on_manifold" else self.natural
        if len(source) < len(self):
            raise UserError(f"the set was opened without its {images} images; open it with images=None")
        w = torch.from_numpy(self.w[index]) if images == "on_manifold" else None
        return Batch([self.id[i] for i in index], to_unit(source[index]), torch.from_numpy(self.label[index]), w)


def open_set(
    place: Place,
    split: str,
    *,
    include_poor: bool = False,
    only: Sequence[str] | None = None,
    images: Literal["on_manifold", "natural", "none"] | None = None,
) -> ManifoldSet:
    """Read one split of a finished set, or `only` the examples of these ids; of one kind of `images`, of both, or of none.

    Images that are not asked for are an array of none. Only shards that have what is kept are read but for their ids, and of
    them only the columns that are kept. Memory: what is kept, and AHEAD shards; as much again while rows are put in order, if
    shards do not come in the order of ids. Raises UserError if the set is not whole, has no images of that split, or for `images`
    of a kind that there is not.

    >>> import numpy as np
    >>> from dmat_ray import load_generator, make_set, open_set, settings
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> test = open_set(make_set(config), "test")
    >>> batch = test.batch(np.arange(10), "on_manifold")
    >>> again = load_generator("mnist32").synthesis(batch.w_BLD)
    >>> batch.x_BCHW.shape, batch.y_B.shape, bool((again - batch.x_BCHW).abs().max() < 1 / 255)  # rounded to levels
    (torch.Size([10, 1, 32, 32]), torch.Size([10]), True)
    """
    if images is not None:
        _require_kind(images, (*KINDS, "none"))
    folder, manifest = at(place), read_manifest(place)
    shape, count = manifest["shapes"]["on_manifold"], manifest["splits" if include_poor else "usable"].get(split, 0)
    count = count if only is None else len(only)
    if count == 0:
        raise none_usable(folder, split)
    on_manifold, natural = (np.empty((count if images in (None, kind) else 0, *shape), np.uint8) for kind in KINDS)
    wanted = None if only is None else pa.array(only, pa.string())

    def kept(name: str) -> pa.ChunkedArray:
        """Which rows of a shard."""
        table = read_shard(folder, name, ["id", "split", "status"], manifest)
        keep = pc.equal(table["split"], split)
        if not include_poor:
            keep = pc.and_(keep, pc.equal(table["status"], "ok"))
        return keep if wanted is None else pc.and_(keep, pc.is_in(table["id"], value_set=wanted))

    names = sorted(manifest["shards"])
    with ThreadPoolExecutor(READERS) as pool:
        rows = {name: keep for name, keep in zip(names, pool.map(kept, names), strict=True) if pc.any(keep).as_py()}
    pictures = [column for column, array in (("on_manifold", on_manifold), ("image", natural)) if len(array)]
    columns = ["id", "label", "w", *pictures]
    tables, end = [], 0
    for name, table in _each(lambda name: read_shard(folder, name, columns).filter(rows[name]), list(rows)):
        start, end = end, end + table.num_rows
        if end <= count and len(on_manifold):
            on_manifold[start:end] = from_netpbm(table["on_manifold"], shape)
        if end <= count and len(natural):
            natural[start:end] = decoded(table, manifest, f"shard {name} of '{folder}'")
        tables.append(table.select(["id", "label", "w"]))
    if end != count:
        expected = "its manifest says" if only is None else "asked for were"
        raise UserError(f"the set '{folder}' has {end} images to read in its {split} split, {expected} {count}")
    table = pa.concat_tables(tables)
    order = pc.sort_indices(table["id"]).to_numpy()
    ordered: Any = slice(None) if (order == np.arange(count)).all() else order
    return ManifoldSet(
        id=table["id"].take(order).to_pylist(),
        on_manifold=on_manifold[ordered] if len(on_manifold) else on_manifold,
        natural=natural[ordered] if len(natural) else natural,
        label=table["label"].to_numpy()[ordered],
        w=from_lists(table["w"], manifest["shapes"]["w"])[ordered],
        class_names=tuple(manifest["class_names"]),
        manifest=manifest,
    )


def _require_kind(images: str, known: Sequence[str]) -> None:
    if images not in known:
        raise UserError(f"images is {images!r}; {did_you_mean(str(images), known)}choose from {', '.join(known)}")


def usable(place: Place, split: str) -> pa.Table:
    """`id` and `label` of all that `open_set` reads of a split, in its order. Raises UserError as `open_set` does."""
    manifest = read_manifest(place)
    require_usable(manifest, at(place), split)
    table = read_columns(at(place), manifest["shards"], ["id", "label", "split", "status"])
    table = table.filter(pc.and_(pc.equal(table["split"], split), pc.equal(table["status"], "ok")))
    return table.select(["id", "label"]).sort_by("id")


def _each(read: Callable[[str], pa.Table], names: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """Each name with what is read of it, AHEAD at a time."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[str, Future[pa.Table]]] = deque()
        for name in names:
            waiting.append((name, pool.submit(read, name)))
            if len(waiting) == AHEAD:
                ready, table = waiting.popleft()
                yield ready, table.result()
        for ready, table in waiting:
            yield ready, table.result()


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
    first_step: int = 0,
) -> Iterator[Batch]:
    """This worker's part of every global batch, from `first_step` on, of an epoch over the examples at `index`.

    The global order depends on (seed, epoch) alone and is the same for any number of workers; worker r takes
    examples r, r + world_size, ... of each global batch. The batches of an epoch are as equal as can be: a short last
    one would weigh its examples more, and one of a single example has no batch statistics. A batch that does not divide
    by the workers is topped up, so that all workers have equal parts: each with the examples, from the epoch's beginning on,
    that follow those of the batch before, so that over an epoch none is dealt more than once oftener than another.
    """
    order = index[np.random.default_rng([seed, epoch]).permutation(len(index))]
    parts = np.array_split(order, steps_per_epoch(len(order), batch_size))
    ends = np.cumsum([-len(part) % world_size for part in parts])  # of the fillers, counted from the first step, also in a resume
    for part, start, end in list(zip(parts, [0, *ends], ends, strict=False))[first_step:]:
        fillers = order[np.arange(start, end) % len(order)]
        yield data.batch(np.concatenate([part, fillers])[rank::world_size], images)
