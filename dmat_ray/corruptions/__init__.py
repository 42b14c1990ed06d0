"""Common corruptions of images (Hendrycks and Dietterich, arXiv 1903.12261), in torch, on any device.

Parameters are the published ones of CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C, those of the set whose images are nearest
in size (`tables.py`). Randomness belongs to the example. Different from the published sets: images stay floats (those were
rounded to 8 bits, and ImageNet-C was saved as JPEG of quality 85), and frost is left out, since it is made of photographs.
The published sets are of colour images; on grey ones noise, snow and drops have one channel, and saturation does nothing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dmat_ray.corruptions import blur, digital, noise, weather
from dmat_ray.corruptions.spatter import spatter
from dmat_ray.corruptions.tables import TABLES
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws

KINDS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter,
    "saturate": digital.saturate,
}


def corrupt(x_BCHW: Tensor, kind: str, severity: int, draws: Draws) -> Tensor:
    """x, of 1 or 3 channels and at least 16 pixels a side, in [0, 1], under one corruption of severity 1 to 5, in [0, 1].

    `draws` are of the examples of x. Nothing has a gradient. Raises UserError for a kind, severity, size or range that is none.
    """
    if kind not in KINDS:
        raise UserError(f"kind: '{kind}' is no corruption; choose from {', '.join(KINDS)}")
    if severity not in range(1, 6):
        raise UserError(f"severity: {severity} is not one of 1, 2, 3, 4, 5")
    channels, height, width = x_BCHW.shape[1:]
    if channels not in (1, 3) or min(height, width) < 16:
        raise UserError(f"corruptions need images of 1 or 3 channels and 16 pixels a side, these are {channels}x{height}x{width}")
    if len(x_BCHW) and not (x_BCHW.min() >= 0 and x_BCHW.max() <= 1):
        raise UserError(f"images must be in [0, 1]; these are in [{float(x_BCHW.min()):.4g}, {float(x_BCHW.max()):.4g}]")
    published = min(TABLES[kind], key=lambda size: abs(math.log(math.sqrt(height * width) / size)))
    # float32 as it is: rounding would make an image depend on the device
    with torch.no_grad(), tf32(False):
        return KINDS[kind](x_BCHW, draws, *TABLES[kind][published][severity - 1]).clamp(0.0, 1.0)
