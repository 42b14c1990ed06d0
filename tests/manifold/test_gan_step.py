"""Single steps of a generator's training: the weights of losses, what adapts augmentation, what is reported, and the rates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmat_ray.config import GanConfig
from dmat_ray.local import LocalContext
from dmat_ray.manifold import gan, gan_step
from dmat_ray.manifold.gan_step import GanTraining

SHAPE = {"resolution": 8, "z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8, "num_classes": 3}
IMAGES, LABELS = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def training(tmp_path: Path, **values: Any) -> GanTraining:
    """Of fifty steps."""
    quality = {"network": "none", "samples": 60}
    short = {"batch_size": 8, "kimg": 0.4, "report_kimg": 0.04, "snapshot_kimg": 0.08, "quality": quality}
    return GanTraining(GanConfig.model_validate({"architecture": SHAPE, **short, **values}), LocalContext(tmp_path))


def test_other_seeds_begin_with_other_weights(tmp_path: Path) -> None:
    first, again, other = (training(tmp_path, seed=seed) for seed in (0, 0, 1))
    for name in ("generator", "discriminator"):
        weights, same, others = (list(getattr(one, name).parameters()) for one in (first, again, other))
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_lazy_penalties_weigh_as_many_steps_as_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan, "r1_penalty", lambda *_: torch.tensor(1.0))
    totals = {}
    for gamma in (0.0, 3.0):
        one, seen = training(tmp_path, r1_gamma=gamma, r1_interval=4, mode_seeking=0.0), list[float]()
        monkeypatch.setattr(one, "_update", lambda optimizer, model, loss, seen=seen: seen.append(float(loss)))
        for i in (3, 4):
            one.step(i, IMAGES, LABELS)
        totals[gamma] = seen
    more = [b - a for a, b in zip(totals[0.0], totals[3.0], strict=True)]
    assert more == pytest.approx([0, 0, 0, 3.0 / 2 * 4], abs=1e-5)


def test_augmentation_is_adapted_by_the_signs_of_the_last_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []

    def noted(probability: float, sign: float, target: float, kimg: float, ada_kimg: float) -> float:
        told.append((sign, kimg))
        return 0.0

    monkeypatch.setattr(gan_step, "adapted", noted)
    one, counted = training(tmp_path, augment=0.0, ada_target=0.6), []
    for i in range(1, 9):
        before = one.sums.clone()
        one.step(i, IMAGES, LABELS)
        counted.append(float((one.sums - before)[2]))
    assert told == [(pytest.approx(np.mean(part), abs=1e-5), pytest.approx(0.032)) for part in (counted[:4], counted[4:])]


def test_losses_are_means_since_the_last_report(tmp_path: Path) -> None:
    one = training(tmp_path)
    one.sums = torch.tensor([2.0, 4.0, 1.0, 2.0])
    first = one.losses()
    one.sums += torch.tensor([9.0, 3.0, 0.0, 3.0])
    reports = [[found[name] for name in ("loss_g", "loss_d", "real_sign")] for found in (first, one.losses())]
    assert reports == [[1.0, 2.0, 0.5], [3.0, 1.0, 0.0]]


def test_both_rates_fall_together(tmp_path: Path) -> None:
    """Over the last half of fifty steps: before the 46th a fifth of that is ahead."""
    one = training(tmp_path, fade=0.5, lr_generator=0.01, lr_discriminator=0.02)
    one.step(46, IMAGES, LABELS)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (one.opt_g, one.opt_d)]
    assert rates == pytest.approx([0.01 * 0.2, 0.02 * 0.2])
