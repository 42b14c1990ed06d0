"""Samples of a generator: in chunks for those who measure them, and as a picture for people."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dmat_ray.data.sources import encode
from dmat_ray.manifold.base import LatentGenerator


@torch.no_grad()
def samples(generator: LatentGenerator, count: int, *, pairs: bool, seed: int = 0, chunk: int = 250) -> Iterator[Tensor]:
    """About `count` images in [0, 1] in chunks, always of the same z; with `pairs`, 2i and 2i + 1 share their class."""
    z = torch.randn(count // 2 * 2, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    if pairs and generator.num_classes:
        z[1::2, : generator.num_classes] = z[0::2, : generator.num_classes]
    for part in z.split(chunk):
        yield generator.synthesis(generator.mapping(part.to(generator.w_mean.device)))


@torch.no_grad()
def sample_grid(generator: LatentGenerator, seed: int = 0, columns: int = 10, border: int = 2) -> bytes:
    """A PNG of samples, fewer of large images; column c holds class c (modulo the classes) where the generator has classes."""
    rows, size = (8 if generator.resolution <= 64 else 4), generator.resolution
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    if classes := generator.num_classes:
        column = torch.arange(len(z)) % columns % classes
        z[torch.arange(len(z)), column] = z[:, :classes].amax(dim=1) + 1
    parts = [generator.synthesis(generator.mapping(part.to(generator.w_mean.device))).cpu() for part in z.split(columns)]
    grid = torch.zeros(generator.channels, rows * (size + border) + border, columns * (size + border) + border)
    for r, row in enumerate(parts):
        for c, image in enumerate(row):
            top, left = border + r * (size + border), border + c * (size + border)
            grid[:, top : top + size, left : left + size] = image
    return encode((grid * 255).round().to(torch.uint8).numpy())
