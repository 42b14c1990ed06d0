"""Fog (Kang et al., "Testing robustness against unforeseen adversaries", arXiv 1908.08016).

theta holds every random number that diamond-square fog is made of, each in [0, 1], so that the attack chooses the
shape of the fog and not its density. Two things differ from the published code: the fog is normalised per image, not
over the batch, and the diamond step averages the four true neighbours.
"""

import math

import torch
from torch import Tensor

from dmat_ray.config import FogThreat
from dmat_ray.rng import Draws
from dmat_ray.types import Batch


def num_fog_values(size: int) -> int:
    """Random numbers that a fog map of `size` (a power of two) takes: three per new point of each level."""
    return sum(3 * 4**k for k in range(int(math.log2(size))))


def diamond_square(theta_BP: Tensor, size: int, wibble_decay: float) -> Tensor:
    """Plasma fractal on a torus, (B, 1, size, size) scaled to [0, 1] per image.

    Each level halves the spacing: the middle of a square is the mean of its corners plus a wibble in [-1, 1], the
    middle of an edge the mean of its four neighbours plus a wibble, and the wibble shrinks by `wibble_decay`.
    """
    b, used, wibble = theta_BP.shape[0], 0, 1.0
    grid = theta_BP.new_zeros(b, 1, 1)
    while grid.shape[1] < size:
        n = grid.shape[1]
        noise = (theta_BP[:, used : used + 3 * n * n].view(b, 3, n, n) * 2 - 1) * wibble
        used += 3 * n * n
        below, right = torch.roll(grid, -1, 1), torch.roll(grid, -1, 2)
        centre = (grid + below + right + torch.roll(below, -1, 2)) / 4 + noise[:, 0]
        top = (grid + right + centre + torch.roll(centre, 1, 1)) / 4 + noise[:, 1]
        left = (grid + below + centre + torch.roll(centre, 1, 2)) / 4 + noise[:, 2]
        rows = torch.stack([torch.stack([grid, top], dim=3), torch.stack([left, centre], dim=3)], dim=2)
        grid = rows.reshape(b, 2 * n, 2 * n)
        wibble /= wibble_decay
    low, high = grid.amin(dim=(1, 2), keepdim=True), grid.amax(dim=(1, 2), keepdim=True)
    return ((grid - low) / (high - low).clamp_min(1e-12))[:, None]


class Fog:
    """theta is (B, P) in [0, 1]; render is (x + eps fog) / (max of each channel of x + eps)."""

    limit = 1.0

    def __init__(self, config: FogThreat) -> None:
        self.eps, self.wibble_decay = config.eps, config.wibble_decay
        self.default_step: float | None = math.sqrt(0.001)

    @staticmethod
    def _size(x: Tensor) -> int:
        # the fog is made larger than the image and cropped, so that its torus does not show
        return int(2 ** (math.floor(math.log2(max(x.shape[2:]))) + 1))

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the box; without draws its middle, which is no fog pattern at all."""
        x = batch.x_BCHW
        values = num_fog_values(self._size(x))
        return x.new_full((len(x), values), 0.5) if draws is None else draws.uniform(values, like=x)

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The image under fog."""
        x = batch.x_BCHW
        size = self._size(x)
        top, left = (size - x.shape[2]) // 2, (size - x.shape[3]) // 2
        fog = diamond_square(theta, size, self.wibble_decay)[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        brightest = x.amax(dim=(2, 3), keepdim=True)
        return ((x + self.eps * fog) / (brightest + self.eps).clamp_min(1e-12)).clamp(0.0, 1.0)

    def ascend(self, batch: Batch, theta: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Sign step, back into the box."""
        return (theta + step_size * gradient.sign()).clamp(0.0, 1.0)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Largest coordinate: 1 or less means inside the box (0 or more by construction)."""
        return (theta - 0.5).abs().flatten(1).amax(dim=1) + 0.5
