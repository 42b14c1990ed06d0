"""Balls around the pixels: clip(x + delta), with delta in an L-infinity or L2 ball."""

import torch
from torch import Tensor

from dmat_ray.config import ImageThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import ball_norm, project_ball, random_in_ball, steepest
from dmat_ray.types import Batch


def clip_straight_through(x: Tensor) -> Tensor:
    """x clipped to [0, 1] with the gradient of the identity.

    `ascend` keeps x + delta inside [0, 1] up to rounding; without this, a pixel that rounding puts at 1 + 6e-8 would
    lose its gradient for good.
    """
    return x + (x.clamp(0.0, 1.0) - x).detach()


class ImageBall:
    """theta is delta, of the shape of x."""

    default_step = None

    def __init__(self, config: ImageThreat) -> None:
        self.norm, self.eps = config.norm, config.eps
        self.limit = config.eps

    def _inside(self, batch: Batch, delta: Tensor) -> Tensor:
        """delta in the ball, then x + delta in [0, 1]; clipping pixels only shortens delta, so the ball still holds."""
        x = batch.x_BCHW
        return (x + project_ball(delta, self.norm, self.eps)).clamp(0.0, 1.0) - x

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the ball, then clipped; zero without draws."""
        x = batch.x_BCHW
        if draws is None:
            return torch.zeros_like(x)
        return self._inside(batch, random_in_ball(draws, x, self.norm) * self.eps)

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """clip(x + delta)."""
        return clip_straight_through(batch.x_BCHW + theta)

    def ascend(self, batch: Batch, theta: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Steepest ascent, then back into the ball and into [0, 1]."""
        return self._inside(batch, theta + step_size * steepest(gradient, self.norm))

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Norm of delta."""
        return ball_norm(theta, self.norm)
