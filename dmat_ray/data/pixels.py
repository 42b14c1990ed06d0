"""Pixels as bytes and as the floats in [0, 1] that everything computes with."""

import numpy as np
import torch
from torch import Tensor


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W) -> float32 in [0, 1]."""
    return unit(torch.from_numpy(np.ascontiguousarray(pixels)))


def unit(x: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return x.float() / 255.0 if x.dtype == torch.uint8 else x


def quantise(x: Tensor) -> np.ndarray:
    """float in [0, 1] -> uint8, rounded to nearest."""
    return np.asarray((x * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy())
