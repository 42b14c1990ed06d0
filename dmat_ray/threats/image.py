"""Balls around the pixels: clip(x + delta), with delta in an L-infinity, L2 or L1 ball."""

import torch
from torch import Tensor

from dmat_ray.config import ImageThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball, clip_straight_through, project_ball, project_l1_in_box
from dmat_ray.types import Batch


class ImageBall(Ball):
    """theta is delta, of the shape of x."""

    def __init__(self, config: ImageThreat) -> None:
        super().__init__(config.norm, config.eps)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the ball, then clipped; zero without draws."""
        return self.project(batch, self.within(draws, batch.x_BCHW))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """clip(x + delta).

        `project` keeps this inside [0, 1] up to rounding; a pixel that rounding puts at 1 + 6e-8 must not lose its gradient.
        """
        return clip_straight_through(batch.x_BCHW + theta)

    def sparse_direction(self, batch: Batch, theta: Tensor, gradient: Tensor, sparse_B: Tensor | None = None) -> Tensor:
        """Steepest ascent; in L1 among the pixels that are not at the border they would be moved across."""
        if self.norm == "l1":
            moved = batch.x_BCHW + theta
            gradient = gradient * torch.where(gradient > 0, moved < 1, moved > 0)
        return super().sparse_direction(batch, theta, gradient, sparse_B)

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """Into the ball and x + delta into [0, 1]: in L1 to the closest such point; in L2 clipping only shortens delta."""
        x = batch.x_BCHW
        if self.norm == "l1":
            return project_l1_in_box(theta, self.eps, -x, 1 - x)
        return (x + project_ball(theta, self.norm, self.eps)).clamp(0.0, 1.0) - x
