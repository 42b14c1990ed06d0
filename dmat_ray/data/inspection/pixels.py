"""The second pass of an inspection: images and w, a part of a shard at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dmat_ray.data.decoding import decode
from dmat_ray.data.inspection.checks import Check, Manifest
from dmat_ray.data.inspection.copies import Copies
from dmat_ray.data.inspection.rows import Rows, open_shard
from dmat_ray.data.pixels import quantise
from dmat_ray.data.set_format import from_lists, from_netpbm
from dmat_ray.data.set_reader import decoding_of
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError, first_line
from dmat_ray.storage import Location
from dmat_ray.types import Generator

LARGE = ("id", "split", "label", "image", "on_manifold", "w", "l1", "l2")
VALUES = 1 << 22  # pixel values read together
HALF_LEVEL = 0.5 / 255  # what rounding to uint8 may move a pixel by
# levels by which a pixel may differ when it is rendered again. In float32 another order of the sums turns the rounding of few
# pixels; bfloat16 moves whole features (by up to 5 levels between batch sizes, 11 against float32, with the shipped digits)
LEVELS = {"reference": 1, "fast": 1, "bf16": 16}
MEAN_LEVELS = 1.0  # and the mean over an image


@dataclass(frozen=True)
class Pair:
    """A natural image and its g(w), uint8 (C, H, W), and w (L, D)."""

    id: str
    natural: np.ndarray
    on_manifold: np.ndarray
    w: np.ndarray


class PixelReader:
    """Checks pixels shard by shard, and keeps the pairs that are wanted: positions in `rows`."""

    def __init__(self, folder: Location, manifest: Manifest, checks: dict[str, Check], rows: Rows, wanted: np.ndarray) -> None:
        self.folder, self.manifest, self.checks, self.rows = folder, manifest, checks, rows
        self.wanted = {(int(rows.shard[i]), int(rows.row[i])): int(i) for i in wanted}
        self.pairs: dict[int, Pair] = {}
        self.copies = Copies(folder, rows.names)
        self.count, self.most = 0, {"l1": 0.0, "l2": 0.0}
        self.decoding = decoding_of(manifest.model_dump())

    def run(self, shards: np.ndarray) -> None:
        """Check the shards at these positions, and fetch wanted pairs from the others."""
        checked = set(shards.tolist())
        for k in sorted(checked | {shard for shard, _ in self.wanted}):
            name = self.rows.names[k]
            with self.checks["shards"].guard(name):
                for start, batch in self._batches(name):
                    if k in checked:
                        self._check(name, k, start, batch)
                    else:
                        self._keep(k, start, batch)
        of = f"{self.count} of {len(self.rows)} images"
        for name in ("w", "g(w)", "natural") if self.count else ():
            self.checks[name].detail = of
        if self.count:
            differences = ", ".join(f"{name} to {value:.1g}" for name, value in self.most.items())
            self.checks["errors"].detail = f"{of} agree with their columns: {differences}"

    def _batches(self, name: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        size = max(1, VALUES // int(np.prod(self.manifest.shapes.on_manifold)))
        start = 0
        with open_shard(self.folder, name) as parquet:
            for k in range(parquet.num_row_groups):  # across them pyarrow would read more images in one piece than it can
                for batch in parquet.iter_batches(batch_size=size, row_groups=[k], columns=list(LARGE)):
                    yield start, batch
                    start += batch.num_rows

    def _keep(self, k: int, start: int, batch: pa.RecordBatch) -> None:
        for i in range(batch.num_rows):
            if (k, start + i) in self.wanted:
                part = batch.slice(i, 1)
                (natural,), (image,), (w,) = self._naturals("", part), self._stored("", part), self._codes("", part)
                self._store(k, start + i, part["id"][0].as_py(), natural, image, w)

    def _store(
        self, k: int, row: int, id: str, natural: np.ndarray | None, image: np.ndarray | None, w: np.ndarray | None
    ) -> None:
        index = self.wanted.get((k, row))
        if index is not None and natural is not None and image is not None and w is not None:
            self.pairs[index] = Pair(id, natural, image.copy(), w.copy())

    def _check(self, name: str, k: int, start: int, batch: pa.RecordBatch) -> None:
        ids = batch["id"].to_pylist()
        naturals, images, codes = self._naturals(name, batch), self._stored(name, batch), self._codes(name, batch)
        for i, id in enumerate(ids):
            natural, image = naturals[i], images[i]
            if natural is not None and image is not None:
                columns = {key: float(batch[key][i].as_py()) for key in ("l1", "l2")}
                self._errors(f"{name}: '{id}'", natural, image, columns)
            self._store(k, start + i, id, natural, image, codes[i])
        self.copies.add(k, start, batch, naturals)
        self.count += len(ids)

    def _codes(self, name: str, batch: pa.RecordBatch) -> list[np.ndarray | None]:
        """w of each row; None, and a defect, where it is not finite or has holes, which become NaN."""
        w_NLD = from_lists(pa.chunked_array([batch["w"]]), self.manifest.shapes.w)
        finite = np.isfinite(w_NLD).all(axis=(1, 2))
        for i in np.flatnonzero(~finite) if name else ():
            self.checks["w"].defect(f"{name}: w of '{batch['id'][i]}' is not finite")
        return [w if fine else None for w, fine in zip(w_NLD, finite, strict=True)]

    def _stored(self, name: str, batch: pa.RecordBatch) -> list[np.ndarray | None]:
        """g(w) of each row; None, and a defect, where it is no image."""
        try:
            return list(from_netpbm(pa.chunked_array([batch["on_manifold"]]), self.manifest.shapes.on_manifold))
        except UserError as error:
            if batch.num_rows > 1:
                return [self._stored(name, batch.slice(i, 1))[0] for i in range(batch.num_rows)]
            if name:
                self.checks["g(w)"].defect(f"{name}: '{batch['id'][0]}': {error}")
            return [None]

    def _naturals(self, name: str, batch: pa.RecordBatch) -> list[np.ndarray | None]:
        """Decoded natural image of each row; None, and a defect, where it cannot be read."""
        channels, resolution, _ = self.manifest.shapes.on_manifold
        found: list[np.ndarray | None] = []
        for i, content in enumerate(pc.struct_field(batch["image"], "bytes").to_pylist()):
            try:
                found.append(decode(content or b"", resolution, channels, **self.decoding))
            except ValueError as error:
                found.append(None)
                if name:
                    self.checks["natural"].defect(f"{name}: '{batch['id'][i]}' {first_line(error)}")
        return found

    def _errors(self, what: str, natural: np.ndarray, image: np.ndarray, columns: dict[str, float]) -> None:
        difference = (image.astype(np.float64) - natural) / 255
        l1, l2 = float(np.abs(difference).mean()), float(np.square(difference).mean())
        # columns are of the image before it was rounded: (d + e)^2 - d^2 = 2de + e^2
        allowed = {"l1": HALF_LEVEL + 1e-5, "l2": 2 * HALF_LEVEL * l1 + HALF_LEVEL**2 + 1e-5}
        for key, value in (("l1", l1), ("l2", l2)):
            gap = abs(value - columns[key])
            if not gap <= allowed[key]:
                self.checks["errors"].defect(f"{what} has {key} {columns[key]:.5f}, its images give {value:.5f}")
            else:
                self.most[key] = max(self.most[key], gap)


@torch.no_grad()
def render_again(generator: Generator, pairs: list[Pair], precision: str, check: Check) -> None:
    """Render w of these pairs, and compare with what is stored."""
    size = max(1, VALUES // 4 // (generator.channels * generator.resolution**2))
    most, differing, values = 0, 0, 0
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        w = torch.from_numpy(np.stack([pair.w for pair in part])).to(generator.w_mean.device)
        with tf32(allowed=False):
            image = quantise(generator.synthesis(w))
        gaps = np.abs(image.astype(np.int16) - np.stack([pair.on_manifold for pair in part]))
        for pair, gap in zip(part, gaps, strict=True):
            if gap.max() > LEVELS[precision] or gap.mean() > MEAN_LEVELS:
                check.defect(
                    f"'{pair.id}' is rendered with pixels up to {gap.max()} levels of 255 away, {gap.mean():.2f} in the mean"
                )
        most, differing, values = max(most, int(gaps.max())), differing + int((gaps > 0).sum()), values + gaps.size
    if pairs:
        check.detail = (
            f"{len(pairs)} images in {precision} arithmetic: {differing / values:.4%} of pixels differ, by {most} levels at most "
            f"({LEVELS[precision]} allowed)"
        )
