"""Filters of corruptions: against scipy and Pillow."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dmat_ray.corruptions import filters


def fields(count: int, channels: int, height: int, width: int) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(width))


@given(
    std=st.sampled_from([0.05, 0.4, 1.0, 3.0, 30.0]),
    truncate=st.sampled_from([3.0, 4.0]),
    border=st.sampled_from(["nearest", "reflect", "mirror"]),
    size=st.tuples(st.integers(16, 40), st.integers(16, 40)),
)
def test_gaussian_is_scipys(std: float, truncate: float, border: str, size: tuple[int, int]) -> None:
    x = fields(1, 1, *size).double()
    expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), std, mode=border, truncate=truncate)
    np.testing.assert_allclose(filters.gaussian(x, std, truncate, border)[0, 0], expected, atol=1e-10)


@given(size=st.integers(16, 230), factor=st.floats(1.0, 4.5))
def test_zoom_is_scipys(size: int, factor: float) -> None:
    row = np.random.default_rng(size).random(size)
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    larger = scipy.ndimage.zoom(row[first : first + kept], factor, order=1)
    trim = (len(larger) - size) // 2
    np.testing.assert_allclose(filters.zoom_map(size, factor).numpy() @ row, larger[trim : trim + size], atol=1e-9)


@given(size=st.integers(4, 230), new=st.integers(4, 230))
def test_box_is_pillows(size: int, new: int) -> None:
    row = np.random.default_rng(size).random((1, size), dtype=np.float32)
    expected = np.array(Image.fromarray(row).resize((new, 1), Image.Resampling.BOX))
    np.testing.assert_allclose(filters.box_map(size, new).numpy() @ row[0], expected[0], atol=1e-6)


def test_kernels_are_not_turned() -> None:
    x, kernel = fields(2, 3, 16, 21).double(), torch.rand(5, 5, dtype=torch.float64)
    found = filters.correlate(x, kernel)
    for image, seen in zip(x.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        np.testing.assert_allclose(seen, scipy.ndimage.correlate(image, kernel.numpy(), mode="mirror"), atol=1e-12)


@pytest.mark.parametrize("border", ["reflect", "mirror"])
def test_samples_are_scipys(border: str) -> None:
    rng = np.random.default_rng(0)
    x, places = fields(1, 1, 16, 21).double(), rng.uniform(-30, 50, (2, 1, 16, 21))
    found = filters.sample(x, *(torch.from_numpy(p) for p in places), border)
    expected = scipy.ndimage.map_coordinates(x[0, 0].numpy(), places[:, 0], order=1, mode=border)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-9)


def test_trails_lead_away_at_their_angle() -> None:
    """Level, upright and slanting by 45 degrees: one half of a Gaussian whose taps are the pixels on that line."""
    x = fields(4, 2, 16, 21).double()
    found = filters.trail(x, 3, 2.0, torch.tensor([0.0, 90.0, -90.0, 45.0])).numpy()
    half = np.exp(-(np.arange(7) ** 2) / 8)
    for i, (down, right) in enumerate(((0, 1), (1, 0), (-1, 0), (1, 1))):
        kernel = np.zeros((13, 13))
        for tap, weight in enumerate(half / half.sum()):
            # at 45 degrees seven taps of the line fall on the pixels 0, 1, 1, 2, 3, 4, 4 of the diagonal
            step = round(tap * math.sqrt(0.5)) if down and right else tap
            kernel[6 + down * step, 6 + right * step] += weight
        for image, seen in zip(x[i].numpy(), found[i], strict=True):
            np.testing.assert_allclose(seen, scipy.ndimage.correlate(image, kernel, mode="nearest"), atol=1e-12)
