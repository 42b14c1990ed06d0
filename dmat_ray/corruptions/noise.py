"""Noises: Gaussian, shot, impulse and speckle, for every channel of every pixel by itself."""

import torch
from torch import Tensor

from dmat_ray.rng import Draws


def gaussian_noise(x: Tensor, draws: Draws, std: float) -> Tensor:
    """x + std n."""
    return x + std * draws.normal(*x.shape[1:], like=x)


def shot_noise(x: Tensor, draws: Draws, photons: float) -> Tensor:
    """A Poisson count of mean photons x, over photons.

    The count is found from one uniform number by inversion, so that an image that differs by rounding gets the same noise.
    """
    rate = x.double() * photons
    drawn = draws.uniform(*x.shape[1:], like=rate)
    count, counted = torch.zeros_like(rate), 0
    chance = torch.exp(-rate)
    up_to = chance.clone()
    while bool((more := up_to <= drawn).any()):
        counted += 1
        count += more
        chance.mul_(rate).div_(counted)
        up_to += chance
    return (count / photons).to(x)


def impulse_noise(x: Tensor, draws: Draws, amount: float) -> Tensor:
    """A share of all values becomes 0 or 1, as likely."""
    drawn = draws.uniform(2, *x.shape[1:], like=x)
    return torch.where(drawn[:, 0] < amount, (drawn[:, 1] < 0.5).to(x), x)


def speckle_noise(x: Tensor, draws: Draws, std: float) -> Tensor:
    """x + x std n."""
    return x + x * std * draws.normal(*x.shape[1:], like=x)
