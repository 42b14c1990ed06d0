"""ReColorAdv (arXiv 1906.00001): a smooth map of colours onto colours, the same for all pixels of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import RecolorThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball, clip_straight_through
from dmat_ray.types import Batch

# IEC 61966-2-1 (sRGB), white D65
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE_U, WHITE_V = 0.19783982, 0.46833630
FROM_XYZ = torch.linalg.inv(torch.tensor(TO_XYZ, dtype=torch.float64)).tolist()
# of the published grid, and of its unit; the few colours beyond it (saturated red, blue) move as those at its border do
LOW, HIGH = (0.0, -100.0, -100.0), (100.0, 100.0, 100.0)
# chromaticities u' and v' of all colours of sRGB lie between those of its primaries
U, V = (0.125, 0.4508), (0.1578, 0.5626)
DARK = 0.008856451679  # of Y, below which L is linear in it
SLOPE = 903.2962963


def rgb_to_luv(x_B3HW: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIE-LUV (CIE 1976), L in [0, 100]."""
    linear = torch.where(x_B3HW <= 0.04045, x_B3HW / 12.92, ((x_B3HW.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    x, y, z = torch.einsum("ij,bjhw->bihw", x_B3HW.new_tensor(TO_XYZ), linear).unbind(dim=1)
    lightness = torch.where(y <= DARK, SLOPE * y, 116 * y.clamp_min(DARK) ** (1 / 3) - 16)
    sums = (x + 15 * y + 3 * z).clamp_min(1e-9)
    black = y < 1e-9  # no colour: that of white
    u = torch.where(black, torch.zeros_like(x), 13 * lightness * (4 * x / sums - WHITE_U))
    v = torch.where(black, torch.zeros_like(x), 13 * lightness * (9 * y / sums - WHITE_V))
    return torch.stack([lightness, u, v], dim=1)


def luv_to_rgb(luv_B3HW: Tensor) -> Tensor:
    """CIE-LUV to sRGB, clipped to [0, 1].

    What is no colour of sRGB has its chromaticity clipped first: in the dark a small move of u and v is a large one of u' and
    v', and where v' is 0 X and Z have no end.
    """
    lightness, u, v = luv_B3HW.unbind(dim=1)
    lightness = clip_straight_through(lightness, 1e-6, 100.0)
    u, v = (clip_straight_through(c / (13 * lightness) + w, *b) for c, w, b in ((u, WHITE_U, U), (v, WHITE_V, V)))
    y = torch.where(lightness <= SLOPE * DARK, lightness / SLOPE, ((lightness + 16) / 116) ** 3)
    x, z = y * 9 * u / (4 * v), y * (12 - 3 * u - 20 * v) / (4 * v)
    linear = torch.einsum("ij,bjhw->bihw", luv_B3HW.new_tensor(FROM_XYZ), torch.stack([x, y, z], dim=1)).clamp(0.0, 1.0)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055).clamp(0, 1)


class Recolor(Ball):
    """theta is (B, 3, L, U, V): the move of each knot of a grid of colours in CIE-LUV, in shares of each axis; trilinear between
    the knots. Of grey images (B, 1, L): the moves of lightness alone, which is taken for linear in the pixels.
    """

    def __init__(self, config: RecolorThreat) -> None:
        super().__init__("linf", config.eps)
        self.grid = config.grid

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws no colour moves."""
        x = batch.x_BCHW
        shape = (3, *self.grid) if x.shape[1] == 3 else (1, self.grid[0])
        return self.within(draws, x.new_empty(len(x), *shape))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The image's colours, moved."""
        x = batch.x_BCHW
        if x.shape[1] != 3:
            places = torch.stack([torch.zeros_like(x[:, 0]), x.mean(dim=1) * 2 - 1], dim=3)
            moves = F.grid_sample(theta[:, :, :, None], places, mode="bilinear", padding_mode="border", align_corners=True)
            return (x + moves).clamp(0.0, 1.0)
        low, high = (x.new_tensor(side).view(1, 3, 1, 1) for side in (LOW, HIGH))
        luv = rgb_to_luv(x)
        shares = (luv - low) / (high - low)
        # grid_sample wants the last axis of the grid first: V, U, L
        places = (shares.flip(1) * 2 - 1).permute(0, 2, 3, 1)[:, None]
        moves = F.grid_sample(theta, places, mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]
        # of no move the rounding of there and back is left out
        return (x + luv_to_rgb(luv + moves * (high - low)) - luv_to_rgb(luv)).clamp(0.0, 1.0)
