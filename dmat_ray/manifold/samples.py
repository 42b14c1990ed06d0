"""Samples of a generator: in chunks for those who measure them, and as a picture for people."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dmat_ray.data.decoding import encode
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.diversity import of_classes

# pixels synthesised at a time: a StyleGAN keeps some hundred bytes of features for each
CHUNK_PIXELS = 1 << 20


def chunk_size(resolution: int) -> int:
    """Images of this size that are made together: 1,024 of 32x32 pixels, 16 of 256x256."""
    return max(1, CHUNK_PIXELS // resolution**2)


@torch.no_grad()
def samples(
    generator: LatentGenerator,
    count: int,
    *,
    pairs: bool,
    classes: Tensor | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """This worker's part of `count` images in [0, 1], always of the same z: (their places, images, classes) in chunks.

    `count` is even; with `pairs`, images 2i and 2i + 1 share their class and nothing else, and the classes come in turn. Else
    they are of `classes` (count), or random, all equally likely. Classes are None for an unconditional generator.
    """
    z = torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    if generator.num_classes:
        if pairs:
            classes = torch.arange(count) // 2 % generator.num_classes
        z = z if classes is None else of_classes(z, classes, generator.num_classes)
    size = chunk_size(generator.resolution)
    size += size % 2  # pairs stay together
    for start in range(rank * size, count, world_size * size):
        place = slice(start, min(start + size, count))
        part = z[place].to(generator.w_mean.device)
        yield place, generator.synthesis(generator.mapping(part)), generator.class_of(part)


@torch.no_grad()
def sample_grid(generator: LatentGenerator, seed: int = 0, columns: int = 10, border: int = 2) -> bytes:
    """A PNG of samples, fewer of large images; column c holds class c (modulo the classes) where the generator has classes."""
    rows, size = (8 if generator.resolution <= 64 else 4), generator.resolution
    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    if classes := generator.num_classes:
        column = torch.arange(len(z)) % columns % classes
        z[torch.arange(len(z)), column] = z[:, :classes].amax(dim=1) + 1
    grid = torch.zeros(generator.channels, rows * (size + border) + border, columns * (size + border) + border)
    chunk = min(columns, chunk_size(size))
    parts = [generator.synthesis(generator.mapping(part.to(generator.w_mean.device))).cpu() for part in z.split(chunk)]
    for k, image in enumerate(torch.cat(parts)):
        top, left = border + k // columns * (size + border), border + k % columns * (size + border)
        grid[:, top : top + size, left : left + size] = image
    return encode((grid * 255).round().to(torch.uint8).numpy())
