"""Threats: they stay inside their budgets whatever the gradient, and render what their papers say."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmat_ray import threats
from dmat_ray.config import FogThreat, ImageThreat, LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import ball_norm, project_ball, random_in_ball, steepest
from dmat_ray.threats.weather import diamond_square, num_fog_values
from dmat_ray.types import Batch

SETTINGS = {
    "image linf": ImageThreat(norm="linf", eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.5),
    "latent linf": LatentThreat(norm="linf", eps=0.3),
    "latent l2": LatentThreat(norm="l2", eps=2.0),
    "latent std": LatentThreat(norm="linf", eps=0.5, scale="std"),
    "fog": FogThreat(eps=0.5),
}
SCALES = [0.0, 1e-20, 1e-3, 1.0, 1e8]


def random_images(rng: torch.Generator, count: int, channels: int, height: int, width: int) -> Tensor:
    """Images with many pixels at 0 and at 1, where clipping matters."""
    return (torch.rand(count, channels, height, width, generator=rng) * 2 - 0.5).clamp(0, 1)


def norm_of(theta: Tensor, norm: str) -> np.ndarray:
    flat = theta.flatten(1).double().numpy()
    return np.abs(flat).max(axis=1) if norm == "linf" else np.linalg.norm(flat, axis=1)


def require_inside(settings: threats.ThreatSettings, threat: Any, batch: Batch, theta: Tensor) -> None:
    """The budget, measured here and not by the threat."""
    x = threat.render(batch, theta)
    assert x.shape == batch.x_BCHW.shape
    assert x.min() >= 0
    assert x.max() <= 1
    if isinstance(settings, FogThreat):
        assert theta.min() >= 0
        assert theta.max() <= 1
    else:
        moved = x - batch.x_BCHW if isinstance(settings, ImageThreat) else theta
        assert norm_of(moved, settings.norm).max() <= settings.eps * (1 + 1e-5) + 1e-6
    assert (threat.distance(batch, theta) <= threat.limit * (1 + 1e-5) + 1e-6).all()


def walk_inside(
    settings: Any, threat: Any, batch: Batch, seed: int, steps: list[tuple[float, float]], rng: torch.Generator
) -> None:
    """Steps along random gradients, from both starts, never leave the budget."""
    for draws in (None, Draws(seed, batch.id, "test")):
        theta = threat.start(batch, draws)
        require_inside(settings, threat, batch, theta)
        for scale, step_size in steps:
            theta = threat.ascend(batch, theta, scale * torch.randn(theta.shape, generator=rng), step_size)
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


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "fog"])
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


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_of_render_is_its_slope(make_generator: Any, name: str) -> None:
    """Directional derivatives against central differences, at points where nothing is clipped."""
    generator = make_generator().double()
    for layer in generator.synth.images:
        layer.conv.weight *= 0.5
    rng = torch.Generator().manual_seed(1)
    w = generator.mapping(torch.randn(3, 8, generator=rng, dtype=torch.float64))
    x = generator.synthesis(w)
    assert x.min() > 0.05
    assert x.max() < 0.95
    batch = Batch(["a", "b", "c"], x, torch.zeros(3, dtype=torch.int64), w)
    threat = threats.build(SETTINGS[name].model_copy(update={"eps": 0.04}), generator)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double().requires_grad_(True)
    weights = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((threat.render(batch, theta) * weights).sum(), theta)
    assert gradient.abs().max() > 1e-3
    for _ in range(5):
        direction, h = torch.randn(theta.shape, generator=rng, dtype=torch.float64), 1e-6
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


def slow_diamond_square(theta: list[float], size: int, decay: float) -> np.ndarray:
    """The algorithm point by point on a torus of `size`, corners first, as text books have it."""
    grid = np.zeros((size, size))
    numbers, step, wibble = iter(theta), size, 1.0
    while step > 1:
        half, places = step // 2, range(0, size, step)
        noise = {(kind, r, c): (next(numbers) * 2 - 1) * wibble for kind in range(3) for r in places for c in places}

        def at(r: int, c: int) -> float:
            return grid[r % size, c % size]

        for r in places:
            for c in places:
                corners = at(r, c) + at(r + step, c) + at(r, c + step) + at(r + step, c + step)
                grid[r + half, c + half] = corners / 4 + noise[0, r, c]
        for r in places:
            for c in places:
                row = at(r, c) + at(r, c + step) + at(r - half, c + half) + at(r + half, c + half)
                column = at(r, c) + at(r + step, c) + at(r + half, c - half) + at(r + half, c + half)
                grid[r, c + half] = row / 4 + noise[1, r, c]
                grid[r + half, c] = column / 4 + noise[2, r, c]
        step, wibble = half, wibble / decay
    assert next(numbers, None) is None, "every number is used"
    return (grid - grid.min()) / (grid.max() - grid.min())


@pytest.mark.parametrize("size", [2, 4, 16, 32])
@pytest.mark.parametrize("decay", [1.5, 2.0])
def test_diamond_square_is_the_textbooks(size: int, decay: float) -> None:
    theta = torch.rand(3, num_fog_values(size), generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = diamond_square(theta, size, decay)
    for row, numbers in zip(found, theta, strict=True):
        np.testing.assert_allclose(row[0].numpy(), slow_diamond_square(numbers.tolist(), size, decay), atol=1e-12)


def test_fog_is_laid_over_the_image() -> None:
    """(x + eps fog) / (brightest of the channel + eps), the fog cropped from the middle of the next power of two."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 12, generator=rng, dtype=torch.float64)
    batch = Batch(["a", "b"], x, torch.zeros(2, dtype=torch.int64))
    fog = threats.build(FogThreat(eps=0.5, wibble_decay=1.7), None)
    theta = fog.start(batch, Draws(0, batch.id, "test"))
    assert theta.shape == (2, num_fog_values(16))
    for i, (image, found) in enumerate(zip(x.numpy(), fog.render(batch, theta).numpy(), strict=True)):
        cloud = slow_diamond_square(theta[i].tolist(), 16, 1.7)[4:12, 2:14]
        np.testing.assert_allclose(found, (image + 0.5 * cloud) / (image.max(axis=(1, 2), keepdims=True) + 0.5), atol=1e-9)


@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 10), scale=st.floats(0.01, 100))
def test_projection_is_the_closest_point(seed: int, eps: float, scale: float) -> None:
    theta = scale * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    box = project_ball(theta, "linf", eps)
    np.testing.assert_array_equal(box.numpy(), np.clip(theta.numpy(), -eps, eps))
    for before, after in zip(theta.flatten(1).numpy(), project_ball(theta, "l2", eps).flatten(1).numpy(), strict=True):
        size = np.linalg.norm(before)
        if size <= eps:
            np.testing.assert_allclose(after, before)
        else:
            assert np.linalg.norm(after) == pytest.approx(eps)
            np.testing.assert_allclose(after / eps, before / size, atol=1e-9)


@given(seed=st.integers(0, 10**6))
def test_steepest_reaches_the_dual_norm(seed: int) -> None:
    """The largest <g, s> over the unit ball is the L1 norm of g for L-infinity and its L2 norm for L2."""
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for norm, order in (("linf", 1), ("l2", 2)):
        step = steepest(gradient, norm)
        reached = (gradient * step).flatten(1).sum(dim=1)
        np.testing.assert_allclose(reached, np.linalg.norm(gradient.flatten(1).numpy(), ord=order, axis=1))
        np.testing.assert_allclose(ball_norm(step, norm), 1.0)


def test_a_zero_gradient_is_no_step() -> None:
    zero = torch.zeros(2, 1, 4, 4)
    for norm in ("linf", "l2"):
        assert torch.equal(steepest(zero, norm), zero)
        assert torch.equal(project_ball(zero, norm, 0.5), zero)


def test_random_points_are_uniform_in_the_ball() -> None:
    like = torch.empty(1500, 1, 2, 2)
    draws = Draws(0, [f"example-{i}" for i in range(1500)], "test")
    box = random_in_ball(draws, like, "linf").numpy()
    assert scipy.stats.kstest((box.ravel() + 1) / 2, "uniform").pvalue > 0.01
    ball = random_in_ball(draws, like, "l2").flatten(1).numpy()
    # in four dimensions the share of the ball within r is r^4
    assert scipy.stats.kstest(np.linalg.norm(ball, axis=1) ** 4, "uniform").pvalue > 0.01
    assert np.abs(ball.mean(axis=0)).max() < 0.05
