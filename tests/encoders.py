"""Small encoders, and images to give them."""

from typing import Any

import torch
from torch import Tensor

from dmat_ray.config import EncoderConfig
from dmat_ray.manifold.encoder import Encoder, untrained
from dmat_ray.manifold.stylegan2 import StyleGAN2

SHA = "ab" * 32


def settings(**values: Any) -> EncoderConfig:
    short = {"width": 8, "width_max": 16, "kimg": 1.6, "batch_size": 16, "report_kimg": 0.16, "w_weight": 0.5}
    return EncoderConfig.model_validate({**short, **values})


def random_encoder(generator: StyleGAN2, seed: int = 0) -> Encoder:
    """One whose codes differ from image to image."""
    torch.manual_seed(seed)
    encoder = untrained(settings(), generator)
    with torch.no_grad():
        encoder.head.weight.normal_(std=0.3)
        encoder.head.bias.normal_(std=0.3)
    return encoder.eval().requires_grad_(False)


def images(count: int, seed: int = 0, size: int = 8, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
