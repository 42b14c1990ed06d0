"""Textures laid over the image: Gabor noise (arXiv 1908.08016), and wood, kaleidoscope and pixels of its third version.

What the published code draws at random beside what it searches (kernels, places, shapes) is drawn here with the start, lies in
theta beside the rest, and gets no gradient: so that an attack is a function of the example and the seed, and stays one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import GaborThreat, KaleidoscopeThreat, PixelThreat, WoodThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball, UnitBox, project_ball, steepest
from dmat_ray.types import Batch

KERNEL, SIDES = 23, 10  # pixels of a Gabor kernel, and how many waves it has at most


class Gabor(UnitBox):
    """theta is (B, 2 H W + 4) in [0, 1]: the impulses' sizes (0.5 is none), where they are, and the kernel.

    An impulse is where its place's number lies below `density`. Unlike the published code, which adds noise where there is none
    (its mask is inverted), only impulses are moved.
    """

    default_step: float | None = math.sqrt(0.001)

    def __init__(self, config: GaborThreat) -> None:
        self.eps, self.density = config.eps, config.density

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Everything uniform, sizes near none; without draws impulses on a lattice, all of one size.

        Noise is scaled to one range whatever its impulses' sizes: small ones make the same noise, and are outweighed sooner.
        """
        x = batch.x_BCHW
        height, width = x.shape[2:]
        if draws is not None:
            drawn = draws.uniform(2 * height * width + 4, like=x)
            sizes = 0.5 + 0.1 * (drawn[:, : height * width] - 0.5)
            return torch.cat([sizes, drawn[:, height * width :]], dim=1)
        lattice = x.new_ones(height, width)
        lattice[::4, ::4] = 0.0
        parts = [x.new_full((height * width,), 0.75), lattice.flatten(), x.new_full((4,), 0.5)]
        return torch.cat(parts).expand(len(x), -1).clone()

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """clip(x + eps noise), noise in [0, 1] and the same in all channels."""
        x = batch.x_BCHW
        height, width = x.shape[2:]
        sizes, places, kernel = theta.split([height * width, height * width, 4], dim=1)
        impulses = (sizes * 2 - 1) * (places.detach() < self.density)
        field = _spread(impulses.view(-1, 1, height, width), gabor_kernel(kernel.detach()))
        return (x + self.eps * _equalised(field)).clamp(0.0, 1.0)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Of the sizes, which alone are searched."""
        return super().distance(batch, theta[:, : batch.x_BCHW[0, 0].numel()])


def gabor_kernel(parameters_B4: Tensor) -> Tensor:
    """(B, 1, 23, 23): waves of one length under a Gaussian, in 1 to 10 evenly spread directions.

    The four numbers in [0, 1] are those of directions, the Gaussian's width (0.1 to 0.4 of the kernel), the wave number (3 to
    5.75) and the first direction.
    """
    sides, width, number, turn = (p.view(-1, 1, 1, 1) for p in parameters_B4.unbind(dim=1))
    sides = (sides * SIDES).floor().clamp(max=SIDES - 1) + 1
    sigma, wave = 0.1 + 0.3 * width + 1e-3, 3 + (KERNEL / 4 - 3) * number
    places = torch.linspace(-0.5, 0.5, KERNEL, dtype=parameters_B4.dtype, device=parameters_B4.device)
    rows, columns = places.view(1, 1, -1, 1), places.view(1, 1, 1, -1)
    envelope = torch.exp(-0.5 * (rows**2 + columns**2) / sigma**2)
    side = torch.arange(SIDES, dtype=parameters_B4.dtype, device=parameters_B4.device).view(1, -1, 1, 1)
    angle = math.pi * (turn + side / sides)
    waves = torch.cos(2 * math.pi * wave * (columns * angle.cos() + rows * angle.sin()))
    return (waves * (side < sides)).sum(dim=1, keepdim=True) * envelope


def _spread(impulses_B1HW: Tensor, kernels_B1KK: Tensor) -> Tensor:
    """Each image under its own kernel, by FFT: a convolution with kernels of this size takes many times as long.

    The kernels are the same after a half turn, which spares turning them.
    """
    sides, margin = impulses_B1HW.shape[2:], KERNEL // 2
    lengths = [-(-(side + 2 * margin) // 16) * 16 for side in sides]  # of which an FFT is quick
    product = torch.fft.rfft2(impulses_B1HW, s=lengths) * torch.fft.rfft2(kernels_B1KK, s=lengths)
    whole: Tensor = torch.fft.irfft2(product, s=lengths)
    return whole[:, :, margin : margin + sides[0], margin : margin + sides[1]]


def _equalised(field_B1HW: Tensor) -> Tensor:
    """Waves of nearly one height whatever the impulses beneath them, scaled to [0, 1] in each image.

    The gradient takes what it subtracts and divides by for constants, as in the published code: the exact one nearly vanishes
    everywhere but where waves cross zero, and attacks with it are far weaker.
    """
    mean = field_B1HW.mean(dim=(1, 2, 3), keepdim=True)
    field = field_B1HW - mean.detach()
    size = field.detach().abs()
    level = field * (1.001 / (0.001 * size.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) + size))
    low, high = (side.detach() for side in (level.amin(dim=(1, 2, 3), keepdim=True), level.amax(dim=(1, 2, 3), keepdim=True)))
    return (level - low) / (high - low).clamp_min(1e-12)


class Wood(Ball):
    """theta is (B, 1, h, w): by how much the rings are displaced on a grid, between whose points it is bilinear."""

    EXPONENT = 1 / 8  # rings are thin

    def __init__(self, config: WoodThreat) -> None:
        super().__init__("linf", config.eps)
        self.rings, self.cells = config.rings, config.cells

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws round rings."""
        x = batch.x_BCHW
        return self.within(draws, x.new_empty(len(x), 1, min(self.cells, x.shape[2]), min(self.cells, x.shape[3])))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """x |sin(pi rings (r + theta))|^(1/8), r the distance from the middle in half image sides."""
        x = batch.x_BCHW
        height, width = x.shape[2:]
        rows = (torch.arange(height, dtype=x.dtype, device=x.device) * 2 / height - 1).view(-1, 1)
        columns = (torch.arange(width, dtype=x.dtype, device=x.device) * 2 / width - 1).view(1, -1)
        displaced = F.interpolate(theta, (height, width), mode="bilinear") + (rows**2 + columns**2).sqrt()
        # away from zero, where the power has no slope
        dark = torch.sin(math.pi * self.rings * displaced).abs().clamp_min(1e-4) ** self.EXPONENT
        return (x * dark).clamp(0.0, 1.0)


class Kaleidoscope(Ball):
    """theta is (B, 3 K + H W + 7 K): how far each shape's colour is from the one drawn for it, and how bright each pixel of an
    outline is, both as shares of eps; then, fixed, that colour (hue, saturation, value), the shape's place, turn and kind, each
    in [0, 1]. Discs, triangles and squares.

    As in the published code, colours add up where shapes overlap, and outlines lie over all of them.
    """

    RADIUS = (0.5, 1.0, 0.5**0.5)  # of the circle around a disc, a triangle and a square, in sizes
    FIXED = 7

    def __init__(self, config: KaleidoscopeThreat) -> None:
        super().__init__("linf", 1.0)
        self.eps, self.shapes = config.eps, config.shapes
        self.size, self.transparency, self.outline = config.size, config.transparency, config.outline

    def _fixed(self) -> int:
        """How many numbers at the end of theta are not searched."""
        return self.FIXED * self.shapes

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Everything uniform; without draws all shapes are squares of one colour on a diagonal."""
        x = batch.x_BCHW
        pixels = x[0, 0].numel()
        if draws is not None:
            drawn = draws.uniform(3 * self.shapes + pixels + self._fixed(), like=x)
            moves, rest = drawn.split([3 * self.shapes, pixels + self._fixed()], dim=1)
            return torch.cat([moves * 2 - 1, rest], dim=1)
        fixed = x.new_full((self.shapes, self.FIXED), 0.5)
        fixed[:, 6] = 1.0
        fixed[:, 3] = fixed[:, 4] = (torch.arange(self.shapes).to(x) + 0.5) / self.shapes
        whole = torch.cat([x.new_zeros(3 * self.shapes), x.new_full((pixels,), 0.5), fixed.flatten()])
        return whole.expand(len(x), -1).clone()

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """What is searched into its box; what is fixed is left as it is."""
        searched, fixed = theta[:, : -self._fixed()], theta[:, -self._fixed() :]
        return torch.cat([searched.clamp(-1.0, 1.0), fixed.clamp(0.0, 1.0)], dim=1)

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """The sign, of what is searched."""
        sign = gradient.sign()
        sign[:, -self._fixed() :] = 0.0
        return sign

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Of what is searched."""
        return super().distance(batch, theta[:, : -self._fixed()])

    def length(self, batch: Batch, theta: Tensor, move: Tensor) -> Tensor:
        """Of the move of what is searched."""
        return super().length(batch, theta, move[:, : -self._fixed()])

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """The image under the shapes, and these under their outlines."""
        x, count = batch.x_BCHW, self.shapes
        moves, bright, fixed = theta.split([3 * count, x[0, 0].numel(), self._fixed()], dim=1)
        fixed = fixed.detach().view(-1, count, self.FIXED)
        # of lively colours: saturation 0.7 to 1, value 0.8 to 1
        colours = hsv_to_rgb(fixed[:, :, 0], 0.7 + 0.3 * fixed[:, :, 1], 0.8 + 0.2 * fixed[:, :, 2])
        colours = colours + self.eps * moves.view(-1, count, 3)
        if x.shape[1] != 3:
            colours = colours.mean(dim=2, keepdim=True).expand(-1, -1, x.shape[1])
        shapes, outlines = self.covers(fixed[:, :, 3:], x)
        covered, outlined = (cover.amax(dim=1, keepdim=True) for cover in (shapes, outlines))
        painted = torch.einsum("bkhw,bkc->bchw", shapes, colours)
        under = x * (1 - covered * (1 - self.transparency)) + painted
        return torch.where(outlined > 0, self.eps * bright.abs().view_as(x[:, :1]), under).clamp(0.0, 1.0)

    def covers(self, fixed_BK4: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each shape, and its outline, covers each pixel: two of (B, K, H, W), 0 or 1."""
        shapes = (self._inside(fixed_BK4, x) > 0).to(x)
        width = max(1, round(self.outline * min(x.shape[2:]))) if self.outline else 0
        grown = F.max_pool2d(shapes, (2 * width + 1, 1), stride=1, padding=(width, 0))
        return shapes, F.max_pool2d(grown, (1, 2 * width + 1), stride=1, padding=(0, width)) - shapes

    def _inside(self, fixed_BK4: Tensor, x: Tensor) -> Tensor:
        """How many pixels each pixel lies inside each shape's border, (B, K, H, W); negative outside."""
        height, width = x.shape[2:]
        row, column, turn, kind = (p[:, :, None, None] for p in fixed_BK4.unbind(dim=2))
        disc, triangle, square = (self.size * min(height, width) * radius for radius in self.RADIUS)
        radius = torch.where(kind < 1 / 3, disc, torch.where(kind < 2 / 3, triangle, square)).to(x)
        # discs may be cut off by the border
        margin = torch.where(kind < 1 / 3, 0.0, radius.clamp(max=min(height, width) / 2))
        rows = torch.arange(height, dtype=x.dtype, device=x.device).view(1, 1, -1, 1) + 0.5 - margin - row * (height - 2 * margin)
        columns = (
            torch.arange(width, dtype=x.dtype, device=x.device).view(1, 1, 1, -1) + 0.5 - margin - column * (width - 2 * margin)
        )
        # of a polygon the distance to the nearest of its sides; a triangle has its last one twice
        corners = torch.where(kind < 2 / 3, 3.0, 4.0).to(x)
        angles = [2 * math.pi * (turn + (corners - 1).clamp(max=side) / corners) for side in range(4)]
        across = columns * angles[0].cos() + rows * angles[0].sin()
        for angle in angles[1:]:
            across = torch.maximum(across, columns * angle.cos() + rows * angle.sin())
        return torch.where(kind < 1 / 3, radius - (rows**2 + columns**2).sqrt(), radius * torch.cos(math.pi / corners) - across)


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (..., 3) in [0, 1]."""
    turn = hue[..., None] * 6 + hue.new_tensor([5.0, 3.0, 1.0])
    fall = torch.minimum(turn % 6, 4 - turn % 6).clamp(0.0, 1.0)
    return value[..., None] * (1 - saturation[..., None] * fall)


class Pixel:
    """theta is (B, C, h, w) in [0, 1], a ball of `norm` around 0 cut off by it: the share of one colour in each block.

    The colour is that of the block's first pixel, and each channel has a share of its own, as in the published code.
    """

    default_step: float | None = None

    def __init__(self, config: PixelThreat) -> None:
        self.norm, self.eps, self.size, self.limit = config.norm, config.eps, config.size, config.eps
        self.span = min(config.eps, 1.0) if config.norm == "linf" else config.eps

    def _side(self, x: Tensor) -> int:
        return max(2, round(self.size * min(x.shape[2:])))

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the box, then into the ball; without draws no change."""
        x = batch.x_BCHW
        side = self._side(x)
        shape = (x.shape[1], -(-x.shape[2] // side), -(-x.shape[3] // side))
        return x.new_zeros(len(x), *shape) if draws is None else self.project(batch, draws.uniform(*shape, like=x))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """Each block blended with its first pixel."""
        x, side = batch.x_BCHW, self._side(batch.x_BCHW)
        height, width = x.shape[2:]

        def spread(blocks: Tensor) -> Tensor:
            return blocks.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]

        return torch.lerp(x, spread(x[:, :, ::side, ::side]), spread(theta)).clamp(0.0, 1.0)

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """Steepest ascent among the blocks that are not at the border they would be moved across."""
        return steepest(gradient * torch.where(gradient > 0, theta < 1, theta > 0), self.norm)

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """Into the box, then into the ball, which leaves it in the box."""
        return project_ball(theta.clamp(0.0, 1.0), self.norm, self.eps)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Norm of theta."""
        return theta.flatten(1).abs().amax(dim=1) if self.norm == "linf" else theta.flatten(1).norm(dim=1)
