"""Weather: snow, fog and brightness."""

import math

import torch
from torch import Tensor

from dmat_ray.corruptions.filters import along_axes, luma, trail, zoom_map
from dmat_ray.rng import Draws
from dmat_ray.threats.weather import diamond_square, num_fog_values


def snow(
    x: Tensor, draws: Draws, mean: float, std: float, zoom: float, least: float, radius: int, length: float, keep: float
) -> Tensor:
    """Flakes of enlarged noise, drawn out along a trail within 45 degrees of upright, added to a bleached image.

    They are added once as they are and once turned by half a circle.
    """
    flakes = mean + std * draws.normal(1, *x.shape[2:], like=x)
    flakes = along_axes(flakes, *(zoom_map(size, zoom) for size in x.shape[2:]))
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0.0, 1.0)
    flakes = trail(flakes, radius, length, draws.uniform(like=x) * 90 - 135)
    bleached = torch.maximum(x, 1.5 * luma(x) + 0.5)
    return keep * x + (1 - keep) * bleached + flakes + flakes.flip((2, 3))


def fog(x: Tensor, draws: Draws, density: float, decay: float) -> Tensor:
    """(x + density fog) m / (m + density), where m is the brightest value of the image; the fog is a plasma fractal.

    The published code multiplies its random numbers by their scale twice, so that they shrink by decay^2 a level.
    """
    size = 2 ** math.ceil(math.log2(max(x.shape[2:])))
    plasma = diamond_square(draws.uniform(num_fog_values(size), like=x), size, decay**2)
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + density * plasma[:, :, : x.shape[2], : x.shape[3]]) * brightest / (brightest + density)


def brightness(x: Tensor, draws: Draws, more: float) -> Tensor:
    """Value of HSV plus `more`; hue and saturation stay."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + more).clamp(max=1.0)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-12), brighter)
