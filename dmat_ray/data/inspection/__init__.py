"""Is an on-manifold set what its manifest says it is? Every check is made from the files, and none stops the others.

Two passes over the shards. The first reads what is small (ids, labels, errors) of all rows and keeps some 40 bytes of each; the
second reads images and w, a part of a shard at a time, of all shards or of as many as are asked for, and keeps 25 bytes more.
Memory is bounded by these bytes and by a shard.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dmat_ray.data.inspection.checks import CHECKS, Check, Manifest, read_checked_manifest
from dmat_ray.data.inspection.pixels import Pair, PixelReader, render_again
from dmat_ray.data.inspection.rows import Reader, Rows, compare_with_manifest
from dmat_ray.data.set_reader import named_generator, warning_of_given_up
from dmat_ray.storage import Place, at
from dmat_ray.types import Generator

__all__ = ["CHECKS", "Check", "Chosen", "Inspection", "Manifest", "Pair", "Rows", "choose", "inspect_set"]

WORST = 12  # pairs shown of the whole set


@dataclass(frozen=True)
class Chosen:
    """Rows worth looking at, as positions in `Rows`: of some classes the best, median and worst, and the worst of all."""

    ranked_by: str
    classes: dict[int, dict[str, int]]
    worst: list[int]

    @property
    def positions(self) -> np.ndarray:
        """All of them, each once."""
        return np.unique([*(i for row in self.classes.values() for i in row.values()), *self.worst]).astype(np.int64)


@dataclass(frozen=True)
class Inspection:
    """What was found. `manifest` and what follows are None or empty if the manifest cannot be read."""

    place: str
    checks: list[Check]
    manifest: Manifest | None = None
    rows: Rows | None = None
    chosen: Chosen | None = None
    pairs: dict[int, Pair] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """Of searches that broke off, and of images that are there more than once, which fails no check."""

    @property
    def sound(self) -> bool:
        """True if no check failed."""
        return all(check.state != "failed" for check in self.checks)

    @property
    def defects(self) -> int:
        """How many defects there are."""
        return sum(len(check.defects) + check.more for check in self.checks)


def inspect_set(
    place: Place,
    *,
    generator_sha256: str | None = None,
    load: Callable[[str], Generator] | None = None,
    samples: int = 64,
    images: int | None = None,
    classes: int = 12,
    seed: int = 0,
) -> Inspection:
    """Inspect a set; whatever is wrong with it is a finding, never an exception.

    `generator_sha256` and `load` (from one of GeneratorConfig's precisions to the generator) are those of the generator at hand;
    `samples` rows, chosen by `seed`, are rendered with it. `images` bounds how many images are decoded and compared (whole
    shards chosen by `seed`; None is all). Pairs are kept for at most `classes` classes.
    """
    folder, checks = at(place), {name: Check(name) for name in CHECKS}
    found = list(checks.values())
    manifest = read_checked_manifest(folder, checks["manifest"])
    if manifest is None:
        return Inspection(str(folder), found)
    reader = Reader(folder, manifest, checks)
    rows = reader.run()
    compare_with_manifest(reader, rows)
    rng = np.random.default_rng(seed)
    shards = _some_shards(rows, images, rng)
    candidates = np.flatnonzero(np.isin(rows.shard, shards))
    sampled = rng.choice(candidates, min(samples, len(candidates)), replace=False) if load else candidates[:0]
    chosen = choose(rows, manifest, classes)
    pixels = PixelReader(folder, manifest, checks, rows, np.union1d(chosen.positions, sampled))
    pixels.run(shards)
    if generator_sha256 is not None:
        checks["generator"].detail = generator_sha256[:12]
        if generator_sha256 != manifest.generator_sha256:
            checks["generator"].defect(
                f"the set was made with generator {named_generator(manifest.generator_sha256, manifest.generator)}, the one "
                f"given is another ({generator_sha256[:12]}); give the same generator.path"
            )
        elif load is not None:
            with checks["rendering"].guard("rendering"):
                again = [pixels.pairs[i] for i in sampled.tolist() if i in pixels.pairs]
                render_again(load(manifest.generator_precision), again, manifest.generator_precision, checks["rendering"])
    warnings = [line] if (line := warning_of_given_up(manifest.model_dump())) else []
    with checks["shards"].guard("images that are there twice"):
        warnings += pixels.copies.warnings(manifest.class_names)
    return Inspection(str(folder), found, manifest, rows, chosen, pixels.pairs, warnings)


def _some_shards(rows: Rows, images: int | None, rng: np.random.Generator) -> np.ndarray:
    """Positions of shards that hold `images` rows or more together; all of them for None."""
    present, sizes = np.unique(rows.shard, return_counts=True)
    if images is None:
        return present
    order = rng.permutation(len(present))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), images)) + 1
    return np.sort(present[order[: enough if images else 0]])


def choose(rows: Rows, manifest: Manifest, classes: int) -> Chosen:
    """Pairs to look at, ranked by LPIPS if it is a perceptual distance here, and by l1 if not.

    Of more than `classes` classes, those with the largest median error.
    """
    ranked_by = "lpips" if manifest.lpips_is_perceptual and bool(np.any(rows.lpips > 0)) else "l1"
    error = getattr(rows, ranked_by)
    order = np.flatnonzero(rows.valid(len(manifest.class_names)))
    order = order[np.lexsort((error[order], rows.label[order]))]
    labels, starts = np.unique(rows.label[order], return_index=True)
    members = dict(zip(labels.tolist(), np.split(order, starts[1:]), strict=True)) if len(labels) else {}
    medians = {label: float(error[index[len(index) // 2]]) for label, index in members.items()}
    shown = sorted(medians, key=lambda label: -medians[label])[:classes]
    picked = {}
    for label in sorted(shown):
        index = members[label]
        picked[label] = {"best": int(index[0]), "median": int(index[len(index) // 2]), "worst": int(index[-1])}
    worst = order[np.argsort(-error[order], kind="stable")[:WORST]]
    return Chosen(ranked_by, picked, worst.tolist())
