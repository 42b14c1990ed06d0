"""Projection finds images that the generator can make, and is the published loop where its preset says so."""

import functools

import pytest
import torch
from projections import CPU, SQUEEZE, images_fixture, mixed_fixture, names, project, settings  # noqa: F401  (fixtures)
from torch import Tensor

from dmat_ray import presets
from dmat_ray.config import Config, ProjectionConfig
from dmat_ray.manifold import encoder, fast, generators
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow


def test_an_image_of_the_generator_is_found(generator: StyleGAN2, images: Tensor) -> None:
    at_mean = generator.synthesis(generator.w_mean.expand(1, generator.num_ws, -1))
    before = (images - at_mean).abs().mean(dim=(1, 2, 3))
    for axes in ("w", "principal"):
        found = project(generator, images, steps=200, axes=axes)
        assert (found.l1_B < before / 10).all(), (axes, found.l1_B, before)


@functools.cache
def digits() -> tuple[LatentGenerator, encoder.Encoder, Tensor]:
    """The shipped generator and its encoder, and eight images that the generator makes."""
    generator = generators.load_generator("mnist32", precision="fast")
    start = encoder.load_encoder(generators.folder_of("mnist32"), generators.fingerprint("mnist32"))
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(100))
    return generator, start, generator.synthesis(generator.mapping(z))


@pytest.mark.parametrize(
    ("count", "values"),
    # float32, since few CPUs compute in bf16, which another test compares with it
    [
        (8, {**SQUEEZE, "lpips_precision": "float32"}),
        pytest.param(1, {"lpips_weights": "random", "lpips_precision": "float32"}, marks=pytest.mark.exhaustive),
    ],
    ids=["all", "with vgg"],
)
def test_every_digit_of_the_shipped_generator_is_recovered_by_preset_fast(count: int, values: dict[str, object]) -> None:
    generator, start, x = digits()
    config = Config.model_validate(presets.merge(presets.load(["fast"]), {"projection": values}))
    assert config.generator.precision == "fast"
    found = Projector(generator, config.projection, CPU, start).project(x[:count], names(count))
    assert (-10 * found.l2_B.log10()).min() >= 35, -10 * found.l2_B.log10()
    assert found.steps_B.float().mean() < 0.9 * config.projection.steps
    assert found.steps_B.unique().numel() >= min(count, 2)


def test_most_digits_are_recovered_by_preset_paper_in_a_quarter_of_its_steps() -> None:
    """From the mean some searches end in another digit's valley: with all 1,000 steps the last of these 8 comes to 34 dB."""
    generator, _, x = digits()
    config = ProjectionConfig.model_validate({**presets.load(["paper"])["projection"], **SQUEEZE, "lpips": 0, "steps": 250})
    found = Projector(generator, config, CPU).project(x, names(8))
    assert ((-10 * found.l2_B.log10()) >= 35).sum() >= 6, -10 * found.l2_B.log10()


def test_preset_paper_is_the_published_loop() -> None:
    """The numbers of encode_imagenet.py of the code of arXiv 2009.02470, whose images have twice the range of ours."""
    paper, fast_ = (presets.load([name])["projection"] for name in ("paper", "fast"))
    published = {
        "steps": 1000, "lr": 0.1, "beta2": 0.999, "lr_rampup": 0.05, "lr_rampdown": 0.25, "noise": 0.05, "noise_ramp": 0.75,
        "lpips": 1, "lpips_net": "vgg", "l1": 2 * 100, "l2": 0, "start": "mean", "axes": "w", "stop_window": 0, "l1_smooth": 0,
        "batch_size": 10,
    }  # fmt: skip
    assert {key: paper[key] for key in published} == published
    assert ProjectionConfig.model_validate(paper) == ProjectionConfig()
    # whichever is layered on top of the other, it decides
    free = {"compile", "encoder", "candidates", "shard_size", "poor_l1", "poor_lpips", "seed"}
    assert paper.keys() == fast_.keys() == ProjectionConfig.model_fields.keys() - free


def test_the_errors_are_those_of_the_clamped_image(generator: StyleGAN2, images: Tensor) -> None:
    found = project(generator, images)
    assert torch.equal(found.x_BCHW, generator.synthesis(found.w_BLD))
    assert found.x_BCHW.min() >= 0
    assert found.x_BCHW.max() <= 1
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - images).abs().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.l2_B, ((found.x_BCHW - images) ** 2).mean(dim=(1, 2, 3)))
    assert found.lpips_B.tolist() == [0.0] * 5


def test_no_images_and_images_as_bytes(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Projector(generator, settings(steps=3), CPU)
    none = projector.project(mixed[:0], [])
    assert none.w_BLD.shape == (0, generator.num_ws, 8)
    assert none.x_BCHW.shape == (0, 1, 8, 8)
    assert [len(t) for t in (none.lpips_B, none.l1_B, none.l2_B, none.steps_B, none.given_up_B)] == [0] * 5
    levels = (mixed * 255).round().to(torch.uint8)
    a, b = projector.project(levels, names(12)), projector.project(levels / 255, names(12))
    torch.testing.assert_close(a.w_BLD, b.w_BLD, atol=1e-5, rtol=1e-5)
    assert a.w_BLD.dtype == a.x_BCHW.dtype == a.l1_B.dtype == torch.float32


def test_images_that_do_not_fit_are_refused(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Projector(generator, settings(), CPU)
    with pytest.raises(ValueError, match=r"2 images of this generator have the shape \(2, 1, 8, 8\), not \(12, 1, 8, 8\)"):
        projector.project(mixed, names(2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not in \[0, 2\]"):
        projector.project(mixed * 2, names(12))
    with pytest.raises(ValueError, match="not in"):
        projector.project(mixed / 0, names(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_in_the_generators_precision(generator: StyleGAN2, images: Tensor, dtype: torch.dtype) -> None:
    """Its image of w, as a set that is rendered again finds it, and the errors of that image."""
    own = fast.accelerate(generator, dtype)
    found = project(own, images, steps=3)
    assert torch.equal(found.x_BCHW, own.synthesis(found.w_BLD))
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - images).abs().mean(dim=(1, 2, 3)))
    assert found.x_BCHW.dtype == torch.float32
    apart = (found.x_BCHW - generator.synthesis(found.w_BLD)).abs().max()
    assert (apart > 1e-4) == (dtype == torch.bfloat16)


def test_the_generator_is_not_moved(generator: StyleGAN2, images: Tensor) -> None:
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    project(generator, images, noise=0.05, start="nearest", candidates=10, axes="principal")
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
