"""Samples of a generator: large ones a few at a time, of which classes, and on a grid."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from copiers import HERE, ClassCopier, digits
from PIL import Image
from torch import Tensor

from dmat_ray.config import EncoderConfig, QualityConfig, StyleGAN2Config
from dmat_ray.manifold import axes, diversity, gan, quality
from dmat_ray.manifold import samples as sampling
from dmat_ray.manifold.axes import principal_axes
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.encoder import untrained
from dmat_ray.manifold.encoder_trainer import fresh_errors, sample_w
from dmat_ray.manifold.samples import sample_grid
from dmat_ray.manifold.starts import Nearest
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow


def test_large_images_are_made_a_few_at_a_time() -> None:
    assert sampling.chunk_size(32) == 1024
    assert sampling.chunk_size(256) == 16
    assert sampling.chunk_size(2048) == 1


class Counted(LatentGenerator):
    """Makes grey images, and remembers the most that it made at once."""

    def __init__(self, resolution: int) -> None:
        super().__init__(4, 4, 2, resolution, 1)
        self.map, self.most = torch.nn.Identity(), 0

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        self.most = max(self.most, len(w_BLD))
        return w_BLD.mean(dim=(1, 2))[:, None, None, None].expand(-1, 1, self.resolution, self.resolution)


def errors_of(generator: LatentGenerator) -> dict[str, float]:
    config = EncoderConfig(width=4, width_max=4)
    encoder = untrained(config, generator)
    with torch.no_grad():
        encoder.head.bias.fill_(0.1)
    return fresh_errors(encoder, generator, config, samples=64)


@pytest.mark.parametrize(
    ("use", "most"),
    [
        (lambda generator: Nearest(generator, 100, 0), {128: 64, 256: 16}),
        (lambda generator: principal_axes(generator, 0), {256: 16, 512: 4}),
        (errors_of, {128: 64, 256: 16}),
    ],
    ids=["starts", "axes", "an encoder's errors"],
)
def test_whatever_renders_samples_makes_fewer_large_ones_at_a_time(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[LatentGenerator], object], most: dict[int, int]
) -> None:
    monkeypatch.setattr(axes, "SAMPLES", 16)
    for resolution, expected in most.items():
        generator = Counted(resolution)
        use(generator)
        assert generator.most == expected


def test_samples_in_parts_are_worth_the_same(monkeypatch: pytest.MonkeyPatch, make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator()

    def found() -> list[Tensor]:
        directions, lengths = principal_axes(generator, 0)
        values = torch.tensor(list(errors_of(generator).values()))
        return [Nearest(generator, 100, 0).pixels, values, directions @ torch.diag_embed(lengths) @ directions.transpose(1, 2)]

    whole = found()
    monkeypatch.setattr(sampling, "CHUNK_PIXELS", 8 * 8 * 5)
    torch.testing.assert_close(found(), whole, rtol=1e-4, atol=1e-5)


def test_pairs_share_their_class() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1])
    pairs = quality.real_pairs(labels, 200, torch.Generator().manual_seed(0))
    assert len(pairs) == 200
    assert all(labels[a] == labels[b] and a != b for a, b in zip(pairs[0::2], pairs[1::2], strict=True))
    assert torch.equal(labels[pairs[0::2]], torch.arange(100) % 3)
    assert len({(int(a), int(b)) for a, b in pairs.view(-1, 2)}) == 2 + 6 + 6, "any two of a class, in either order"
    torch.manual_seed(0)
    generator = StyleGAN2(StyleGAN2Config(resolution=8, channel_base=32, z_dim=8, num_classes=3))
    classes = torch.cat([c for _, _, c in sampling.samples(generator, 300, pairs=True)])
    assert torch.equal(classes[0::2], classes[1::2])
    assert torch.equal(classes[0::2], torch.arange(150) % 3)


def codes_of(draw: Callable[[StyleGAN2], object], generator: StyleGAN2) -> list[Tensor]:
    """Every batch of z that `draw` has mapped."""
    seen: list[Tensor] = []
    handle = generator.map.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    draw(generator)
    handle.remove()
    return seen


MIXING = EncoderConfig(style_mixing=1)


@pytest.mark.parametrize(
    ("draw", "within"),
    [
        (lambda generator: list(sampling.samples(generator, 960, pairs=True)), True),
        (lambda generator: gan.mixed_w(generator, 0.0, gan.StepDraws(0, 1, 960), pairs=True), True),
        (lambda generator: gan.mixed_w(generator, 1.0, gan.StepDraws(0, 1, 480)), False),
        (lambda generator: sample_w(generator, MIXING, gan.StepDraws(0, 1, 480)), False),
    ],
    ids=["the judge's", "a step's", "mixed in training", "mixed for an encoder"],
)
def test_two_z_of_a_class_have_nothing_else_in_common(draw: Callable[[StyleGAN2], object], within: bool) -> None:
    """Of a generator with as many classes as z has coordinates; the images lie as far apart as of z that a class was found in."""
    torch.manual_seed(0)
    shape = StyleGAN2Config(resolution=8, channel_base=64, channel_max=8, z_dim=16, w_dim=16, num_classes=16)
    generator = StyleGAN2(shape).requires_grad_(False)
    first, *more = codes_of(draw, generator)
    one, other = (first[0::2], first[1::2]) if within else (first, more[0])
    classes = one.argmax(dim=1)
    assert torch.equal(classes, other.argmax(dim=1))
    rest = torch.ones_like(one, dtype=torch.bool).scatter_(1, classes[:, None], False)
    assert torch.corrcoef(torch.stack([one[rest], other[rest]]))[0, 1].item() == pytest.approx(0, abs=0.04)

    z = torch.randn(480 * 40, 16)
    free = {c: z[z.argmax(dim=1) == c] for c in range(16)}
    independent = torch.stack([free[int(c)][2 * k % 960 : 2 * k % 960 + 2] for k, c in enumerate(classes)]).flatten(0, 1)
    apart, expected = (
        diversity.distances(generator.synthesis(generator.mapping(codes))).mean().item()
        for codes in (torch.stack([one, other], dim=1).flatten(0, 1), independent)
    )
    assert apart == pytest.approx(expected, rel=0.15)


def test_samples_are_of_the_classes_of_the_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer of these; one class as large as the other leaves z as it is drawn."""
    asked: list[Tensor | None] = []
    drawn = quality.samples
    monkeypatch.setattr(quality, "samples", lambda *a, **k: (asked.append(k.get("classes")), drawn(*a, **k))[1])
    images, labels = digits(300, seed=5)
    kept = torch.cat([torch.nonzero(labels == c).flatten()[:n] for c, n in enumerate((60, 30, 10))])
    for take, samples, frequencies in ((kept, 100, [60, 30, 10]), (kept, 1000, [600, 300, 100]), (torch.arange(300), 100, None)):
        asked.clear()
        judge = quality.Judge(QualityConfig(samples=samples, epochs=1), images[take], labels[take], HERE)
        judge(ClassCopier(images, labels))
        assert [None if a is None else torch.bincount(a).tolist() for a in asked] == [None, frequencies]
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.cat([c for _, _, c in sampling.samples(ClassCopier(images, labels), 100, pairs=False)])
    assert torch.equal(plain, z[:, :3].argmax(dim=1))
    classes = torch.arange(100) % 2
    made = torch.cat([c for _, _, c in sampling.samples(ClassCopier(images, labels), 100, pairs=False, classes=classes)])
    assert torch.equal(made, classes)


def test_z_of_a_class_is_what_was_drawn_with_two_coordinates_changed() -> None:
    z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    turned = diversity.of_classes(z, torch.arange(60) % 5, 5)
    assert torch.equal(turned[:, :5].argmax(dim=1), torch.arange(60) % 5)
    assert torch.equal(turned[:, :5].sort(dim=1).values, z[:, :5].sort(dim=1).values)
    assert torch.equal(turned[:, 5:], z[:, 5:])


def test_a_grid_shows_a_class_in_each_column() -> None:
    torch.manual_seed(0)
    generator, seen = StyleGAN2(StyleGAN2Config(resolution=8, channel_base=32, z_dim=8, num_classes=4)), []
    generator.map.register_forward_pre_hook(lambda module, inputs: seen.append(generator.class_of(inputs[0])))
    with Image.open(io.BytesIO(sample_grid(generator))) as grid:
        assert grid.size == (10 * 10 + 2, 8 * 10 + 2)
        pixels = np.asarray(grid) / 255
    assert torch.equal(torch.cat(seen).view(8, 10), torch.arange(10).remainder(4).expand(8, 10))
    z = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    z[13, 3] = z[13, :4].max() + 1
    expected = generator.synthesis(generator.mapping(z[13:14])).detach()[0, 0]
    np.testing.assert_allclose(pixels[12:20, 32:40], expected, atol=0.5 / 255 + 1e-4)
