"""Normal noise without a generator's state: a number is a function of (key, step, place), computed where it is used.

`rng.Draws` keeps a NumPy stream an image, whose numbers are made one image after the other on the host and then moved. A
search over w needs fresh ones every step, for images that each are at a step of their own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, doi 10.1145/2660193.2660195): the increment and the two multipliers, as signed numbers
GAMMA, FIRST, SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
UNIT = 2.0**-24  # 24 bits are what a float32 in [0, 1) holds evenly


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros moving in, which for int64 is not what torch does."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key_B: Tensor, first_B: Tensor, count: int) -> Tensor:
    """int64 (B, count): numbers `first_B` + 0, 1, ... of the SplitMix64 stream that starts at `key_B`; products wrap."""
    place = first_B[:, None] + torch.arange(1, count + 1, device=key_B.device)
    x = key_B[:, None] + place * GAMMA
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def normal(key_B: Tensor, step_B: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, *shape), standard normal float32 by Box and Muller, for int64 keys and steps, on their device.

    The same (key, step) gives the same numbers up to the rounding of log, sine and cosine, whatever stands beside it.
    """
    size = math.prod(shape)
    pairs = (size + 1) // 2
    bits = random_bits(key_B, step_B * pairs, pairs)
    # (0, 1], so that the logarithm is finite
    radius = (((bits >> 40) & 0xFFFFFF) + 1).float().mul_(UNIT).log_().mul_(-2.0).sqrt_()
    angle = ((bits >> 8) & 0xFFFFFF).float().mul_(2.0 * math.pi * UNIT)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :size].reshape(-1, *shape)
