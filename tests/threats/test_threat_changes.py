"""Threats that compress, move, recolour, filter or coarsen an image do what their papers say."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
from photos import photo
from PIL import Image

from dmat_ray import threats
from dmat_ray.config import ElasticThreat, FilterThreat, GlitchThreat, JpegThreat, PixelThreat, RecolorThreat, StAdvThreat
from dmat_ray.rng import Draws
from dmat_ray.threats import jpeg
from dmat_ray.threats.color import luv_to_rgb, rgb_to_luv


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
