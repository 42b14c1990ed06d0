"""Projection: it finds images that the generator can make, alone as in company, on the published schedule."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmat_ray.config import ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.projection import Projection, Projector, learning_rate, noise_scale
from dmat_ray.manifold.stylegan2 import StyleGAN2

CPU = torch.device("cpu")


def settings(**values: object) -> ProjectionConfig:
    return ProjectionConfig.model_validate({"lpips": 0, "l1": 10, "l2": 50, "noise": 0, "steps": 40, **values})


def project(generator: StyleGAN2, x: Tensor, ids: list[str] | None = None, **values: object) -> Projection:
    return Projector(generator, settings(**values), CPU).project(x, ids or [f"image-{i}" for i in range(len(x))])


@pytest.fixture
def images(generator: StyleGAN2) -> Tensor:
    """Images that the generator makes."""
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    return generator.synthesis(generator.mapping(z))


def test_an_image_of_the_generator_is_found(generator: StyleGAN2, images: Tensor) -> None:
    at_mean = generator.synthesis(generator.w_mean.expand(1, generator.num_ws, -1))
    before = (images - at_mean).abs().mean(dim=(1, 2, 3))
    found = project(generator, images, steps=200)
    assert (found.l1_B < before / 10).all(), (found.l1_B, before)


def test_the_errors_are_those_of_the_clamped_image(generator: StyleGAN2, images: Tensor) -> None:
    found = project(generator, images)
    assert torch.equal(found.x_BCHW, generator.synthesis(found.w_BLD))
    assert found.x_BCHW.min() >= 0
    assert found.x_BCHW.max() <= 1
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - images).abs().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.l2_B, ((found.x_BCHW - images) ** 2).mean(dim=(1, 2, 3)))
    assert found.lpips_B.tolist() == [0.0] * 5


@pytest.mark.parametrize("noise", [0, 0.05])
@pytest.mark.parametrize("start", ["mean", "nearest"])
def test_an_image_alone_is_as_in_a_batch(generator: StyleGAN2, images: Tensor, noise: float, start: str) -> None:
    values = {"noise": noise, "start": start, "candidates": 50, "steps": 20}
    together = project(generator, images, **values)
    alone = project(generator, images[3:4], ["image-3"], **values)
    torch.testing.assert_close(alone.w_BLD, together.w_BLD[3:4], atol=1e-3, rtol=1e-3)
    assert (together.w_BLD[2] - together.w_BLD[3]).abs().max() > 0.05


def test_noise_belongs_to_the_example_and_the_seed(generator: StyleGAN2, images: Tensor) -> None:
    twins = images[:1].repeat(3, 1, 1, 1)
    found = project(generator, twins, ["a", "a", "b"], noise=0.3)
    torch.testing.assert_close(found.w_BLD[0], found.w_BLD[1], atol=1e-4, rtol=1e-4)
    assert (found.w_BLD[0] - found.w_BLD[2]).abs().max() > 1e-2
    reseeded = project(generator, twins, ["a", "a", "b"], noise=0.3, seed=1)
    assert (reseeded.w_BLD[0] - found.w_BLD[0]).abs().max() > 1e-2


def test_nearest_starts_closer_than_the_mean(generator: StyleGAN2, images: Tensor) -> None:
    still: dict[str, object] = {"steps": 1, "lr": 1e-9}
    mean = project(generator, images, **still)
    nearest = project(generator, images, start="nearest", candidates=1000, **still)
    assert (nearest.l2_B <= mean.l2_B).all()
    assert nearest.l2_B.mean() < 0.7 * mean.l2_B.mean()
    more = project(generator, images, start="nearest", candidates=1, **still)
    assert (nearest.l2_B <= more.l2_B + 1e-7).all()


def test_only_w_gets_a_gradient(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(32).requires_grad_(True)
    x = torch.rand(2, 1, 32, 32)
    projector = Projector(generator, settings(lpips=1, lpips_net="squeeze", lpips_weights="random", steps=3), CPU)
    assert projector.perceptual is not None
    projector.perceptual.requires_grad_(True)
    found = projector.project(x, ["a", "b"])
    trained = [*generator.parameters(), *projector.perceptual.parameters()]
    assert [p.grad for p in trained if p.grad is not None] == []
    assert not found.w_BLD.requires_grad
    assert x.grad is None
    with torch.no_grad():
        expected = projector.perceptual.metric(2 * found.x_BCHW.repeat(1, 3, 1, 1) - 1, 2 * x.repeat(1, 3, 1, 1) - 1)
    torch.testing.assert_close(found.lpips_B, expected.flatten(), atol=1e-6, rtol=1e-5)


def test_lpips_guides_the_search(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(32)
    x = generator.synthesis(generator.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(3))))
    values: dict[str, object] = {"lpips": 1, "l1": 0, "l2": 0, "lpips_net": "squeeze", "lpips_weights": "random"}
    assert (project(generator, x, steps=20, **values).lpips_B < 0.7 * project(generator, x, steps=1, **values).lpips_B).all()


def test_lpips_needs_larger_images(generator: StyleGAN2) -> None:
    with pytest.raises(UserError, match=r"needs images of 32 pixels .* generator makes 8; set projection\.lpips 0"):
        Projector(generator, settings(lpips=1, lpips_net="squeeze", lpips_weights="random"), CPU)


def test_the_generator_is_not_moved(generator: StyleGAN2, images: Tensor) -> None:
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    project(generator, images, noise=0.05, start="nearest", candidates=10)
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())


@given(steps=st.integers(1, 1000), part=st.floats(0, 1), lr=st.floats(1e-3, 1))
def test_learning_rate_is_the_published_one(steps: int, part: float, lr: float) -> None:
    """Up linearly over 5 % of the steps, down by a cosine over 25 %; here the ramp ends its first step, not begins it."""
    config = ProjectionConfig(steps=steps, lr=lr)

    def published(t: float, ramp_at: float) -> float:
        down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1.0 - t) / 0.25))
        return lr * down * min(1.0, ramp_at / 0.05)

    step = min(steps - 1, int(part * steps))
    t = step / steps
    assert learning_rate(config, step) == pytest.approx(published(t, t + 1 / steps), abs=1e-12)
    if 0.05 <= t <= 0.75:
        assert learning_rate(config, step) == pytest.approx(lr)
    assert learning_rate(config, step) > 0


@given(steps=st.integers(1, 1000), part=st.floats(0, 1))
def test_noise_is_the_published_one(steps: int, part: float) -> None:
    step = min(steps - 1, int(part * steps))
    expected = 0.05 * max(0.0, 1 - step / steps / 0.75) ** 2
    assert noise_scale(ProjectionConfig(steps=steps), step) == pytest.approx(expected)


def test_ramps_may_be_switched_off() -> None:
    config = ProjectionConfig(steps=10, lr=0.3, lr_rampup=0, lr_rampdown=0)
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx([0.3] * 10)
