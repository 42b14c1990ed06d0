"""All threats stay inside their budgets whatever the gradient, start alike in any batch, and have their slope as gradient."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmat_ray import threats
from dmat_ray.config import (
    ElasticThreat,
    FilterThreat,
    FogThreat,
    GaborThreat,
    GlitchThreat,
    ImageThreat,
    JointThreat,
    JpegThreat,
    KaleidoscopeThreat,
    LatentThreat,
    PixelThreat,
    RecolorThreat,
    SnowThreat,
    StAdvThreat,
    ThreatSettings,
    WoodThreat,
)
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.types import Batch

SETTINGS = {
    "image linf": ImageThreat(norm="linf", eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.5),
    "latent linf": LatentThreat(norm="linf", eps=0.3),
    "latent l2": LatentThreat(norm="l2", eps=2.0),
    "latent std": LatentThreat(norm="linf", eps=0.5, scale="std"),
    "image l1": ImageThreat(norm="l1", eps=6.0),
    "joint latent": JointThreat(eps=0.1, latent_eps=0.3, scale="std"),
    "fog": FogThreat(eps=0.5),
    "snow": SnowThreat(eps=0.3),
    "gabor": GaborThreat(eps=0.2),
    "wood": WoodThreat(eps=0.1),
    "kaleidoscope": KaleidoscopeThreat(eps=0.2, shapes=5, size=0.3, outline=0.1),
    "pixel": PixelThreat(norm="linf", eps=0.5),
    "pixel l2": PixelThreat(eps=1.0),
    "elastic": ElasticThreat(eps=2.0),
    "stadv": StAdvThreat(eps=0.1),
    "glitch": GlitchThreat(eps=0.2),
    "jpeg": JpegThreat(eps=0.5),
    "jpeg l2": JpegThreat(norm="l2", eps=3.0),
    "jpeg l1": JpegThreat(norm="l1", eps=20.0),
    "recolor": RecolorThreat(grid=(4, 5, 6)),
    "filter": FilterThreat(eps=0.2),
    "filter mix": FilterThreat(eps=0.2, size=5, mix=True),
}
# without a random start these show their pattern, and are no identity
PATTERNS = ("fog", "snow", "gabor", "wood", "kaleidoscope")
SCALES = [0.0, 1e-20, 1e-3, 1.0, 1e8]


def random_images(rng: torch.Generator, count: int, channels: int, height: int, width: int) -> Tensor:
    """Images with many pixels at 0 and at 1, where clipping matters."""
    return (torch.rand(count, channels, height, width, generator=rng) * 2 - 0.5).clamp(0, 1)


def norm_of(theta: Tensor, norm: str) -> np.ndarray:
    flat = theta.flatten(1).double().numpy()
    return np.linalg.norm(flat, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


def flakes_of(theta: Tensor, x: Tensor) -> np.ndarray:
    """Of snow: intensities (B, layers, rows, columns)."""
    rows, columns = math.ceil(x.shape[2] / 4), math.ceil(x.shape[3] / 4)
    return theta[:, : 7 * rows * columns].double().numpy().reshape(len(x), 7, rows, columns)


def searched(name: str, theta: Tensor, x: Tensor) -> Tensor:
    """1 for what the attack searches, 0 for what was drawn once and for all."""
    mask = torch.ones_like(theta)
    if name == "snow":
        mask[:, flakes_of(theta, x)[0].size :] = 0
    if name == "gabor":
        mask[:, x[0, 0].numel() :] = 0
    if name == "kaleidoscope":
        mask[:, -7 * 5 :] = 0
    return mask


def require_inside(settings: ThreatSettings, threat: Any, batch: Batch, theta: Tensor) -> None:
    """The budget, measured here and not by the threat."""
    x = threat.render(batch, theta)
    assert x.shape == batch.x_BCHW.shape
    assert x.min() >= 0
    assert x.max() <= 1
    if isinstance(settings, FogThreat | SnowThreat | GaborThreat | PixelThreat):
        assert theta.min() >= 0
        assert theta.max() <= 1
    if isinstance(settings, SnowThreat):
        for layer in flakes_of(theta, batch.x_BCHW).reshape(-1, *flakes_of(theta, batch.x_BCHW).shape[2:]):
            for r, c in itertools.product(range(0, layer.shape[0], 8), range(0, layer.shape[1], 8)):
                assert layer[r : r + 8, c : c + 8].mean() <= settings.budget * (1 + 1e-5)
    elif isinstance(settings, JointThreat | KaleidoscopeThreat):
        assert theta.abs().max() <= 1
        if isinstance(settings, JointThreat):
            move, delta = np.split(theta.numpy(), [batch.w_BLD[0].numel()], axis=1)  # type: ignore[index]
            codes = batch.w_BLD + torch.from_numpy(move).view_as(batch.w_BLD) * 0.3 * threat.generator.w_std  # type: ignore[operator, arg-type]
            on_manifold = threat.generator.synthesis(codes)
            assert (x - on_manifold).abs().max() <= settings.eps + 1e-6
            assert np.abs(delta).max() <= 1
    elif not isinstance(settings, FogThreat | GaborThreat):
        moved = x - batch.x_BCHW if isinstance(settings, ImageThreat) else theta
        assert norm_of(moved, getattr(settings, "norm", "linf")).max() <= settings.eps * (1 + 1e-5) + 1e-6
    assert (threat.distance(batch, theta) <= threat.limit * (1 + 1e-5) + 1e-6).all()


def walk_inside(
    settings: Any, threat: Any, batch: Batch, seed: int, steps: list[tuple[float, float]], rng: torch.Generator
) -> None:
    """Steps along random gradients, from both starts, never leave the budget."""
    for draws in (None, Draws(seed, batch.id, "test")):
        theta = threat.start(batch, draws)
        require_inside(settings, threat, batch, theta)
        for scale, step_size in steps:
            gradient = scale * torch.randn(theta.shape, generator=rng)
            theta = threat.project(batch, theta + step_size * threat.direction(batch, theta, gradient))
            require_inside(settings, threat, batch, theta)


@pytest.mark.parametrize("name", [n for n in SETTINGS if "latent" not in n])
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(16, 40), st.integers(16, 40)),
    channels=st.sampled_from([1, 3]),
    steps=st.lists(st.tuples(st.sampled_from(SCALES), st.floats(1e-4, 3)), min_size=1, max_size=4),
)
def test_pixel_threats_stay_in_budget(
    name: str, seed: int, size: tuple[int, int], channels: int, steps: list[tuple[float, float]]
) -> None:
    settings, rng = SETTINGS[name], torch.Generator().manual_seed(seed)
    threat = threats.build(settings, None)
    batch = Batch(["a", "b"], random_images(rng, 2, channels, *size), torch.zeros(2, dtype=torch.int64))
    walk_inside(settings, threat, batch, seed, steps, rng)


@pytest.mark.parametrize("name", [n for n in SETTINGS if "latent" in n])
@given(seed=st.integers(0, 10**6), steps=st.lists(st.tuples(st.sampled_from(SCALES), st.floats(1e-4, 3)), min_size=1, max_size=4))
def test_latent_threats_stay_in_budget(generator: StyleGAN2, name: str, seed: int, steps: list[tuple[float, float]]) -> None:
    settings, rng = SETTINGS[name], torch.Generator().manual_seed(seed)
    threat = threats.build(settings, generator)
    w = generator.mapping(torch.randn(2, 8, generator=rng))
    batch = Batch(["a", "b"], generator.synthesis(w), torch.zeros(2, dtype=torch.int64), w)
    walk_inside(settings, threat, batch, seed, steps, rng)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in PATTERNS])
def test_no_draws_start_at_no_change(generator: StyleGAN2, make_batch: Any, name: str) -> None:
    batch = make_batch()
    threat = threats.build(SETTINGS[name], generator)
    torch.testing.assert_close(threat.render(batch, threat.start(batch, None)), batch.x_BCHW, atol=1e-6, rtol=0)


def test_latent_render_is_the_generator(generator: StyleGAN2, make_batch: Any) -> None:
    batch = make_batch()
    theta = 0.3 * torch.randn(batch.w_BLD.shape, generator=torch.Generator().manual_seed(0))
    raw = threats.build(LatentThreat(eps=1), generator).render(batch, theta)
    scaled = threats.build(LatentThreat(eps=1, scale="std"), generator).render(batch, theta)
    torch.testing.assert_close(raw, generator.synthesis(batch.w_BLD + theta))
    torch.testing.assert_close(scaled, generator.synthesis(batch.w_BLD + theta * generator.w_std))
    assert not torch.allclose(raw, scaled)


def test_latent_threats_need_w_and_a_generator(generator: StyleGAN2, make_batch: Any) -> None:
    natural = dataclasses.replace(make_batch(), w_BLD=None)
    with pytest.raises(UserError, match="latent attack needs w"):
        threats.build(LatentThreat(), generator).start(natural, None)
    with pytest.raises(UserError, match=r"needs a generator; set generator\.path"):
        threats.build(LatentThreat(), None)


@pytest.mark.parametrize("name", SETTINGS)
def test_starts_do_not_depend_on_the_cut_of_the_batch(generator: StyleGAN2, make_batch: Any, name: str) -> None:
    batch = make_batch(6)
    threat = threats.build(SETTINGS[name], generator)
    whole = threat.start(batch, Draws(4, batch.id, "train/3"))
    for index in ([0], [5, 2], [1, 3, 4]):
        part = Batch([batch.id[i] for i in index], batch.x_BCHW[index], batch.y_B[index], batch.w_BLD[index])
        assert torch.equal(threat.start(part, Draws(4, part.id, "train/3")), whole[index])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6
    for other in (Draws(5, batch.id, "train/3"), Draws(4, batch.id, "train/4")):
        assert not torch.equal(threat.start(batch, other), whole)


def test_the_docs_name_the_threats_that_change_images_at_no_eps(make_generator: Any) -> None:
    """Their curves over eps do not begin at the accuracy on clean images."""
    generator = make_generator(32, 3)
    rng = torch.Generator().manual_seed(2)
    w = generator.mapping(torch.randn(2, 8, generator=rng))
    batch = Batch(["a", "b"], generator.synthesis(w), torch.zeros(2, dtype=torch.int64), w)
    changing = set()
    for settings in SETTINGS.values():
        threat = threats.build(settings.model_copy(update={"eps": 0.0}), generator)
        theta = threat.project(batch, threat.start(batch, Draws(0, batch.id, "test")))
        if (threat.render(batch, theta) - batch.x_BCHW).abs().max() > 1e-3:
            changing.add(settings.threat)
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (said,) = re.findall(r"Those of ([^.]*?)\s+do not begin at the accuracy on clean images", text)
    assert set(re.findall("`([^`]+)`", said)) == changing


# of Gabor noise it is the published one, see test_published_attacks.py
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "gabor"])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_of_render_is_its_slope(make_generator: Any, name: str, channels: int) -> None:
    """Directional derivatives against central differences, at points where nothing is clipped."""
    generator = make_generator(16, channels).double()
    for layer in generator.synth.images:
        layer.conv.weight *= 0.5 / channels
    rng = torch.Generator().manual_seed(1)
    w = generator.mapping(torch.randn(3, 8, generator=rng, dtype=torch.float64))
    x = generator.synthesis(w)
    assert x.min() > 0.05
    assert x.max() < 0.95
    batch = Batch(["a", "b", "c"], x, torch.zeros(3, dtype=torch.int64), w)
    threat = threats.build(SETTINGS[name].model_copy(update={"eps": 0.04, "latent_eps": 0.04}), generator)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double().requires_grad_(True)
    weights = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((threat.render(batch, theta) * weights).sum(), theta)
    assert gradient.abs().max() > 1e-3
    mask = searched(name, theta.detach(), x)
    assert (gradient[mask == 0] == 0).all()
    for _ in range(5):
        # wood turns within a thousandth of its range
        direction, h = mask * torch.randn(theta.shape, generator=rng, dtype=torch.float64), 1e-8 if name == "wood" else 1e-6
        with torch.no_grad():
            up, down = (threat.render(batch, theta + s * h * direction) for s in (1, -1))
        measured = ((up - down) * weights).sum().item() / (2 * h)
        assert (gradient * direction).sum().item() == pytest.approx(measured, rel=1e-5, abs=1e-7)


def test_rounding_does_not_cost_a_pixel_its_gradient() -> None:
    """x + delta may be 1 + 6e-8 at the border of the range; the next step must still be able to move it."""
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(["a", "b"], x, torch.zeros(2, dtype=torch.int64))
    theta = (torch.nextafter(torch.ones_like(x), torch.tensor(2.0)) - x).requires_grad_(True)
    assert (x + theta > 1).any()
    rendered = threats.build(ImageThreat(eps=1.0), None).render(batch, theta)
    assert rendered.max() <= 1
    (gradient,) = torch.autograd.grad(rendered.sum(), theta)
    assert torch.equal(gradient, torch.ones_like(x))
