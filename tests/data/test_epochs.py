"""How epochs are dealt out in batches, to one worker and to several."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from set_rows import pixels_of, rows_of

from dmat_ray.data import manifold_set
from dmat_ray.data.manifold_set import ManifoldSet, epoch_batches, open_set
from dmat_ray.types import Batch


def batches(data: ManifoldSet, index: np.ndarray, **how: int) -> list[Batch]:
    return list(epoch_batches(data, index, images="on_manifold", **{"batch_size": 5, "epoch": 0, "seed": 0, **how}))


def ids(found: list[Batch]) -> list[list[str]]:
    return [list(batch.id) for batch in found]


@given(size=st.integers(1, 24), batch_size=st.integers(1, 30), epoch=st.integers(0, 5), seed=st.integers(0, 5))
def test_an_epoch_holds_every_example_once(set_folder: Path, size: int, batch_size: int, epoch: int, seed: int) -> None:
    data = open_set(set_folder, "train")
    index = np.random.default_rng(seed).permutation(24)[:size]
    found = batches(data, index, batch_size=batch_size, epoch=epoch, seed=seed)
    assert len(found) == manifold_set.steps_per_epoch(size, batch_size)
    assert sorted(chain(*ids(found))) == sorted(data.id[i] for i in index)
    sizes = [len(batch) for batch in found]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1, "no short last batch"


@given(workers=st.integers(1, 8), size=st.integers(3, 24), batch_size=st.integers(4, 12), first_step=st.integers(0, 2))
@example(workers=8, size=3, batch_size=4, first_step=0)
def test_workers_share_the_batches_of_one(set_folder: Path, workers: int, size: int, batch_size: int, first_step: int) -> None:
    data, index = open_set(set_folder, "train"), np.arange(size)
    whole = ids(batches(data, index, batch_size=batch_size))
    parts = [ids(batches(data, index, batch_size=batch_size, rank=r, world_size=workers)) for r in range(workers)]
    for step, expected in enumerate(whole):
        mine = [part[step] for part in parts]
        assert len({len(ids) for ids in mine}) == 1, "DDP needs equal parts"
        together = Counter(chain(*mine))
        extra = together - Counter(expected)
        assert Counter(expected) <= together
        assert extra.total() == -len(expected) % workers
        assert min(len(ids) for ids in mine) >= 1, "of no image there is no loss"
    often = Counter(chain(*chain(*parts))).values()
    assert max(often) - min(often) <= 1, "no example weighs much more than another"
    for r, part in enumerate(parts):
        again = batches(data, index, batch_size=batch_size, rank=r, world_size=workers, first_step=first_step)
        assert ids(again) == part[first_step:], "what is left of an epoch is what would have come"


def test_order_changes_by_epoch_and_repeats_by_seed(set_folder: Path) -> None:
    data, index = open_set(set_folder, "train"), np.arange(24)
    assert ids(batches(data, index)) == ids(batches(data, index))
    assert ids(batches(data, index, epoch=1)) != ids(batches(data, index))
    assert ids(batches(data, index, seed=1)) != ids(batches(data, index))


def test_a_batch_keeps_images_labels_and_codes_together(set_folder: Path) -> None:
    data = open_set(set_folder, "train")
    rows = {r["id"]: r for r in rows_of(set_folder)}
    for batch in batches(data, np.arange(24)):
        assert batch.w_BLD is not None
        for i, x, y, w in zip(batch.id, batch.x_BCHW, batch.y_B, batch.w_BLD, strict=True):
            assert y == rows[i]["label"]
            np.testing.assert_array_equal(w.flatten(), np.array(rows[i]["w"], np.float32))
            np.testing.assert_array_equal((x * 255).round(), pixels_of(rows[i]["on_manifold"]))
