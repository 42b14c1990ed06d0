"""Patterns that threats lay over an image: fog, snow, wood, Gabor noise and shapes, as their papers have them."""

import colorsys
import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
from photos import photo

from dmat_ray import threats
from dmat_ray.config import FogThreat, GaborThreat, KaleidoscopeThreat, SnowThreat, WoodThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.texture import gabor_kernel, hsv_to_rgb
from dmat_ray.threats.weather import diamond_square, num_fog_values
from dmat_ray.types import Batch


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


def test_hsv_is_that_of_the_standard_library() -> None:
    colours = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [colorsys.hsv_to_rgb(*row) for row in colours.tolist()]
    np.testing.assert_allclose(hsv_to_rgb(*colours.unbind(dim=1)), wanted, atol=1e-12)


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
