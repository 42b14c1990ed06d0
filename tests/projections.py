"""Short projections onto the tiny generator, and the images that they are tried on."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dmat_ray.config import ProjectionConfig
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.projection import Projection, Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2

CPU = torch.device("cpu")
SQUEEZE: dict[str, object] = {"lpips_net": "squeeze", "lpips_weights": "random"}


def settings(**values: object) -> ProjectionConfig:
    return ProjectionConfig.model_validate({"lpips": 0, "l1": 10, "l2": 50, "noise": 0, "steps": 40, **values})


def names(count: int) -> list[str]:
    return [f"image-{i}" for i in range(count)]


def project(generator: LatentGenerator, x: Tensor, ids: list[str] | None = None, **values: object) -> Projection:
    return Projector(generator, settings(**values), CPU).project(x, ids or names(len(x)))


class Recorder(Projector):
    """A projector that keeps the losses of every step, and how many images it had."""

    def __init__(self, *arguments: object, **values: object) -> None:
        super().__init__(*arguments, **values)  # type: ignore[arg-type]
        self.losses: list[Tensor] = []

    def loss_and_gradient(self, *arguments: object) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss_and_gradient(*arguments)  # type: ignore[arg-type]
        self.losses.append(loss)
        return loss, gradient


@pytest.fixture(name="images")
def images_fixture(generator: StyleGAN2) -> Tensor:
    """Images that the generator makes."""
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    return generator.synthesis(generator.mapping(z))


@pytest.fixture(name="exact")
def exact_fixture(generator: StyleGAN2) -> StyleGAN2:
    """The generator in float64: two searches that only rounding tells apart end at the same w, whatever the processor."""
    return copy.deepcopy(generator).double()


@pytest.fixture(name="mixed")
def mixed_fixture(generator: StyleGAN2) -> Tensor:
    """Twelve images: those at and near the mean, others of the generator, and some that it cannot make."""
    rng = torch.Generator().manual_seed(5)
    far = generator.mapping(torch.randn(8, 8, generator=rng))
    near = generator.w_mean + torch.tensor([0.0, 0.1, 0.3, 0.6])[:, None, None] * (far[:4] - generator.w_mean)
    made = generator.synthesis(torch.cat([near, far[4:]]))
    constant = torch.tensor([0.0, 1.0])[:, None, None, None].expand(-1, 1, 8, 8)
    return torch.cat([made, constant, torch.rand(2, 1, 8, 8, generator=rng)])


class Says(nn.Module):
    """An encoder that gives the same w for every image, and what is no number for dark ones."""

    def __init__(self, w_LD: Tensor) -> None:
        super().__init__()
        self.w_LD = w_LD

    def forward(self, x: Tensor) -> Tensor:
        dark = (x.mean(dim=(1, 2, 3)) == 0)[:, None, None]
        return torch.where(dark, torch.nan, self.w_LD.expand(len(x), -1, -1))
