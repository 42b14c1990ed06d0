"""Spatter: drops of water or mud on the lens."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.corruptions.filters import correlate, gaussian, luma, separable
from dmat_ray.rng import Draws

WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
FAR = 20  # pixels from a drop's rim beyond which water looks the same
WEAK, STRONG = 50, 150  # slopes of Canny's edges
TAN_22 = 13573 / 2**15  # of 22.5 degrees, as OpenCV rounds it
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
EMBOSS = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))
THIRDS = (1 / 3, 1 / 3, 1 / 3)


def spatter(x: Tensor, draws: Draws, mean: float, std: float, blur: float, least: float, strength: float, mud: int) -> Tensor:
    """Drops of water (which shine, and are added) or of mud (which cover) where blurred noise is high.

    The published code measures the distance from the rims of drops of water with OpenCV's approximation, here it is Euclid's.
    """
    liquid = gaussian(mean + std * draws.normal(1, *x.shape[2:], like=x), blur)
    liquid = torch.where(liquid < least, 0.0, liquid).clamp(max=1.0)
    colour = x.new_tensor(MUD if mud else WATER).view(1, 3, 1, 1)
    colour = luma(colour) if x.shape[1] == 1 else colour
    if mud:
        cover = gaussian((liquid > least).to(x), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + colour * cover
    level = (liquid * 255).floor()
    shine = level * _relief(_edges(level))
    return x + strength * colour * shine / shine.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)


def _edges(level_B1HW: Tensor) -> Tensor:
    """Canny's edges, bool, of levels 0 to 255: crests of the slope that are strong, or weak and next to an edge."""
    height, width = level_B1HW.shape[2:]
    wide = F.pad(level_B1HW, (1, 1, 1, 1), mode="replicate")
    sobel = level_B1HW.new_tensor(SOBEL)
    right, down = F.conv2d(wide, torch.stack([sobel, sobel.T])[:, None]).unbind(dim=1)
    slope = right.abs() + down.abs()
    around = F.pad(slope, (1, 1, 1, 1))

    def at(rows: int, columns: int) -> Tensor:
        return around[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    crest_level = (slope > at(0, -1)) & (slope >= at(0, 1))
    crest_upright = (slope > at(-1, 0)) & (slope >= at(1, 0))
    crest_falling = (slope > at(-1, -1)) & (slope > at(1, 1))
    crest_rising = (slope > at(-1, 1)) & (slope > at(1, -1))
    crest = torch.where((right < 0) == (down < 0), crest_falling, crest_rising)
    crest = torch.where(down.abs() > (TAN_22 + 2) * right.abs(), crest_upright, crest)
    crest = torch.where(down.abs() < TAN_22 * right.abs(), crest_level, crest) & (slope > WEAK)
    edge = crest & (slope > STRONG)
    while not torch.equal(grown := crest & (F.max_pool2d(edge.float(), 3, stride=1, padding=1) > 0), edge):
        edge = grown
    return edge[:, None]


def _relief(rim_B1HW: Tensor) -> Tensor:
    """Distances from the rims, equalised and embossed, 0 to 255."""
    squares = torch.where(rim_B1HW, 0.0, float(FAR**2))
    for dim, padding in ((2, (0, 0, FAR, FAR)), (3, (FAR, FAR, 0, 0))):
        wide, size = F.pad(squares, padding, value=float(FAR**2)), squares.shape[dim]
        squares = functools.reduce(torch.minimum, (wide.narrow(dim, FAR + i, size) + i * i for i in range(-FAR, FAR + 1)))
    # a little more, so that whole numbers stay themselves when they are cut
    level = (separable(squares.clamp(max=FAR**2).sqrt(), THIRDS, "mirror") + 1e-4).long().flatten(1)
    count = level.new_zeros(len(level), 256).scatter_add_(1, level, torch.ones_like(level))
    lowest = count.gather(1, level.amin(dim=1, keepdim=True))
    rank = 255 * (count.cumsum(dim=1) - lowest) / (level.shape[1] - lowest).clamp_min(1)
    equal = rank.round().clamp_min(0).gather(1, level).view_as(squares)
    return separable(correlate(equal, squares.new_tensor(EMBOSS)).clamp(0, 255), THIRDS, "mirror")
