"""Images of noise to render threats on."""

import torch

from dmat_ray.types import Batch


def photo(channels: int, height: int = 20, width: int = 24, count: int = 2) -> Batch:
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(channels), dtype=torch.float64)
    return Batch([f"{i}" for i in range(count)], x, torch.zeros(count, dtype=torch.int64))
