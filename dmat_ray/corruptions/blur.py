"""Blurs: Gaussian, defocus, frosted glass, motion and zoom."""

import numpy as np
import torch
from torch import Tensor

from dmat_ray.corruptions.filters import along_axes, correlate, gaussian, gaussian_taps, separable, trail, zoom_map
from dmat_ray.rng import Draws


def gaussian_blur(x: Tensor, draws: Draws, std: float) -> Tensor:
    """x under a Gaussian."""
    return gaussian(x, std)


def defocus_blur(x: Tensor, draws: Draws, radius: float, soften: float) -> Tensor:
    """x under a disc of that radius, whose edge a small Gaussian softens."""
    reach, soft = (8, 1) if radius <= 8 else (int(radius), 2)
    steps = torch.arange(-reach, reach + 1, device=x.device)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).to(x)
    disc = separable((disc / disc.sum())[None, None], gaussian_taps(soften, soft), "mirror")[0, 0]
    return correlate(x, disc)


def glass_blur(x: Tensor, draws: Draws, std: float, reach: int, rounds: int) -> Tensor:
    """Blurred, each pixel replaced by a neighbour at most `reach` away, and blurred again.

    The published loop goes from the last pixel to the first; meant to swap two pixels, it copies one onto the other, since numpy
    hands out views. A pixel that takes from one that was replaced before gets what that one got: chains that are followed here
    for all pixels at once. Unlike there, the first blur is not rounded to 8 bits.
    """
    height, width = x.shape[2:]
    order = torch.arange(height * width, device=x.device).view(height, width)
    row, column = order // width, order % width
    inside = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    x = gaussian(x, std).flatten(2)
    moves = (draws.uniform(rounds, 2, height, width, like=x) * (2 * reach)).long().clamp(max=2 * reach - 1) - reach
    for down, right in (move.unbind(dim=1) for move in moves.unbind(dim=1)):
        taken = torch.where(inside, order + down * width + right, order).flatten(1)
        before = inside.flatten()[taken] & (taken > order.flatten())
        link = torch.where(before, taken, order.flatten())
        while not torch.equal(further := link.gather(1, link), link):
            link = further
        x = x.gather(2, taken.gather(1, link)[:, None].expand_as(x))
    return gaussian(x.unflatten(2, (height, width)), std)


def motion_blur(x: Tensor, draws: Draws, radius: int, std: float) -> Tensor:
    """x along a trail, within 45 degrees of level."""
    return trail(x, radius, std, draws.uniform(like=x) * 90 - 45)


def zoom_blur(x: Tensor, draws: Draws, end: float, step: float) -> Tensor:
    """The mean of x and of x enlarged by factors from 1 to the end."""
    factors = np.arange(1, end, step).tolist()
    total = x.clone()
    for factor in factors:
        total += along_axes(x, *(zoom_map(size, factor) for size in x.shape[2:]))
    return total / (len(factors) + 1)
