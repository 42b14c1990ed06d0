"""Fog and snow (Kang et al., "Testing robustness against unforeseen adversaries", arXiv 1908.08016).

Of fog theta holds every random number that diamond-square fog is made of, each in [0, 1], so that the attack chooses the
shape of the fog and not its density. Two things differ from the published code: the fog is normalised per image, not
over the batch, and the diamond step averages the four true neighbours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import FogThreat, SnowThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import UnitBox
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


class Fog(UnitBox):
    """theta is (B, P) in [0, 1]; render is (x + eps fog) / (max of each channel of x + eps)."""

    default_step: float | None = math.sqrt(0.001)

    def __init__(self, config: FogThreat) -> None:
        self.eps, self.wibble_decay = config.eps, config.wibble_decay

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


LAYERS = 7  # of flakes, each with a streak of its own
SPACING = 4  # pixels between places where a flake may lie
REGION = 8  # places along the side of a region of the budget
STREAK = 13  # side of a streak's kernel in pixels
HALVINGS = 30  # of a threshold for flakes' intensities, which are at most 1
REACH = 2  # flakes in each direction from whose streaks a pixel may have something


class Snow(UnitBox):
    """theta is (B, 7 h w + 21) in [0, 1]: the flakes' intensities on a grid for each layer, and the layers' streaks.

    As in the published code a layer's flakes lie on every fourth pixel, count by the fourth power of their intensity, and are
    drawn out along the layer's line; the image is bleached, and flakes are added. The streaks (angle, length, width) are drawn
    at random with the start and stay. Unlike there, the last step is projected as well, and to the closest point: to scale a
    region down, as is published, makes many dim flakes of few bright ones, which ends weaker than where it started.
    """

    default_step: float | None = math.sqrt(0.001)

    def __init__(self, config: SnowThreat) -> None:
        self.eps, self.budget = config.eps, config.budget

    @staticmethod
    def _grid(x: Tensor) -> tuple[int, int]:
        return -(-x.shape[2] // SPACING), -(-x.shape[3] // SPACING)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Few bright flakes (exponential in the budget); without draws all of them as bright as the budget lets them be."""
        x = batch.x_BCHW
        height, width = self._grid(x)
        flakes = LAYERS * height * width
        if draws is None:
            return torch.cat([x.new_full((len(x), flakes), self.budget), x.new_full((len(x), 3 * LAYERS), 0.5)], dim=1)
        drawn = draws.uniform(flakes + 3 * LAYERS, like=x)
        return self.project(batch, torch.cat([torch.exp(-drawn[:, :flakes] / self.budget), drawn[:, flakes:]], dim=1))

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """The closest point in [0, 1] whose mean in each region of each layer is within the budget.

        There all flakes of a region are less by one threshold, then clipped (as `balls.project_l1_in_box` has it).
        """
        height, width = self._grid(batch.x_BCHW)
        flakes, streaks = theta.split([LAYERS * height * width, 3 * LAYERS], dim=1)
        grid = flakes.view(-1, LAYERS, height, width)

        def less(threshold: Tensor) -> Tensor:
            spread = threshold.repeat_interleave(REGION, 2).repeat_interleave(REGION, 3)[:, :, :height, :width]
            reduced: Tensor = (grid - spread).clamp(0.0, 1.0)
            return reduced

        enough = F.max_pool2d(grid, REGION, ceil_mode=True).clamp_min(0.0)
        too_little = torch.zeros_like(enough)
        inside = self._means(less(too_little)) <= self.budget
        for _ in range(HALVINGS):
            middle = (too_little + enough) / 2
            fits = self._means(less(middle)) <= self.budget
            enough, too_little = torch.where(fits, middle, enough), torch.where(fits, too_little, middle)
        found = less(torch.where(inside, torch.zeros_like(enough), enough))
        return torch.cat([found.flatten(1), streaks.clamp(0.0, 1.0)], dim=1)

    @staticmethod
    def _means(grid: Tensor) -> Tensor:
        """Mean intensity of each region, (B, 7, rows, columns)."""
        return F.avg_pool2d(grid, REGION, ceil_mode=True, count_include_pad=False)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """1 or less means inside the box and the budget."""
        height, width = self._grid(batch.x_BCHW)
        grid = theta[:, : LAYERS * height * width].view(-1, LAYERS, height, width)
        used = self._means(grid).flatten(1).amax(dim=1) / self.budget
        return torch.maximum(super().distance(batch, theta), used)

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The bleached image under snow."""
        x = batch.x_BCHW
        height, width = self._grid(x)
        flakes, streaks = theta.split([LAYERS * height * width, 3 * LAYERS], dim=1)
        grid = (flakes**4).reshape(1, -1, height, width)
        kernels = _phases(_streaks(streaks.detach().view(-1, LAYERS, 3)))
        fallen = F.conv2d(grid, kernels, padding=REACH, groups=len(x)).view(len(x), -1, height, width)
        snow = F.pixel_shuffle(fallen, SPACING)[:, :, : x.shape[2], : x.shape[3]]
        grey = luminance(x)
        bleached = 0.75 * x + 0.25 * torch.maximum(x, 1.5 * grey + 0.5)
        return (bleached + self.eps * snow).clamp(0.0, 1.0)


def luminance(x_BCHW: Tensor) -> Tensor:
    """Rec. 709 luma of (linear) colour images, (B, 1, H, W); grey images as they are."""
    if x_BCHW.shape[1] != 3:
        return x_BCHW.mean(dim=1, keepdim=True)
    weights = x_BCHW.new_tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)
    return (x_BCHW * weights).sum(dim=1, keepdim=True)


def _streaks(parameters_BK3: Tensor) -> Tensor:
    """A kernel for each layer, (B, K, 13, 13): a line through the middle, about diagonal, with soft edges."""
    along, length, broad = parameters_BK3.unbind(dim=2)
    # half of the images have snow from the left, the others from the right; widths 1, 3, 5 as often as published
    side = torch.where(along[:, :1] < 0.5, 1.0, -1.0)
    angle = side * (math.pi / 4 + (along * 2 % 1 - 0.5) * math.pi / 4)
    half_length = 4 + 4 * length
    half_width = torch.where(broad < 0.6, 0.5, torch.where(broad < 0.9, 1.5, 2.5)).to(parameters_BK3)
    steps = torch.arange(STREAK, device=parameters_BK3.device, dtype=parameters_BK3.dtype) - STREAK // 2
    rows, columns = steps.view(1, 1, -1, 1), steps.view(1, 1, 1, -1)
    cosine, sine = angle.cos()[..., None, None], angle.sin()[..., None, None]
    on, off = (columns * cosine + rows * sine).abs(), (rows * cosine - columns * sine).abs()
    return (half_length[..., None, None] - on + 0.5).clamp(0, 1) * (half_width[..., None, None] - off + 0.5).clamp(0, 1)


def _phases(kernels_BKSS: Tensor) -> Tensor:
    """The same streaks as kernels over the flakes instead of the pixels, (B 16, 7, 5, 5): for each of the 4x4 pixels between
    flakes what it has of each layer's flakes around it. Most pixels have no flake: this spares their share of the products.
    """
    layers, device = torch.arange(LAYERS, device=kernels_BKSS.device), kernels_BKSS.device
    # four layers begin at four columns, the others at three more rows
    top, left = (layers - 3).clamp_min(0), torch.where(layers < 4, layers, torch.zeros_like(layers))
    margin = SPACING * REACH  # of zeros around a streak, for pixels out of its reach
    padded = F.pad(kernels_BKSS, (margin,) * 4)
    offset = SPACING * torch.arange(-REACH, REACH + 1, device=device) - torch.arange(SPACING, device=device)[:, None]
    rows, columns = (offset + start[:, None, None] + STREAK // 2 + margin for start in (top, left))  # (layer, pixel, flake)
    taps = padded[:, layers[:, None, None, None, None], rows[:, :, None, :, None], columns[:, None, :, None, :]]
    return taps.permute(0, 2, 3, 1, 4, 5).reshape(-1, LAYERS, 2 * REACH + 1, 2 * REACH + 1)
