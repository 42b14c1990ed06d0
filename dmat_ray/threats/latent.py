"""Moves along the manifold: g(w + lambda), lambda in a ball of W+ (OM-PGD of arXiv 2009.02470)."""

import torch
from torch import Tensor

from dmat_ray.config import LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import ball_norm, project_ball, random_in_ball, steepest
from dmat_ray.types import Batch, Generator


def _codes(batch: Batch) -> Tensor:
    if batch.w_BLD is None:
        raise UserError("a latent attack needs w: train and evaluate it on on-manifold images")
    return batch.w_BLD


class LatentBall:
    """theta is lambda in units of `scale`: raw W, or the standard deviation of each w dimension."""

    default_step = None

    def __init__(self, config: LatentThreat, generator: Generator) -> None:
        self.norm, self.eps, self.limit = config.norm, config.eps, config.eps
        self.generator = generator
        self.unit = generator.w_std if config.scale == "std" else torch.ones_like(generator.w_std)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the ball; zero without draws."""
        w = _codes(batch)
        return torch.zeros_like(w) if draws is None else random_in_ball(draws, w, self.norm) * self.eps

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """g(w + lambda)."""
        return self.generator.synthesis(_codes(batch) + theta * self.unit)

    def ascend(self, batch: Batch, theta: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Steepest ascent, then back into the ball."""
        return project_ball(theta + step_size * steepest(gradient, self.norm), self.norm, self.eps)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Norm of lambda in units of `scale`."""
        return ball_norm(theta, self.norm)
