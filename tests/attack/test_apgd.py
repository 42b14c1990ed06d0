"""Auto-PGD: the paper's algorithm, at the published steps, over every threat."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacks import THREATS, images, plain_dlr
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.attack.search import apgd_checkpoints
from dmat_ray.config import AttackConfig, ImageRow
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.types import Batch


def plain_apgd(network: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, loss: Any) -> Tensor:
    """Algorithm 1 of arXiv 2003.01690 for one image in an L-infinity ball, its lists and indices written out."""

    def project(z: Tensor) -> Tensor:
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    def value(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_(True)
        f = loss(network(z), y)
        (gradient,) = torch.autograd.grad(f.sum(), z)
        return f.item(), gradient

    p, points = [0.0, 0.22], []
    while p[-1] < 1:
        points.append(math.ceil(p[-1] * steps - 1e-9))
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    eta, iterates, values = 2 * eps, [x], [value(x)[0]]
    halved, best_then = [], [values[0]]
    current, previous = x, x
    for k in range(steps):
        if k in points:
            start = ([0, *points])[points.index(k)]
            rises = sum(values[i + 1] > values[i] for i in range(start, k))
            stuck = bool(halved) and not halved[-1] and max(values) == best_then[-1]
            halved.append(rises <= 0.75 * (k - start) or stuck)
            best_then.append(max(values))
            if halved[-1]:
                eta, current = eta / 2, iterates[int(np.argmax(values))]
        z = project(current + eta * value(current)[1].sign())
        alpha = 0.75 if k else 1.0
        following = project(current + alpha * (z - current) + (1 - alpha) * (current - previous))
        previous, current = current, following
        iterates.append(current)
        values.append(value(current)[0])
    return iterates[int(np.argmax(values))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss"), [("ce", lambda out, y: F.cross_entropy(out, y)), ("dlr", plain_dlr)], ids=["ce", "dlr"]
)
def test_apgd_is_the_papers_algorithm(small_net: nn.Module, name: Any, loss: Any) -> None:
    """With 100 steps its checkpoints are the published fractions exactly."""
    network, batch = small_net.eval().double(), images(8)
    batch = Batch(batch.id, batch.x_BCHW.double(), batch.y_B)
    row = ImageRow(name="APGD", eps=0.1, steps=100, method="apgd", loss=name, random_start=False)
    found = attack(network, threats.build(row, None), batch, row, seed=0, purpose="test")
    for i in range(len(batch)):
        x, y = batch.x_BCHW[i : i + 1], batch.y_B[i : i + 1]
        plain = plain_apgd(network, x, y, 0.1, 100, loss)
        torch.testing.assert_close(found.x_BCHW[i : i + 1], plain, atol=1e-7, rtol=0)


def test_apgd_reconsiders_at_the_published_steps() -> None:
    fractions = [0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99]  # p of arXiv 2003.01690
    assert apgd_checkpoints(100) == [round(100 * p) for p in fractions]
    assert apgd_checkpoints(1) == []
    for steps in range(2, 60):
        points = [0, *apgd_checkpoints(steps), steps]
        assert all(b > a for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("name", THREATS)
def test_apgd_attacks_every_threat_and_never_ends_below_its_start(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str
) -> None:
    batch, threat, network = make_batch(8), threats.build(THREATS[name], generator), small_net.eval()
    found = attack(network, threat, batch, AttackConfig(steps=20, method="apgd"), seed=0, purpose="test")
    with torch.no_grad():
        begun = threat.start(batch, Draws(0, batch.id, "test/0"))
        start = F.cross_entropy(network(threat.render(batch, begun)), batch.y_B, reduction="none")
    assert (found.loss_B >= start - 1e-6).all()
    assert (found.loss_B > start).float().mean() > 0.5
