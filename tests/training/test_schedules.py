"""Learning rates against numpy and PyTorch's own schedulers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from dmat_ray.config import TrainingConfig
from dmat_ray.training.schedules import learning_rate


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=6), seed=st.integers(0, 100), epoch=st.floats(-1, 30))
def test_piecewise_is_numpys_interpolation(values: list[float], seed: int, epoch: float) -> None:
    knots = np.cumsum(np.random.default_rng(seed).uniform(0.1, 5, len(values)))
    config = TrainingConfig(lr_epochs=tuple(knots), lr_values=tuple(values))
    assert learning_rate(config, epoch) == pytest.approx(np.interp(epoch, knots, values))


def test_piecewise_on_the_published_knots() -> None:
    """[0,1,6,12,15,20] -> [0,.4,.04,.004,.0004,.0001], worked out by hand between them."""
    points = {0: 0, 0.5: 0.2, 1: 0.4, 3.5: 0.22, 6: 0.04, 9: 0.022, 12: 0.004, 13.5: 0.0022, 15: 4e-4, 17.5: 2.5e-4, 20: 1e-4}
    assert {epoch: learning_rate(TrainingConfig(), epoch) for epoch in points} == pytest.approx(points)


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The rate of each step, and after the last."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return [*found, scheduler.get_last_lr()[0]]


def sgd(lr: float) -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("warmup", [0, 2])
def test_cosine_is_torchs(warmup: int) -> None:
    epochs, steps = 10, 20  # of an epoch
    optimizer = sgd(0.3)
    expected: LRScheduler = CosineAnnealingLR(optimizer, (epochs - warmup) * steps)
    if warmup:
        rise = LinearLR(optimizer, start_factor=1e-8, total_iters=warmup * steps)
        expected = SequentialLR(optimizer, [rise, expected], [warmup * steps])
    config = TrainingConfig(schedule="cosine", lr=0.3, lr_warmup=warmup, epochs=epochs)
    found = [learning_rate(config, i / steps) for i in range(epochs * steps + 1)]
    assert found == pytest.approx(rates(expected, epochs * steps), abs=1e-7)


def test_one_cycle_is_torchs() -> None:
    epochs, steps = 10, 30
    # torch counts its last step as the end, and its peak one step earlier for it
    expected = rates(
        OneCycleLR(
            sgd(0.1), max_lr=0.3, total_steps=epochs * steps + 1, pct_start=(0.3 * epochs * steps + 1) / (epochs * steps + 1)
        ),
        epochs * steps,
    )
    config = TrainingConfig(schedule="one_cycle", lr=0.3, epochs=epochs)
    assert [learning_rate(config, i / steps) for i in range(epochs * steps + 1)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_beyond_the_last_epoch_nothing_rises_again(schedule: str) -> None:
    config = TrainingConfig.model_validate({"schedule": schedule, "epochs": 4})
    assert learning_rate(config, 5) == learning_rate(config, 4) < 1e-5


def test_what_cannot_be_a_schedule() -> None:
    with pytest.raises(ValidationError, match="lr_warmup 20 leaves nothing of 20 epochs"):
        TrainingConfig(schedule="cosine", lr_warmup=20)
    for needs in ({"keep": "best"}, {"patience": 3}):
        with pytest.raises(ValidationError, match="needs val_examples"):
            TrainingConfig.model_validate(needs)
