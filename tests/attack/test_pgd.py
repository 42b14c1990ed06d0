"""Projected gradient descent: equal to a peer's and to published loops, and optimal where the optimum is known."""

import math
from typing import Any

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks import THREATS, find, images
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack.search import step_size_of
from dmat_ray.config import AttackConfig, FogThreat, ImageThreat
from dmat_ray.types import Batch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("norm", "eps", "step", "peer"),
    [("linf", 0.1, 0.02, foolbox.attacks.LinfPGD), ("l2", 1.0, 0.2, foolbox.attacks.L2PGD)],
)
def test_pgd_is_that_of_foolbox(
    small_net: nn.Module, norm: Any, eps: float, step: float, peer: Any, dtype: torch.dtype, tolerance: float
) -> None:
    network, batch = small_net.eval().to(dtype), images()
    batch = Batch(batch.id, batch.x_BCHW.to(dtype), batch.y_B)
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    theirs, _, _ = peer(random_start=False, abs_stepsize=step, steps=20)(model, batch.x_BCHW, batch.y_B, epsilons=eps)
    ours = find(network, batch, ImageThreat(norm=norm, eps=eps), steps=20, step_size=step, random_start=False)
    torch.testing.assert_close(ours.x_BCHW, theirs, atol=tolerance, rtol=0)
    assert (theirs - batch.x_BCHW).abs().flatten(1).amax(dim=1).min() > 0.05


def test_fgsm_is_one_signed_step(small_net: nn.Module) -> None:
    batch = images()
    x = batch.x_BCHW.clone().requires_grad_(True)
    F.cross_entropy(small_net.eval()(x), batch.y_B, reduction="sum").backward()
    assert x.grad is not None
    expected = (batch.x_BCHW + 0.1 * x.grad.sign()).clamp(0, 1)
    found = find(small_net, batch, THREATS["image linf"], steps=1, step_size=0.1, random_start=False)
    torch.testing.assert_close(found.x_BCHW, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.loss_B, F.cross_entropy(small_net(expected), batch.y_B, reduction="none"))


class Linear(nn.Module):
    """Two classes: logits (0, w x + b)."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.w, self.b = torch.randn(64, generator=rng), 0.3

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_a_linear_classifier_is_attacked_to_its_optimum(norm: Any, random_start: bool) -> None:
    """Worst loss log(1 + exp(-(margin - eps |w|_dual))); on the way there more steps are never worse."""
    network, batch = Linear(), images(spread=0.4)
    batch = Batch(batch.id, batch.x_BCHW, batch.y_B % 2)
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    sign = (batch.y_B * 2 - 1).numpy()
    margin = sign * (batch.x_BCHW.flatten(1).numpy() @ network.w.numpy() + network.b)
    dual = np.linalg.norm(network.w.numpy(), ord=1 if norm == "linf" else 2)
    optimum = np.logaddexp(0, -(margin - eps * dual))
    losses = []
    for steps in (1, 2, 4, 8, 16, 64):
        how = {"steps": steps, "step_size": eps / 4, "random_start": random_start}
        losses.append(find(network, batch, ImageThreat(norm=norm, eps=eps), **how).loss_B.numpy())
        assert (losses[-1] <= optimum + 1e-4).all()
    assert (np.diff([loss.mean() for loss in losses]) >= -1e-6).all()
    np.testing.assert_allclose(losses[-1], optimum, rtol=1e-3, atol=1e-5)


def test_the_optimum_at_the_border_of_the_pixel_range() -> None:
    network, batch = Linear(), images()
    batch = Batch(batch.id, batch.x_BCHW, batch.y_B % 2)
    x, sign = batch.x_BCHW.flatten(1).numpy(), (batch.y_B * 2 - 1).numpy()
    best = np.clip(x - 0.1 * sign[:, None] * np.sign(network.w.numpy()), 0, 1)
    optimum = np.logaddexp(0, -sign * (best @ network.w.numpy() + network.b))
    found = find(network, batch, ImageThreat(eps=0.1), steps=8, step_size=0.05)
    np.testing.assert_allclose(found.loss_B.numpy(), optimum, rtol=1e-4, atol=1e-5)


def test_default_steps() -> None:
    """2.5 eps / steps; fog's sqrt(0.001 / steps), but never too short to cross its box 2.5 times."""
    ball, fog = threats.build(ImageThreat(eps=0.1), None), threats.build(FogThreat(eps=0.1), None)
    assert step_size_of(AttackConfig(steps=5), ball) == pytest.approx(0.05)
    assert step_size_of(AttackConfig(steps=5, step_size=0.3), ball) == 0.3
    assert step_size_of(AttackConfig(steps=200), fog) == pytest.approx(2.5 / 200)
    assert step_size_of(AttackConfig(steps=10_000), fog) == pytest.approx(math.sqrt(0.001 / 10_000))


def plain_momentum(network: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """MI-FGSM of one image, as its paper has it (the sign does not care for the scale of the gradient's norm)."""
    moved, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), y), moved)
        velocity = velocity + gradient / gradient.abs().sum()
        moved = (moved.detach() + step * velocity.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return moved


def test_momentum_is_the_published_loop(small_net: nn.Module) -> None:
    network, batch = small_net.eval().double(), images()
    batch = Batch(batch.id, batch.x_BCHW.double(), batch.y_B)
    how = {"steps": 10, "step_size": 0.02, "random_start": False}
    found = find(network, batch, ImageThreat(eps=0.1), method="momentum", **how)
    plain = [plain_momentum(network, batch.x_BCHW[i : i + 1], batch.y_B[i : i + 1], 0.1, 0.02, 10) for i in range(len(batch))]
    torch.testing.assert_close(found.x_BCHW, torch.cat(plain), atol=1e-9, rtol=0)
    assert not torch.equal(found.x_BCHW, find(network, batch, ImageThreat(eps=0.1), **how).x_BCHW)
