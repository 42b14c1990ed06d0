"""Threats: they stay inside their budgets whatever the gradient, and render what their papers say."""

import colorsys
import dataclasses
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
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
from dmat_ray.threats import jpeg
from dmat_ray.threats.balls import ball_norm, project_ball, project_l1_in_box, random_in_ball, steepest
from dmat_ray.threats.color import luv_to_rgb, rgb_to_luv
from dmat_ray.threats.texture import gabor_kernel, hsv_to_rgb
from dmat_ray.threats.weather import diamond_square, num_fog_values
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


@pytest.mark.parametrize("power", [-140, -80, -45, 0, 100])
def test_a_step_in_l2_is_of_unit_length_however_small_the_gradient(power: int) -> None:
    """That of a network that is very sure has squares below what single precision holds."""
    gradient = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)).clamp(0.5, 2)
    scaled = (gradient.double() * 2.0**power).float()
    assert scaled.min() > 0
    torch.testing.assert_close(steepest(scaled, "l2"), steepest(gradient, "l2"), rtol=1e-2 if power == -140 else 1e-6, atol=0)


def test_a_step_in_l1_goes_to_the_largest_coordinates() -> None:
    gradient = torch.randn(4, 1, 16, 25, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.0, 0.01, 0.5, 1.0])
    for counts, sparse_B in (([4, 4, 4, 4], None), ([1, 4, 200, 400], shares)):  # a hundredth of 400, or as is asked
        for count, step, slope in zip(counts, steepest(gradient, "l1", sparse_B).flatten(1), gradient.flatten(1), strict=True):
            largest = slope.abs().argsort(descending=True)[:count]
            wanted = torch.zeros(400)
            wanted[largest] = slope[largest].sign() / count
            torch.testing.assert_close(step, wanted)


@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 4), boxed=st.booleans())
def test_projection_to_l1_is_the_closest_point(seed: int, eps: float, boxed: bool) -> None:
    """Against a solver of quadratic programs that knows nothing of thresholds: point = plus - minus, both positive."""
    rng = np.random.default_rng(seed)
    point = rng.normal(0, 2, 6)
    low, high = (-rng.uniform(0, 1, 6), rng.uniform(0, 1, 6)) if boxed else (np.full(6, -9.0), np.full(6, 9.0))
    found = project_l1_in_box(*(torch.from_numpy(a)[None] if isinstance(a, np.ndarray) else a for a in (point, eps, low, high)))[
        0
    ]
    solved = scipy.optimize.minimize(
        lambda z: ((z[:6] - z[6:] - point) ** 2).sum(),
        np.zeros(12),
        jac=lambda z: np.concatenate([2 * (z[:6] - z[6:] - point), -2 * (z[:6] - z[6:] - point)]),
        bounds=[*((0, h) for h in high), *((0, -b) for b in low)],
        constraints={"type": "ineq", "fun": lambda z: eps - z.sum(), "jac": lambda _: -np.ones(12)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    np.testing.assert_allclose(found.numpy(), solved[:6] - solved[6:], atol=1e-5)


def test_a_zero_gradient_is_no_step() -> None:
    zero = torch.zeros(2, 1, 4, 4)
    for norm in ("linf", "l2", "l1"):
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
    diamond = random_in_ball(draws, like, "l1").flatten(1).numpy()
    assert scipy.stats.kstest(np.abs(diamond).sum(axis=1) ** 4, "uniform").pvalue > 0.01
    assert np.abs(diamond.mean(axis=0)).max() < 0.05
    # on the simplex every coordinate's share is Beta(1, dims - 1)
    share = np.abs(diamond[:, 0]) / np.abs(diamond).sum(axis=1)
    assert scipy.stats.kstest(share, scipy.stats.beta(1, 3).cdf).pvalue > 0.01


def photo(channels: int, height: int = 20, width: int = 24, count: int = 2) -> Batch:
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(channels), dtype=torch.float64)
    return Batch([f"{i}" for i in range(count)], x, torch.zeros(count, dtype=torch.int64))


def test_jpeg_adds_what_a_decoder_would_decode() -> None:
    """Against scipy's DCT, and the tables in a file that Pillow writes."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=50)
    tables = Image.open(buffer).quantization  # type: ignore[attr-defined]
    assert tables[0] == [step for row in jpeg.LUMA for step in row]
    assert tables[1] == [step for row in jpeg.CHROMA for step in row]
    batch = photo(3)
    threat = threats.build(JpegThreat(eps=0.02), None)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double()
    assert theta.shape == (2, 3, 24, 24)
    steps = np.array([jpeg.LUMA, jpeg.CHROMA, jpeg.CHROMA])
    added = np.zeros((2, 3, 24, 24))
    for r, c in itertools.product(range(0, 24, 8), range(0, 24, 8)):
        block = theta[:, :, r : r + 8, c : c + 8].numpy() * steps
        added[:, :, r : r + 8, c : c + 8] = scipy.fft.idctn(block, axes=(2, 3), norm="ortho") / 255
    luma, blue, red = added[:, 0], added[:, 1], added[:, 2]
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=1)[:, :, :20]
    np.testing.assert_allclose(threat.render(batch, theta), np.clip(batch.x_BCHW.numpy() + rgb, 0, 1), atol=1e-5)


def test_elastic_is_a_smoothed_flow() -> None:
    batch = photo(1)
    threat = threats.build(ElasticThreat(eps=3.0, std=1.5), None)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double()
    for i in range(2):
        flow = [scipy.ndimage.gaussian_filter(theta[i, k].numpy(), 1.5, mode="mirror", truncate=4) for k in (0, 1)]
        places = np.meshgrid(np.arange(20), np.arange(24), indexing="ij")
        moved = [place + step for place, step in zip(places, flow, strict=True)]
        wanted = scipy.ndimage.map_coordinates(batch.x_BCHW[i, 0].numpy(), moved, order=1, mode="nearest")
        np.testing.assert_allclose(threat.render(batch, theta)[i, 0], wanted, atol=1e-9)


def test_stadv_and_glitch_move_by_half_image_sides() -> None:
    batch = photo(3)
    x = batch.x_BCHW[0].numpy()
    flow = torch.zeros(2, 2, 20, 24, dtype=torch.float64)
    flow[:, 0], flow[:, 1] = 2 * 1.25 / 19, -2 * 2.5 / 23  # rows down, columns to the left
    wanted = scipy.ndimage.shift(x, (0, -1.25, 2.5), order=1, mode="nearest")
    np.testing.assert_allclose(threats.build(StAdvThreat(eps=1), None).render(batch, flow)[0], wanted, atol=1e-9)
    shift = torch.zeros(2, 3, 5, dtype=torch.float64)
    shift[:, 1, 2] = 2 * 3.5 / 23
    glitched = threats.build(GlitchThreat(eps=1, lines=5), None).render(batch, shift)[0]
    wanted = x.copy()
    wanted[1, 8:12] = scipy.ndimage.shift(x[1, 8:12], (0, -3.5), order=1, mode="mirror")  # the third of five stripes of four rows
    np.testing.assert_allclose(glitched, wanted, atol=1e-9)


def test_luv_has_the_published_values() -> None:
    """Of white and the primaries of sRGB, and there and back is nothing."""
    colours = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)[:, :, None, None]
    wanted = [[100, 0, 0], [53.2408, 175.0151, 37.7564], [87.7347, -83.0776, 107.3985], [32.2970, -9.4054, -130.3423], [0, 0, 0]]
    np.testing.assert_allclose(rgb_to_luv(colours)[:, :, 0, 0], wanted, atol=0.05)
    x = photo(3).x_BCHW
    np.testing.assert_allclose(luv_to_rgb(rgb_to_luv(x)), x, atol=1e-6)


def test_recolor_moves_equal_colours_alike() -> None:
    batch = photo(3)
    x = (batch.x_BCHW * 2).round() / 2  # 27 colours
    batch = dataclasses.replace(batch, x_BCHW=x)
    threat = threats.build(RecolorThreat(eps=0.06), None)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double()
    moved = threat.render(batch, theta)
    for image, before in zip(moved.flatten(2), x.flatten(2), strict=True):
        pairs = {tuple(b.tolist()): a for b, a in zip(before.T, image.T, strict=True)}
        assert 5 < len(pairs) <= 27
        for b, a in zip(before.T, image.T, strict=True):
            torch.testing.assert_close(a, pairs[tuple(b.tolist())])
    # raising every colour's lightness by the whole budget makes grey lighter by that much
    theta = torch.zeros_like(theta)
    theta[:, 0] = 0.06
    grey = dataclasses.replace(batch, x_BCHW=torch.full_like(x, 0.5))
    lighter = rgb_to_luv(threat.render(grey, theta)) - rgb_to_luv(grey.x_BCHW)
    np.testing.assert_allclose(lighter[:, 0], 6.0, atol=1e-3)
    np.testing.assert_allclose(lighter[:, 1:], 0.0, atol=0.05)


@pytest.mark.parametrize("size", [3, 5])
def test_a_filter_is_a_convolution_that_keeps_its_sum(size: int) -> None:
    batch, count = photo(3), size**2 - 1
    threat = threats.build(FilterThreat(eps=0.03, size=size), None)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double()
    assert theta.shape == (2, 3, count)
    for i, c in itertools.product(range(2), range(3)):
        kernel = np.insert(theta[i, c].numpy(), count // 2, 1 - theta[i, c].sum().item()).reshape(size, size)
        assert kernel.sum() == pytest.approx(1)
        wanted = scipy.ndimage.correlate(batch.x_BCHW[i, c].numpy(), kernel, mode="nearest")
        np.testing.assert_allclose(threat.render(batch, theta)[i, c], np.clip(wanted, 0, 1), atol=1e-9)


@pytest.mark.parametrize("mix", [False, True])
def test_filters_leave_constant_images_alone(mix: bool) -> None:
    threat = threats.build(FilterThreat(eps=0.3, mix=mix), None)
    for channels, colour in ((1, [0.7]), (3, [0.6, 0.6, 0.6] if mix else [0.1, 0.9, 1.0])):
        batch = photo(channels)
        x = torch.tensor(colour, dtype=torch.float64).view(-1, 1, 1).expand_as(batch.x_BCHW)
        batch = dataclasses.replace(batch, x_BCHW=x)
        theta = threat.start(batch, Draws(0, batch.id, "test")).double()
        torch.testing.assert_close(threat.render(batch, theta), x)


def test_mixed_colours_take_a_share_of_the_others() -> None:
    batch = photo(3)
    threat = threats.build(FilterThreat(eps=0.1, mix=True), None)
    theta = torch.zeros(2, 3, 10, dtype=torch.float64)
    theta[:, 1, 8:] = torch.tensor([0.05, -0.1])  # of red and of blue, to green
    x = batch.x_BCHW.numpy()
    wanted = x.copy()
    wanted[:, 1] += 0.05 * (x[:, 0] - x[:, 1]) - 0.1 * (x[:, 2] - x[:, 1])
    np.testing.assert_allclose(threat.render(batch, theta), np.clip(wanted, 0, 1), atol=1e-7)


def test_hsv_is_that_of_the_standard_library() -> None:
    colours = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [colorsys.hsv_to_rgb(*row) for row in colours.tolist()]
    np.testing.assert_allclose(hsv_to_rgb(*colours.unbind(dim=1)), wanted, atol=1e-12)


def test_pixels_are_the_first_of_their_blocks() -> None:
    """Blocks at the border are smaller."""
    batch = photo(3)
    threat = threats.build(PixelThreat(eps=100, size=8 / 20), None)
    theta = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = batch.x_BCHW.clone()
    for r, c in itertools.product(range(3), range(3)):
        block = wanted[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        block.lerp_(block[:, :, :1, :1].clone(), theta[:, :, r : r + 1, c : c + 1])
    torch.testing.assert_close(threat.render(batch, theta), wanted)


def test_wood_darkens_rings() -> None:
    batch = photo(1, 16, 16)
    wood = threats.build(WoodThreat(eps=0.1, rings=3, cells=16), None)
    theta = wood.start(batch, Draws(0, batch.id, "test")).double()
    for r, c in itertools.product(range(16), range(16)):
        radius = math.hypot(r / 8 - 1, c / 8 - 1) + theta[0, 0, r, c].item()
        dark = max(abs(math.sin(3 * math.pi * radius)), 1e-4) ** 0.125
        assert wood.render(batch, theta)[0, 0, r, c].item() == pytest.approx(batch.x_BCHW[0, 0, r, c].item() * dark, abs=1e-9)


def test_gabor_noise_moves_impulses_only() -> None:
    """Its kernel is a sum of waves under a Gaussian; a tenth of the places has impulses, and only those matter."""
    batch = photo(1, 32, 32)
    threat = threats.build(GaborThreat(eps=0.2, density=0.1), None)
    theta = threat.start(batch, Draws(0, batch.id, "test")).double()
    there = theta[:, 1024:2048] < 0.1
    assert 0.05 < there.double().mean() < 0.15
    other = theta.clone()
    other[:, :1024] = torch.where(there, other[:, :1024], torch.rand(2, 1024, dtype=torch.float64))
    torch.testing.assert_close(threat.render(batch, theta), threat.render(batch, other))
    kernel = gabor_kernel(torch.tensor([[0.15, 0.5, 0.25, 0.3]], dtype=torch.float64))[0, 0]  # two sides
    for r, c in itertools.product(range(0, 23, 5), range(0, 23, 5)):
        y, x = r / 22 - 0.5, c / 22 - 0.5
        turned = [x * math.cos(math.pi * (0.3 + s / 2)) + y * math.sin(math.pi * (0.3 + s / 2)) for s in (0, 1)]
        waves = sum(math.cos(2 * math.pi * (3 + 2.75 * 0.25) * t) for t in turned)
        assert kernel[r, c].item() == pytest.approx(waves * math.exp(-0.5 * (x * x + y * y) / 0.251**2), abs=1e-9)


def test_snow_is_brighter_where_flakes_are() -> None:
    batch = photo(3, 32, 32)
    batch = dataclasses.replace(batch, x_BCHW=torch.full_like(batch.x_BCHW, 0.2))
    threat = threats.build(SnowThreat(eps=0.5), None)
    theta = torch.zeros_like(threat.start(batch, Draws(0, batch.id, "test")).double())
    bare = threat.render(batch, theta)
    torch.testing.assert_close(bare, torch.full_like(bare, 0.75 * 0.2 + 0.25 * (1.5 * 0.2 + 0.5)))
    flake = theta.clone().view(2, -1)
    flake[:, 3 * 8 + 4] = 1.0  # layer 0, row 3, column 4 of the grid of 8x8
    snowy = threat.render(batch, flake) - bare
    row, column = (snowy[0, 0] == snowy[0, 0].max()).nonzero()[0].tolist()
    assert snowy.min() >= 0
    assert (snowy[0, 0] > 0).sum() < 13 * 13
    assert abs(row - 12) <= 6
    assert abs(column - 16) <= 6
    assert snowy[0, 0, 12, 16] == snowy.max(), "brightest where the flake is"


def test_shapes_cover_the_image_in_their_colours() -> None:
    batch = photo(3, 64, 64)
    threat = threats.build(KaleidoscopeThreat(eps=0.5, shapes=1, size=0.25, transparency=0.0, outline=0.0), None)
    for kind, area in ((0.1, math.pi / 4), (0.5, 3 * math.sqrt(3) / 4), (0.9, 1.0)):  # of size 1
        theta = torch.zeros(2, 3 + 64 * 64 + 7, dtype=torch.float64)
        theta[:, -7:] = torch.tensor([1 / 3, 1.0, 1.0, 0.5, 0.5, 0.1, kind])
        rendered = threat.render(batch, theta)
        green = ((rendered - rendered.new_tensor([0, 1, 0]).view(1, 3, 1, 1)).abs() < 1e-6).all(dim=1)
        assert green[:, 30:34, 30:34].all()
        changed = ((rendered - batch.x_BCHW).abs().amax(dim=1) > 0).double().sum(dim=(1, 2))
        assert changed.numpy() == pytest.approx(area * 16**2, rel=0.2)
        theta[:, :3] = torch.tensor([1.0, -1.0, 0.0])
        moved = threat.render(batch, theta)[0, :, 32, 32]
        torch.testing.assert_close(moved, moved.new_tensor([0.5, 0.5, 0.0]))


def test_shapes_have_outlines_and_add_up() -> None:
    """Of two discs in one place: their colours' sum, and a dark ring around, whose every pixel is searched."""
    batch = photo(3, 64, 64)
    threat = threats.build(KaleidoscopeThreat(eps=0.5, shapes=2, size=0.25, transparency=0.25, outline=4 / 64), None)
    theta = torch.zeros(2, 6 + 64 * 64 + 14, dtype=torch.float64)
    theta[:, -14:] = torch.tensor(
        [1 / 3, 1.0, 0.0, 0.5, 0.5, 0.0, 0.1, 0.0, 1.0, 0.0, 0.5, 0.5, 0.0, 0.1]
    )  # green and red of 0.8
    theta[:, 6 : 6 + 64 * 64] = -torch.rand(64 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rendered = threat.render(batch, theta)
    expected = 0.25 * batch.x_BCHW[:, :, 32, 32] + rendered.new_tensor([0.8, 0.8, 0.0])
    torch.testing.assert_close(rendered[:, :, 32, 32], expected.clamp(max=1.0))
    disc = ((torch.arange(64)[:, None] - 31.5) ** 2 + (torch.arange(64) - 31.5) ** 2 < 8**2).numpy()
    wide = scipy.ndimage.binary_dilation(disc, np.ones((9, 9)))
    ring, far = torch.from_numpy(wide & ~disc), torch.from_numpy(~wide)
    torch.testing.assert_close(rendered[0, 1][ring], -0.5 * theta[0, 6 : 6 + 64 * 64].view(64, 64)[ring])
    torch.testing.assert_close(rendered[:, :, far], batch.x_BCHW[:, :, far])


def test_a_step_in_l1_leaves_out_pixels_that_are_at_the_border_it_would_cross() -> None:
    x = torch.full((1, 1, 4, 5), 0.5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 0.0
    gradient = torch.full_like(x, 0.1)
    gradient[0, 0, 0, 0], gradient[0, 0, 0, 1], gradient[0, 0, 2, 2] = 9.0, -8.0, 1.0  # the steepest lead out of [0, 1]
    threat = threats.build(ImageThreat(norm="l1", eps=1.0), None)
    step = threat.direction(Batch(["a"], x, torch.tensor([0])), torch.zeros_like(x), gradient)
    expected = torch.zeros_like(x)
    expected[0, 0, 2, 2] = 1.0
    torch.testing.assert_close(step, expected)
    inwards = threat.direction(Batch(["a"], x, torch.tensor([0])), torch.zeros_like(x), -gradient)
    assert inwards[0, 0, 0, 0] == -1


@pytest.mark.slow
def test_snow_goes_to_the_closest_point_of_its_budget() -> None:
    """Against a solver that knows nothing of thresholds; the second region of each row has a column only, and three rows."""
    rng = np.random.default_rng(0)
    threat = threats.build(SnowThreat(eps=0.3, budget=0.2), None)
    batch = Batch(["a"], torch.zeros(1, 1, 12, 36), torch.zeros(1, dtype=torch.int64))
    grid = rng.normal(0.2, 0.6, (7, 3, 9))
    theta = torch.cat([torch.from_numpy(grid).flatten(), torch.rand(21, dtype=torch.float64)])[None]
    found = threat.project(batch, theta)[0, : grid.size].view(7, 3, 9).numpy()
    for layer in range(2):
        for place in (slice(0, 8), slice(8, 9)):
            point = grid[layer, :, place].flatten()
            solved = scipy.optimize.minimize(
                lambda f, point=point: ((f - point) ** 2).sum(),
                np.full(point.size, 0.1),
                jac=lambda f, point=point: 2 * (f - point),
                bounds=[(0.0, 1.0)] * point.size,
                constraints={"type": "ineq", "fun": lambda f: 0.2 - f.mean(), "jac": lambda f: np.full(f.size, -1 / f.size)},
                method="SLSQP",
                options={"ftol": 1e-12, "maxiter": 500},
            )
            np.testing.assert_allclose(found[layer, :, place].flatten(), solved.x, atol=1e-4)
