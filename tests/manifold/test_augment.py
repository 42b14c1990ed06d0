"""Augmentations against scipy's resampling and plain array operations, and the heuristic of their probability."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from dmat_ray.manifold import gan
from dmat_ray.manifold.augment import COLOUR, GEOMETRIC, adapted, augment


def samplers(
    unit: tuple[float, float], gauss: tuple[float, float], count: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Coins that always fall on 0, then these numbers: `unit` in [-1, 1], `gauss` standard normal."""

    def uniform(*shape: int) -> Tensor:
        return torch.zeros(count, 1) if shape == (1,) else (torch.tensor([unit]) + 1).expand(count, -1) / 2

    return uniform, lambda *shape: torch.tensor([gauss])[:, : shape[0]].expand(count, -1)


def resampled(x: Tensor, matrix: np.ndarray, shift: tuple[float, float] = (0, 0)) -> np.ndarray:
    """scipy: output pixel p takes the input at matrix (p - centre) + centre + shift, in (row, column) order."""
    centre = (np.array(x.shape[2:]) - 1) / 2
    offset = centre - matrix @ centre + np.array(shift)
    planes = [
        scipy.ndimage.affine_transform(p, matrix, offset, order=1, mode="nearest") for p in x.reshape(-1, *x.shape[2:]).numpy()
    ]
    return np.stack(planes).reshape(x.shape)


def turn(angle: float) -> np.ndarray:
    """In (row, column) order, of a turn in (column, row) order."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(
    ("name", "unit", "gauss", "matrix", "shift"),
    [
        ("flip", (-0.5, 0), (0, 0), np.diag([1.0, -1.0]), (0, 0)),
        ("flip", (0.5, 0), (0, 0), np.eye(2), (0, 0)),
        ("rotate90", (-0.9, 0), (0, 0), np.eye(2), (0, 0)),
        ("rotate90", (-0.3, 0), (0, 0), turn(math.pi / 2), (0, 0)),
        ("rotate90", (0.3, 0), (0, 0), turn(math.pi), (0, 0)),
        ("rotate90", (0.9, 0), (0, 0), turn(3 * math.pi / 2), (0, 0)),
        # a deviation of an eighth of 16 pixels: 2
        ("translate", (0, 0), (1.0, -0.5), np.eye(2), (-1.0, 2.0)),
        ("scale", (0, 0), (1.5, 0), np.eye(2) * 2**0.3, (0, 0)),
        ("tilt", (0.6, 0), (0, 0), turn(math.radians(9)), (0, 0)),
        ("rotate", (0.6, 0), (0, 0), turn(0.6 * math.pi), (0, 0)),
        ("stretch", (0, 0), (1.5, 0), np.diag([2**-0.3, 2**0.3]), (0, 0)),
    ],
)
def test_geometry_is_that_of_scipy(
    image: Tensor,
    name: str,
    unit: tuple[float, float],
    gauss: tuple[float, float],
    matrix: np.ndarray,
    shift: tuple[float, float],
) -> None:
    moved = augment(image, [name], 0.5, *samplers(unit, gauss, 2))
    np.testing.assert_allclose(moved.numpy(), resampled(image, matrix, shift), atol=1e-5)


def test_several_geometric_augmentations_are_one_resampling(image: Tensor) -> None:
    """Tilt, then scale, in one matrix: not the blur of two resamplings."""
    both = augment(image, ["tilt", "scale"], 0.5, *samplers((0.6, 0), (1.5, 0), 2))
    np.testing.assert_allclose(both.numpy(), resampled(image, turn(math.radians(9)) * 2**0.3), atol=1e-5)


def test_autocast_does_not_blur_the_places_of_pixels() -> None:
    """Half precision knows a place in a 256 pixel wide image to half a pixel."""
    x = torch.rand(2, 1, 256, 256) * 2 - 1
    draws = gan.StepDraws(0, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        same = augment(x, list(GEOMETRIC), 0.0, draws.uniform, draws.normal)
    torch.testing.assert_close(same, x, atol=1e-3, rtol=0)


def test_colours(image: Tensor) -> None:
    def changed(name: str) -> Tensor:
        return augment(image, [name], 0.5, *samplers((0, 0), (0.5, 0), 2))

    grey = image.mean(dim=1, keepdim=True)
    torch.testing.assert_close(changed("brightness"), image + 0.1)
    torch.testing.assert_close(changed("contrast"), image * 2**0.25)
    torch.testing.assert_close(changed("saturation"), grey + (image - grey) * 2**0.5)


@pytest.mark.parametrize("name", [*GEOMETRIC, *COLOUR])
def test_each_is_applied_with_its_probability(name: str) -> None:
    x = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for probability in (0.0, 0.3, 0.8):
        draws = gan.StepDraws(0, 1, 400)
        change = (augment(x, [name], probability, draws.uniform, draws.normal) - x).abs().amax(dim=(1, 2, 3))
        # half of the flips, and a quarter of the turns, leave an image as it is
        share = {"flip": 0.5, "rotate90": 0.75}.get(name, 1.0) * probability
        assert float((change > 1e-4).float().mean()) == pytest.approx(share, abs=0.07)


def test_a_change_of_the_probability_does_not_shift_later_draws() -> None:
    x = torch.rand(8, 1, 8, 8)
    rest = []
    for probability in (0.1, 0.7):
        draws = gan.StepDraws(0, 1, 8)
        augment(x, [*GEOMETRIC, *COLOUR], probability, draws.uniform, draws.normal)
        rest.append(draws.uniform())
    assert torch.equal(*rest)


def test_gradients_of_gradients_pass(image: Tensor) -> None:
    """R1 differentiates the gradient with respect to what is augmented."""

    def critic(x: Tensor) -> Tensor:
        draws = gan.StepDraws(0, 1, 2)
        return augment(x, ["rotate", "contrast"], 0.8, draws.uniform, draws.normal).pow(3).sum(dim=(1, 2, 3))

    x = image.clone().requires_grad_(True)
    assert torch.autograd.gradgradcheck(critic, (x,), fast_mode=True)  # against finite differences


@pytest.mark.parametrize(
    ("before", "sign", "kimg", "after"),
    [(0.3, 0.9, 1.0, 0.31), (0.3, 0.1, 1.0, 0.29), (0.0, 0.1, 1.0, 0.0), (0.795, 0.9, 1.0, 0.8), (0.3, 0.9, 20.0, 0.5)],
)
def test_the_probability_rises_where_the_discriminator_is_too_sure(before: float, sign: float, kimg: float, after: float) -> None:
    assert adapted(before, sign, target=0.6, kimg=kimg, ada_kimg=100.0) == pytest.approx(after)
