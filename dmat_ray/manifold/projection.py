"""Projection: for each image x, find w with g(w) close to x.

Adam in W+ on LPIPS + L1 + L2 with the published schedule (METHOD of arXiv 2009.02470's code: rate up over the first
5 % and down by a cosine over the last 25 %, noise on w that dies out), the target's features computed once, gradient
to w only. The result of an image depends on (image, settings, generator, seed), not on its neighbours in the batch.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmat_ray.config import ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.types import Generator

if TYPE_CHECKING:
    from dmat_ray.manifold.perceptual import Perceptual


@dataclass(frozen=True)
class Projection:
    """Result for a batch: `w_BLD`, its clamped image, and per-image errors of that image against the target."""

    w_BLD: Tensor
    x_BCHW: Tensor
    lpips_B: Tensor
    l1_B: Tensor
    l2_B: Tensor


def learning_rate(config: ProjectionConfig, step: int) -> float:
    """Adam's rate at `step` of `config.steps`: linear ramp up, constant, cosine ramp down."""
    t = step / config.steps
    down = min(1.0, (1.0 - t) / config.lr_rampdown) if config.lr_rampdown else 1.0
    up = min(1.0, (t + 1.0 / config.steps) / config.lr_rampup) if config.lr_rampup else 1.0
    return config.lr * (0.5 - 0.5 * math.cos(down * math.pi)) * up


def noise_scale(config: ProjectionConfig, step: int) -> float:
    """Strength of the noise on w at `step`, in units of w_std."""
    t = step / config.steps
    return config.noise * max(0.0, 1.0 - t / config.noise_ramp) ** 2


def _perceptual(config: ProjectionConfig, resolution: int, device: torch.device) -> "Perceptual | None":
    if config.lpips == 0:
        return None
    from dmat_ray.manifold.perceptual import Perceptual  # lpips takes seconds to import

    perceptual = Perceptual(config.lpips_net, config.lpips_weights, config.seed).to(device)
    if resolution < perceptual.smallest:
        raise UserError(
            f"LPIPS with {config.lpips_net} needs images of {perceptual.smallest} pixels or more, the generator makes "
            f"{resolution}; set projection.lpips 0"
        )
    return perceptual


class Projector:
    """Projects batches onto one generator's range. Build it once per process; `project` is called per batch."""

    def __init__(self, generator: Generator, config: ProjectionConfig, device: torch.device) -> None:
        self.generator, self.config, self.device = generator, config, device
        self.perceptual = _perceptual(config, generator.resolution, device)
        if config.start == "nearest":
            rng = torch.Generator().manual_seed(config.seed)
            z = torch.randn(config.candidates, generator.z_dim, generator=rng).to(device)
            with torch.no_grad():
                self.candidate_w = generator.mapping(z)
                chunks = [generator.synthesis(part).flatten(1) for part in self.candidate_w.split(256)]
            self.candidate_x = torch.cat(chunks)

    def _start(self, x_BCHW: Tensor) -> Tensor:
        if self.config.start == "nearest":
            nearest = torch.cdist(x_BCHW.flatten(1), self.candidate_x).argmin(dim=1)
            return self.candidate_w[nearest].clone()
        w = self.generator.w_mean.expand(x_BCHW.shape[0], self.generator.num_ws, -1)
        return w.clone()

    def _errors(self, x: Tensor, target: Tensor, features: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        difference = x - target
        l1, l2 = difference.abs().mean(dim=(1, 2, 3)), difference.square().mean(dim=(1, 2, 3))
        if self.perceptual is None or features is None:
            return torch.zeros_like(l1), l1, l2
        return self.perceptual.distance(self.perceptual.features(x), features), l1, l2

    def project(self, x_BCHW: Tensor, ids: list[str]) -> Projection:
        """Images in [0, 1] -> their projection. Ids seed each image's noise."""
        config, target = self.config, x_BCHW.to(self.device)
        with torch.no_grad():
            features = None if self.perceptual is None else self.perceptual.features(target)
        w = self._start(target).requires_grad_(True)
        optimizer = torch.optim.Adam([w], lr=config.lr)
        draws = Draws(config.seed, ids, "projection")
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            scale = noise_scale(config, step)
            noisy = w
            if scale > 0:
                noisy = w + draws.normal(*w.shape[1:], like=w) * (self.generator.w_std * scale)
            # unclamped: a pixel outside [0, 1] must still feel which way its target lies
            lpips_B, l1_B, l2_B = self._errors(self.generator.synthesis(noisy, clamp=False), target, features)
            # a sum over the batch: Adam then treats every image as if it were alone
            loss = (config.lpips * lpips_B + config.l1 * l1_B + config.l2 * l2_B).sum()
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        w = w.detach()
        with torch.no_grad():
            x = self.generator.synthesis(w)
            lpips_B, l1_B, l2_B = self._errors(x, target, features)
        return Projection(w, x, lpips_B, l1_B, l2_B)
