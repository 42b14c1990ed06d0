"""The losses and penalties of generator training, and the latent codes that it draws.

Non-saturating logistic loss (Goodfellow et al. 2014), R1 penalty (Mescheder et al. 2018, arXiv 1801.04406), path-length
regularisation (arXiv 1912.04958, section 3.2), style mixing (arXiv 1812.04948), and for short trainings on few images a
mode-seeking term (arXiv 1903.05628). The loop that uses them is in `gan_trainer`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.manifold.diversity import of_classes, of_same_class
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive


class StepDraws:
    """This worker's part of the random numbers of one training step, which are the same however many workers there are.

    Every number derives from (seed, step): a training that goes on from a checkpoint needs no generator's state.
    """

    def __init__(self, seed: int, step: int, batch: int, rank: int = 0, world_size: int = 1) -> None:
        self._rng = torch.Generator().manual_seed(derive(seed, "gan", step))
        self._own = derive(seed, "path", step, rank)
        self._batch = batch
        share = batch // world_size
        self._part = slice(rank * share, (rank + 1) * share)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) in [0, 1)."""
        return torch.rand(self._batch, *shape, generator=self._rng)[self._part]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), standard normal."""
        return torch.randn(self._batch, *shape, generator=self._rng)[self._part]

    def own_normal(self, like: Tensor) -> Tensor:
        """Standard normal, of the shape, on the device and with the dtype of `like`: this worker's alone, no part of a
        batch's, and the same each time.
        """
        rng = torch.Generator(like.device).manual_seed(self._own)
        return torch.randn(like.shape, generator=rng, device=like.device, dtype=like.dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """(B) from low to high - 1."""
        return torch.randint(low, high, (self._batch,), generator=self._rng)[self._part]


def generator_loss(fake_logit_B: Tensor) -> Tensor:
    """-log sigmoid(D(g(z))), the non-saturating form."""
    return F.softplus(-fake_logit_B).mean()


def discriminator_loss(real_logit_B: Tensor, fake_logit_B: Tensor) -> Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(g(z))))."""
    return F.softplus(-real_logit_B).mean() + F.softplus(fake_logit_B).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Mean squared norm of dD/dx at real images (equation 9 of arXiv 1801.04406, without gamma / 2)."""
    x = x_BCHW.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def path_lengths(synthesis: Callable[[Tensor], Tensor], w_BLD: Tensor, y_BCHW: Tensor) -> Tensor:
    """||J_w^T y|| per example (B), y ~ N(0, 1) an image: how far the image moves with w, in a random direction.

    The norm is over D and a mean square over the layers, as in the authors' code; y is scaled by 1 / sqrt(pixels).
    """
    noise = y_BCHW / math.sqrt(y_BCHW.shape[2] * y_BCHW.shape[3])
    (gradient,) = torch.autograd.grad((synthesis(w_BLD) * noise).sum(), w_BLD, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def mode_seeking(x_BCHW: Tensor) -> Tensor:
    """Inverse of the mean distance between images 2i and 2i + 1 (equation 3 of arXiv 1903.05628, z at distance 1)."""
    even = x_BCHW.shape[0] // 2 * 2
    x = x_BCHW[:even].clamp(-1, 1)
    return 1.0 / ((x[0::2] - x[1::2]).abs().mean() + 1e-3)


def mixed_w(
    generator: StyleGAN2, probability: float, draws: StepDraws, *, labels: Tensor | None = None, pairs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Random w_BLD and their classes (None for an unconditional generator).

    With `probability` the layers after a random crossover take the w of a second z (style mixing) of the same class.
    With `labels` (N) the classes are those of a random one each, else all are equally likely. With `pairs`, examples 2i and
    2i + 1 share their class, and nothing else.
    """
    device, classes = generator.w_mean.device, generator.num_classes
    one, other = draws.normal(generator.z_dim), draws.normal(generator.z_dim)
    if classes and labels is not None:
        one = of_classes(one, labels[draws.integers(0, len(labels))], classes)
    if pairs:
        one[1::2] = of_same_class(one[1::2], one[0 : len(one) // 2 * 2 : 2], classes)
    other = of_same_class(other, one, classes)
    first, second = generator.mapping(one.to(device)), generator.mapping(other.to(device))
    cut, coin = draws.integers(1, generator.num_ws), draws.uniform()
    cut = torch.where(coin < probability, cut, generator.num_ws).to(device)
    layer = torch.arange(generator.num_ws, device=device)
    w = torch.where((layer[None] < cut[:, None])[:, :, None], first, second)
    label = generator.class_of(one)
    return w, None if label is None else label.to(device)
