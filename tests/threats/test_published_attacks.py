"""Our attacks beside the published ones, as `benchmarks/published_attacks.py` recorded them: the same images of the same
parameters where theirs do what they say, the difference spelt out where not, and no more digits that stand.

Old is the first version of arXiv 1908.08016 (advex-uar), new its third (adversarial-corruptions).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from classifiers.make import digits
from pydantic import TypeAdapter
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import (
    AttackRow,
    ClassifierConfig,
    ElasticThreat,
    FogThreat,
    GaborThreat,
    GlitchThreat,
    JpegThreat,
    KaleidoscopeThreat,
    PixelThreat,
    RecolorThreat,
    SnowThreat,
    ThreatSettings,
    WoodThreat,
)
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.threats.jpeg import CHROMA, TO_YCC
from dmat_ray.threats.texture import gabor_kernel, hsv_to_rgb
from dmat_ray.threats.weather import _streaks, diamond_square
from dmat_ray.types import Batch

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1]
STRENGTH = json.loads((HERE / "published" / "strength.json").read_text())
PERCEPTUAL = json.loads((HERE / "published" / "perceptual.json").read_text())
STADV = json.loads((HERE / "published" / "stadv.json").read_text())  # of the same digits as STRENGTH
MORE = 4  # digits that may stand under ours and not under theirs: two points of 200


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    """Arrays in float64, by the names that the script gives them."""
    with np.load(HERE / "published" / "renders.npz") as arrays:
        return {name: arrays[name].astype(np.float64) for name in arrays.files}


def rendered(settings: ThreatSettings, x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Our images."""
    batch = Batch([str(i) for i in range(len(x))], torch.from_numpy(x), torch.zeros(len(x), dtype=torch.int64))
    return threats.build(settings, None).render(batch, torch.from_numpy(theta)).numpy()


def near(found: np.ndarray, wanted: np.ndarray, atol: float = 1e-5) -> None:
    """Equal to what rounding in float32, with pixels up to 255, leaves."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


def plasma(theta_BP: np.ndarray, size: int, decay: float, back: int) -> np.ndarray:
    """Diamond-square whose second neighbour of an edge across a square lies `back` squares back: 1 for the true one."""
    grid, used, wibble = np.zeros((len(theta_BP), 1, 1)), 0, 1.0
    while (n := grid.shape[1]) < size:
        noise = (theta_BP[:, used : used + 3 * n * n].reshape(-1, 3, n, n) * 2 - 1) * wibble
        below, right, finer = np.roll(grid, -1, 1), np.roll(grid, -1, 2), np.empty((len(grid), 2 * n, 2 * n))
        centre = (grid + below + right + np.roll(below, -1, 2)) / 4 + noise[:, 0]
        finer[:, ::2, ::2], finer[:, 1::2, 1::2] = grid, centre
        finer[:, ::2, 1::2] = (grid + right + centre + np.roll(centre, back, 1)) / 4 + noise[:, 1]
        finer[:, 1::2, ::2] = (grid + below + centre + np.roll(centre, back, 2)) / 4 + noise[:, 2]
        grid, used, wibble = finer, used + 3 * n * n, wibble / decay
    return grid


def scaled(grid: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    low, high = grid.min(axis=axes, keepdims=True), grid.max(axis=axes, keepdims=True)
    return (grid - low) / (high - low)


def test_fog(recorded: Any) -> None:
    """The old one takes wrong neighbours and one scale for the whole batch; but for that they are the same."""
    x, theta, eps = recorded["x"], recorded["fog/theta"], 128 / 255

    def laid(fog: np.ndarray) -> np.ndarray:
        return (x + eps * fog[:, None, 16:48, 16:48]) / (x.max(axis=(2, 3), keepdims=True) + eps)

    near(recorded["fog/images"], laid(scaled(plasma(theta, 64, 2.0, back=2), (0, 1, 2))))
    near(rendered(FogThreat(eps=eps), x, theta), laid(scaled(plasma(theta, 64, 2.0, back=1), (1, 2))))


def test_fog_has_the_plasma_of_the_new_one(recorded: Any) -> None:
    """Whose neighbours are true; it is scaled per image here."""
    found = diamond_square(torch.from_numpy(recorded["fog/plasma_theta"]), 32, 2.0)
    near(found.numpy(), scaled(recorded["fog/plasma"], (1, 2, 3)))


def test_snow(recorded: Any) -> None:
    near(rendered(SnowThreat(eps=0.3), recorded["x"], recorded["snow/theta"]), recorded["snow/images"])


def test_streaks_are_like_theirs_in_the_mean(recorded: Any) -> None:
    """They are another formula's: of one length and breadth, and of one mass."""
    drawn = torch.rand(300, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = _streaks(drawn).mean(dim=(0, 1)).numpy(), recorded["snow/mean_streak"]
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.1)
    assert np.abs(ours - theirs).sum() < 0.25 * theirs.sum()


def places(size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return rows, columns


def sampled(image: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """One channel at the given places, bilinear."""
    return scipy.ndimage.map_coordinates(image, [rows, columns], order=1, mode=mode)


def test_elastic(recorded: Any) -> None:
    """Ours samples where the smoothed flow says; the old one on a grid that is 17/16 as wide, which moves pixels by itself."""
    x, (rows, columns) = recorded["x"][:, :, :16, :16], places(16)
    ours = rendered(ElasticThreat(eps=4.0), x, recorded["elastic/flow"][:, ::-1].copy())
    for i, (right, down) in enumerate(recorded["elastic/smoothed"]):
        for channel in range(3):
            near(ours[i, channel], sampled(x[i, channel], rows + down, columns + right, "nearest"))
            wide = (rows * 16 / 15 - 0.5 + down, columns * 16 / 15 - 0.5 + right)
            near(recorded["elastic/images"][i, channel], sampled(x[i, channel], *wide, "grid-constant"))


def test_gabor(recorded: Any) -> None:
    numbers, impulses = recorded["gabor/numbers"], recorded["gabor/impulses"].reshape(2, -1)
    near(gabor_kernel(torch.from_numpy(numbers))[:, 0].numpy(), recorded["gabor/kernels"])
    theta = np.concatenate([(impulses + 1) / 2, np.where(impulses == 0, 1.0, 0.0), numbers], axis=1)
    near(rendered(GaborThreat(eps=12.5 / 255), recorded["x"], theta), recorded["gabor/images"])
    # its gradient takes what waves are divided by for a constant; the exact one vanishes nearly everywhere
    movable = torch.from_numpy(theta).requires_grad_(True)
    grey = Batch(["a", "b"], torch.full((2, 1, 32, 32), 0.25, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    weights = torch.arange(1024, dtype=torch.float64).view(32, 32).sin()
    image = threats.build(GaborThreat(eps=0.5), None).render(grey, movable)
    (gradient,) = torch.autograd.grad((image * weights).sum(), movable)
    wanted = np.where(impulses == 0, 0.0, recorded["gabor/gradient"].reshape(2, -1))  # 0.5 eps, and sizes in half units
    scale = np.abs(wanted).max()
    near(gradient[:, :1024].numpy() / scale, wanted / scale, 1e-3)


def test_gabor_moves_impulses_where_the_old_one_moves_all_else(recorded: Any) -> None:
    start, mask = recorded["gabor/start"], recorded["gabor/mask"]
    np.testing.assert_array_equal(mask, start == 0)
    assert mask.mean() == pytest.approx(13 / 14, abs=1e-3)
    theta = np.concatenate([start.ravel() / 2 + 0.5, np.where(start.ravel() == 0, 1.0, 0.0), [0.5] * 4])[None]
    movable = torch.from_numpy(theta).requires_grad_(True)
    batch = Batch(["a"], torch.full((1, 1, 32, 32), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    image = threats.build(GaborThreat(), None).render(batch, movable)
    (gradient,) = torch.autograd.grad((image * torch.arange(1024.0).view(1, 1, 32, 32)).sum(), movable)
    np.testing.assert_array_equal(gradient.numpy()[0, :1024] == 0, mask.ravel() == 1)


def tiled(table: Any, size: int) -> np.ndarray:
    return np.tile(np.array(table), (size // 8, size // 8))


def by_blocks(transform: Any, planes_BHW: np.ndarray) -> np.ndarray:
    """An orthonormal transform of the 8x8 blocks."""
    count = planes_BHW.shape[1] // 8
    blocks = planes_BHW.reshape(-1, count, 8, count, 8)
    return transform(blocks, axes=(2, 4), norm="ortho").reshape(planes_BHW.shape)


def test_jpeg_of_the_new_one(recorded: Any) -> None:
    """Which leaves out the tables, and chroma at its resolution."""
    near(rendered(JpegThreat(), recorded["x"], recorded["jpeg/theta"]), recorded["jpeg/new_images"])


def test_jpeg_of_the_old_one(recorded: Any) -> None:
    """A step of its parameters is half a step of the tables, of chroma in blocks of 16x16 pixels."""
    chroma = []
    for name in ("blue", "red"):
        decoded = by_blocks(scipy.fft.idctn, recorded[f"jpeg/{name}"] / 2 * tiled(CHROMA, 16))
        full = decoded.repeat(2, axis=1).repeat(2, axis=2)
        chroma.append(by_blocks(scipy.fft.dctn, full) / tiled(CHROMA, 32))
    theta = np.stack([recorded["jpeg/luma"] / 2, *chroma], axis=1)
    near(rendered(JpegThreat(), recorded["jpeg/smooth"], theta), recorded["jpeg/images"])


def test_jpeg_leaves_an_unmoved_image_alone_where_the_old_one_halves_its_colours(recorded: Any) -> None:
    x = recorded["x"]
    near(rendered(JpegThreat(), x, np.zeros_like(x)), x, 0)
    mine, theirs = (np.einsum("ij,bjhw->ibhw", TO_YCC, image) for image in (x, recorded["jpeg/unmoved"]))
    inside = ((recorded["jpeg/unmoved"] > 0) & (recorded["jpeg/unmoved"] < 1)).all(axis=1)  # not clipped
    halved = [mine[0], *(p.reshape(2, 16, 2, 16, 2).mean(axis=(2, 4)).repeat(2, 1).repeat(2, 2) for p in mine[1:])]
    near(theirs[:, inside], np.stack(halved)[:, inside])


def test_wood(recorded: Any) -> None:
    settings = WoodThreat(eps=0.05, rings=4, cells=8)
    near(rendered(settings, recorded["x"][:, :, :16, :16], recorded["wood/theta"]), recorded["wood/images"], 1e-4)


def test_glitch(recorded: Any) -> None:
    """The new one samples half a pixel above and to the left, and mirrors at the edge instead of the outermost pixel."""
    x, theta, (rows, columns) = recorded["x"][:, :, :16, :16], recorded["glitch/theta"], places(16)
    ours = rendered(GlitchThreat(eps=0.2, lines=4), x, theta)
    for i in range(2):
        for channel in range(3):
            shift = theta[i, channel].repeat(4)[:, None]
            near(ours[i, channel], sampled(x[i, channel], rows, columns + shift * 7.5, "mirror"))
            wanted = sampled(x[i, channel], rows - 0.5, columns - 0.5 + shift * 8, "reflect")
            near(recorded["glitch/images"][i, channel], wanted)


def test_pixel(recorded: Any) -> None:
    x, theta = recorded["x"][:, :, :16, :16], recorded["pixel/theta"]
    near(rendered(PixelThreat(eps=100, size=4 / 16), x, theta), recorded["pixel/images"])


def test_kaleidoscope(recorded: Any) -> None:
    """Of the same shapes."""
    settings = KaleidoscopeThreat(shapes=4, size=0.25, outline=2 / 32, eps=0.3, transparency=0.2)
    wanted = recorded["kaleidoscope/images"]
    assert 0.2 < (np.abs(wanted - recorded["x"]) > 0.01).mean() < 0.9
    near(rendered(settings, recorded["x"], recorded["kaleidoscope/theta"]), wanted)


def test_colours_of_shapes(recorded: Any) -> None:
    near(hsv_to_rgb(*torch.from_numpy(recorded["hsv/hsv"]).unbind(dim=1)).movedim(3, 1).numpy(), recorded["hsv/rgb"])


@pytest.fixture(scope="module")
def recolored() -> dict[str, Tensor]:
    """What benchmarks/published_recolor.py has recorded."""
    with np.load(HERE / "published" / "recolor.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_recolor_of_colours_that_stay_in_srgb(recolored: dict[str, Tensor]) -> None:
    """Their matrices have four digits."""
    x, theta = recolored["x"].numpy(), recolored["theta"]
    found = rendered(RecolorThreat(eps=0.06, grid=tuple(theta.shape[2:])), x, theta.numpy())  # type: ignore[arg-type]
    near(found, recolored["images"].numpy(), atol=1e-3)
    assert np.abs(found - x).max() > 0.08


def test_recolor_moves_greys_no_further(recolored: dict[str, Tensor]) -> None:
    """By the same search. In the dark, where most of the ball is no colour, theirs clips the knots into sRGB and ours each
    colour, which leaves a little more room; both stay far from the saturated colours that no clipping would let them reach.
    """
    threat = threats.build(RecolorThreat(eps=0.06), None)
    for grey, theirs in zip(recolored["greys"].tolist(), recolored["rises"].tolist(), strict=True):
        batch = Batch(["grey"], torch.full((1, 3, 2, 2), grey), torch.zeros(1, dtype=torch.int64))
        found = [-1.0] * 3
        for channel in range(3):
            for seed in range(4):
                theta = 0.06 * (2 * torch.rand(1, 3, 16, 32, 32, generator=torch.Generator().manual_seed(seed)) - 1)
                for _ in range(30):
                    theta.requires_grad_(True)
                    moved = (threat.render(batch, theta) - batch.x_BCHW)[:, channel].mean()
                    found[channel] = max(found[channel], moved.item())
                    (gradient,) = torch.autograd.grad(moved, theta)
                    theta = threat.project(batch, theta.detach() + 0.02 * gradient.sign())
        assert np.all(np.array(found) < np.array(theirs) + 0.05), grey
        if grey >= 0.05:
            near(np.array(found), np.array(theirs), atol=0.005)


class Luma(nn.Module):
    """Colour to grey, as JPEG has it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW * x_BCHW.new_tensor(TO_YCC[0]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


class Negative(nn.Module):
    """Black on white to white on black."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return 1 - x_BCHW


def in_colour(ids: list[str]) -> Batch:
    """Recorded digits, as the published attacks want them."""
    every = digits("test")
    batch = every.take(torch.tensor([list(every.id).index(i) for i in ids]))
    return Batch(batch.id, batch.x_BCHW.expand(-1, 3, -1, -1).contiguous(), batch.y_B)


def view_of(network: str) -> AttackView:
    """A classifier that ships with the tests, for such digits."""
    found = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=10)
    checkpoint.load_weights(HERE / "classifiers" / network, found)
    return AttackView(nn.Sequential(Luma(), found).eval())


@pytest.fixture(scope="module")
def sample() -> Batch:
    assert STRENGTH["ids"] == STADV["ids"]
    return in_colour(STRENGTH["ids"])


@pytest.mark.parametrize("entry", [*STRENGTH["rows"], *STADV["rows"]], ids=lambda entry: entry["row"]["name"])
def test_no_more_digits_stand(sample: Batch, entry: Any) -> None:
    """At the same budget, steps and length of a step, from one random start; where strong attacks differ from weak ones."""
    assert 0.05 * len(sample) < entry["standing"] < 0.95 * len(sample)
    row = TypeAdapter(AttackRow).validate_python(entry["row"])
    view = view_of(entry["network"])
    if entry.get("negative"):
        sample, view = replace(sample, x_BCHW=1 - sample.x_BCHW), AttackView(nn.Sequential(Negative(), view))
    found = attack(view, threats.build(row, None), sample, row, seed=0, purpose="published")
    assert int((~found.broken_B).sum()) <= entry["standing"] + MORE
    begun = row.model_copy(update={"method": "random", "steps": 1, "random_start": True})  # type: ignore[union-attr]
    start = attack(view, threats.build(row, None), sample, begun, seed=0, purpose="published")
    assert int((~found.broken_B).sum()) <= int((~start.broken_B).sum()), "it ends no weaker than it starts"


def of_perceptual(entry: Any) -> Any:
    """One case; of two of a method one is enough for every day."""
    name = f"{entry['row']['method']} {entry['network']}"
    return pytest.param(entry, id=name, marks=pytest.mark.exhaustive if name in ("pgd robust", "lpa standard") else ())


@pytest.mark.parametrize("entry", map(of_perceptual, PERCEPTUAL["rows"]))
def test_no_more_digits_stand_under_perceptual_attacks(entry: Any) -> None:
    """From other random starts, which makes a difference of a digit or two."""
    batch, row = in_colour(PERCEPTUAL["ids"]), TypeAdapter(AttackRow).validate_python(entry["row"])
    view, threat = view_of(entry["network"]), threats.build(row, None)  # type: ignore[arg-type]
    found = attack(view, threat, batch, row, seed=0, purpose="published")  # type: ignore[arg-type]
    assert int((~found.broken_B).sum()) <= entry["standing"] + MORE / 2
    begun = row.model_copy(update={"method": "random", "steps": 1})  # type: ignore[union-attr]
    start = attack(view, threat, batch, begun, seed=0, purpose="published")
    assert int((~found.broken_B).sum()) < 0.8 * int((~start.broken_B).sum()), "the places tell an attack from its start"
