"""Displacements: elastic (arXiv 1908.08016), StAdv (arXiv 1801.02612), and glitch (arXiv 1908.08016, third version)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import ElasticThreat, GlitchThreat, StAdvThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball
from dmat_ray.types import Batch


def resample(x_BCHW: Tensor, rows_BHW: Tensor, columns_BHW: Tensor, padding: str) -> Tensor:
    """x at the places that lie so many pixels below and to the right of each pixel, bilinear; no displacement is no change."""
    height, width = x_BCHW.shape[2:]
    down = torch.arange(height, dtype=x_BCHW.dtype, device=x_BCHW.device).view(1, -1, 1) + rows_BHW
    right = torch.arange(width, dtype=x_BCHW.dtype, device=x_BCHW.device).view(1, 1, -1) + columns_BHW
    # -1 and 1 are the middles of the outermost pixels
    grid = torch.stack([right * 2 / max(width - 1, 1) - 1, down * 2 / max(height - 1, 1) - 1], dim=3)
    return F.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode=padding, align_corners=True).clamp(0.0, 1.0)


class Elastic(Ball):
    """theta is (B, 2, H, W), displacements in pixels, which a Gaussian smooths before they are used.

    The published code lays a grid for one alignment of corners and samples with another, which alone moves pixels.
    """

    def __init__(self, config: ElasticThreat) -> None:
        super().__init__("linf", config.eps)
        self.std = config.std

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws no displacement."""
        x = batch.x_BCHW
        return self.within(draws, x.new_empty(len(x), 2, *x.shape[2:]))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The image resampled along the smoothed flow."""
        rows, columns = self._smoothed(theta).unbind(dim=1)
        return resample(batch.x_BCHW, rows, columns, "border")

    def _smoothed(self, flow: Tensor) -> Tensor:
        """The flow under a Gaussian of 8 standard deviations' width, mirrored at the border; columns, then rows."""
        height, width = flow.shape[2:]
        return self._smoothing(height, flow).T @ flow @ self._smoothing(width, flow)

    def _smoothing(self, side: int, like: Tensor) -> Tensor:
        """(side, side): what becomes of each unit vector. A product with it is quicker than a convolution that wide."""
        reach = min(math.ceil(4 * self.std), side - 1)
        places = torch.arange(-reach, reach + 1, dtype=like.dtype, device=like.device)
        kernel = torch.exp(-0.5 * (places / self.std) ** 2)
        units = torch.eye(side, dtype=like.dtype, device=like.device)[:, None]
        return F.conv1d(F.pad(units, (reach, reach), mode="reflect"), (kernel / kernel.sum()).view(1, 1, -1))[:, 0]


class StAdv(Ball):
    """theta is (B, 2, H, W), displacements in half image sides.

    Each pixel is displaced by itself. Where it has come to lie in a flat part of the image it feels no slope, and would stay: it
    goes back to its place, from where it may get to the other side. Without that a search is far weaker than the published one
    (tests/threats/test_published_attacks.py): where a pixel starts decides to which side it can go.
    """

    def __init__(self, config: StAdvThreat) -> None:
        super().__init__("linf", config.eps)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws no displacement."""
        x = batch.x_BCHW
        return self.within(draws, x.new_empty(len(x), 2, *x.shape[2:]))

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """The sign; back to its place for a pixel without a slope."""
        return torch.where(gradient == 0, -theta.sign(), gradient.sign())

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The image resampled along the flow."""
        height, width = theta.shape[2:]
        return resample(batch.x_BCHW, theta[:, 0] * (height - 1) / 2, theta[:, 1] * (width - 1) / 2, "border")


class Glitch(Ball):
    """theta is (B, C, L): by how many half image widths each channel of each stripe of rows is shifted."""

    def __init__(self, config: GlitchThreat) -> None:
        super().__init__("linf", config.eps)
        self.lines = config.lines

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws no shift."""
        x = batch.x_BCHW
        return self.within(draws, x.new_empty(*x.shape[:2], min(self.lines, x.shape[2])))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """Each row of each channel resampled along its stripe's shift, mirrored at the border."""
        x = batch.x_BCHW
        height, width = x.shape[2:]
        stripe = torch.arange(height, device=x.device) * theta.shape[2] // height
        shift = theta[:, :, stripe].flatten(0, 1)[:, :, None].expand(-1, -1, width) * (width - 1) / 2
        channels = x.flatten(0, 1)[:, None]
        return resample(channels, torch.zeros_like(shift), shift, "reflection").view_as(x)
