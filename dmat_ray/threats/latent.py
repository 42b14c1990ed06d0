"""Moves along the manifold: g(w + lambda), lambda in a ball of W+ (OM-PGD of arXiv 2009.02470), alone or with one in pixels."""

import torch
from torch import Tensor

from dmat_ray.config import JointThreat, LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball, clip_straight_through
from dmat_ray.types import Batch, Generator


def _codes(batch: Batch) -> Tensor:
    if batch.w_BLD is None:
        raise UserError("a latent attack needs w: train and evaluate it on on-manifold images")
    return batch.w_BLD


def _unit(generator: Generator, scale: str) -> Tensor:
    """What one unit of lambda is: raw W, or the standard deviation of each w dimension."""
    return generator.w_std if scale == "std" else torch.ones_like(generator.w_std)


class LatentBall(Ball):
    """theta is lambda in units of `scale`."""

    def __init__(self, config: LatentThreat, generator: Generator) -> None:
        super().__init__(config.norm, config.eps)
        self.generator, self.unit = generator, _unit(generator, config.scale)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the ball; zero without draws."""
        return self.within(draws, _codes(batch))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """g(w + lambda)."""
        return self.generator.synthesis(_codes(batch) + theta * self.unit)


class Joint(Ball):
    """One attack on lambda and delta (JSA of arXiv 2112.06323): theta (B, LD + CHW) is both, each in units of its radius."""

    def __init__(self, config: JointThreat, generator: Generator) -> None:
        super().__init__("linf", 1.0)
        self.pixels, self.codes = config.eps, config.latent_eps
        self.generator, self.unit = generator, _unit(generator, config.scale)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the box; zero without draws."""
        return self.within(draws, torch.cat([_codes(batch).flatten(1), batch.x_BCHW.flatten(1)], dim=1))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """clip(g(w + lambda) + delta); what is clipped keeps its gradient, for g moves under delta."""
        w = _codes(batch)
        move, delta = theta.split([w[0].numel(), batch.x_BCHW[0].numel()], dim=1)
        x = self.generator.synthesis(w + move.view_as(w) * self.codes * self.unit)
        return clip_straight_through(x + delta.view_as(x) * self.pixels)
