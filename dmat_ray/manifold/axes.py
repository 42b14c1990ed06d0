"""Principal axes of a generator's gradient: the directions of w that images depend on most, down to those they do not see.

Adam scales every coordinate of w by its own gradient's size. That helps as far as coordinates differ in their effect, and
those of w are mixtures. Along the eigenvectors of E[J^T J], J the derivative of the image, effects differ by orders of
magnitude; there Adam takes about half the steps to the same error (the idea of SOAP, arXiv 2409.11321, with axes that
are found once for the generator and serve every image). Axes that images hardly depend on take shorter steps: Adam's full
ones would lead w far from where the generator was trained, for nothing that can be seen.
"""

import torch
from torch import Tensor

from dmat_ray.manifold.samples import chunk_size
from dmat_ray.types import Generator

SAMPLES, CHUNK = 1024, 16
SPREAD = 0.3  # of the samples' w around W in units of w_std: projected images lie off W
FULL = 0.01  # effect, as a share of the largest in the layer, from which on steps are of full length


def principal_axes(generator: Generator, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal axes of each layer's w, the columns of (L, D, D), and the length of a step along each (L, D), at most 1.

    They come from the gradients of random sums of pixels.
    """
    device, dtype = generator.w_mean.device, generator.w_mean.dtype
    rng = torch.Generator().manual_seed(seed)
    layers, width = generator.num_ws, generator.w_dim
    total = torch.zeros(layers, width, width, dtype=torch.float64, device=device)
    for _ in range(SAMPLES // CHUNK):
        z, offset = torch.randn(CHUNK, generator.z_dim, generator=rng), torch.randn(CHUNK, layers, width, generator=rng)
        chunk = (generator.mapping(z.to(device, dtype)) + SPREAD * generator.w_std * offset.to(device)).detach()
        parts = []
        for w in chunk.split(chunk_size(generator.resolution)):
            with torch.enable_grad():
                w.requires_grad_(True)
                x = generator.synthesis(w, clamp=False)
                weights = torch.randn(x.shape, generator=rng).to(device)
                parts += torch.autograd.grad((x * weights).sum(), w)
        by_layer = torch.cat(parts).transpose(0, 1).double()
        total += by_layer.transpose(1, 2) @ by_layer
    values, axes = torch.linalg.eigh(total)
    effect = values.clamp(min=0).sqrt()
    # a layer that moves no pixel has no direction that counts
    most = effect.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return axes.to(dtype), (effect / (FULL * most)).clamp(max=1).to(dtype)
