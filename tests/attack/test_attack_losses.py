"""The losses that attacks raise, by their formulas, and the classes that they aim at."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from attacks import images, plain_dlr
from torch import nn

from dmat_ray import threats
from dmat_ray.attack import attack, cross_entropy, dlr, kl_to, targeted_dlr
from dmat_ray.config import ImageRow
from dmat_ray.errors import UserError


def test_the_cross_entropy_that_is_raised_does_not_round_to_zero() -> None:
    """Against the library's in double precision; its own in single precision is zero from a margin of 17 on."""
    margins = torch.tensor([-30.0, 0.0, 10.0, 20.0, 40.0, 80.0])
    logits = torch.stack([margins, torch.zeros(6), torch.full((6,), -1.0)], dim=1).requires_grad_(True)
    loss = cross_entropy(torch.zeros(6, dtype=torch.int64))(logits)
    exact = logits.detach().double().requires_grad_(True)
    expected = F.softplus(exact[:, 1:].logsumexp(dim=1) - exact[:, 0])
    direct = F.cross_entropy(exact, torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(expected[:4], direct[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (slope,), (wanted,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-5, atol=0)
    assert (loss.diff() < 0).all()


def test_kl_is_the_relative_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, moved = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    expected = scipy.stats.entropy(clean.softmax(1).numpy(), moved.softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(kl_to(clean)(moved).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_to(clean)(clean).numpy(), 0, atol=1e-6)


def test_dlr_is_its_formula_and_knows_no_scale(small_net: nn.Module) -> None:
    logits = 3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, target = torch.arange(20) % 5, (torch.arange(20) + 1) % 5
    wanted = torch.stack([plain_dlr(logits[i : i + 1], y[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(dlr(y)(logits), wanted)
    torch.testing.assert_close(dlr(y)(1000 * logits), wanted)
    ranked = logits.sort(dim=1, descending=True).values
    margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, target[:, None])[:, 0]
    towards = -margin / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2)
    torch.testing.assert_close(targeted_dlr(y, target)(logits), towards)
    for make, classes in ((dlr(y), 2), (targeted_dlr(y, target), 3)):
        with pytest.raises(UserError, match=f"{classes + 1} classes or more, here are {classes}"):
            make(logits[:, :classes])


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_targets_are_the_likeliest_others(small_net: nn.Module, loss: Any) -> None:
    """One search towards each, and each example keeps one that breaks it."""
    network, batch = small_net.eval(), images(24)
    row = ImageRow(name="T", eps=0.06, steps=5, loss=loss, random_start=False)
    every = row.model_copy(update={"targets": 3})
    with torch.no_grad():
        order = network(batch.x_BCHW).scatter(1, batch.y_B[:, None], -torch.inf).argsort(dim=1, descending=True)
    broken = torch.zeros(24, dtype=torch.bool)
    for k in range(3):
        make = targeted_dlr(batch.y_B, order[:, k])
        towards = make if loss == "dlr" else lambda out, t=order[:, k]: -F.cross_entropy(out, t, reduction="none")
        broken |= attack(network, threats.build(row, None), batch, row, seed=0, purpose="test", loss=towards).broken_B
    found = attack(network, threats.build(row, None), batch, every, seed=0, purpose="test")
    assert torch.equal(found.broken_B, broken)
    assert 0 < broken.sum() < 24
    with torch.no_grad():
        assert torch.equal(network(found.x_BCHW).argmax(dim=1) != batch.y_B, broken)
    more = attack(network, threats.build(row, None), batch, row.model_copy(update={"targets": 9}), seed=0, purpose="test")
    assert torch.equal(more.x_BCHW, found.x_BCHW), "as many as there are others"
