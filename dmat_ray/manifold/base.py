"""What every generator here is: a map from z to W, a map from W+ to images, and the statistics of W.

The layers that StyleGAN 1 and 2 share stand here too (Karras et al., arXiv 1812.04948 and 1912.04958).
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGANConfig

LRELU_GAIN = math.sqrt(2.0)


def class_of_z(z_BZ: Tensor, num_classes: int) -> Tensor:
    """The class (B) that a conditional generator makes of z: the largest of its first `num_classes` coordinates."""
    return z_BZ[:, :num_classes].argmax(dim=1)


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 times sqrt(2), which keeps the variance of its input."""
    return F.leaky_relu(x, 0.2) * LRELU_GAIN


class EqualLinear(nn.Module):
    """A linear layer whose weight is stored at unit variance and scaled at run time (equalised learning rate)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.weight_gain = rate / math.sqrt(inputs)
        self.bias_gain = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


def unit_moment(x: Tensor) -> Tensor:
    """x (B, D) scaled to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Mapping(nn.Module):
    """z_BZ -> w_BD: normalise to the unit-variance sphere, then fully connected layers.

    A class-conditional generator takes its class from z, as the largest of the first `num_classes` coordinates: every
    class is equally likely, and the manifold stays a function of z alone.
    """

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.embed = EqualLinear(config.num_classes, config.w_dim) if config.num_classes else None
        self.layers = nn.ModuleList(EqualLinear(a, b, rate=config.mapping_rate) for a, b in pairwise(config.mapping_widths))

    def forward(self, z: Tensor) -> Tensor:
        x = unit_moment(z)
        if self.embed is not None:
            label = F.one_hot(class_of_z(z, self.num_classes), self.num_classes).to(z)
            x = torch.cat([x, unit_moment(self.embed(label))], dim=1)
        for layer in self.layers:
            x = leaky_relu(layer(x))
        return x


class LatentGenerator(nn.Module):
    """A generator g (see `dmat_ray.types.Generator`) made of `map` (z_BZ -> w_BD) and `synth` (w_BLD -> about [-1, 1]).

    `w_mean` (D) and `w_std` (D) are the mean and the standard deviation of mapped samples, filled by `measure_w` and
    stored with the weights.
    """

    map: nn.Module
    synth: nn.Module
    w_mean: Tensor
    w_std: Tensor

    def __init__(self, z_dim: int, w_dim: int, num_ws: int, resolution: int, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.num_ws = z_dim, w_dim, num_ws
        self.resolution, self.channels, self.num_classes = resolution, channels, num_classes
        self.register_buffer("w_mean", torch.zeros(w_dim))
        self.register_buffer("w_std", torch.ones(w_dim))

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """z ~ N(0, 1) -> w_BLD, pulled towards `w_mean` by 1 - truncation_psi (in [0, 1])."""
        w_BD: Tensor = self.map(z_BZ)
        if truncation_psi != 1.0:
            w_BD = self.w_mean + truncation_psi * (w_BD - self.w_mean)
        return w_BD[:, None].expand(-1, self.num_ws, -1)

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        """w_BLD -> x_BCHW in [0, 1]; without `clamp` the raw output, whose gradient does not die outside [0, 1]."""
        x: Tensor = (self.synth(w_BLD) + 1.0) * 0.5
        return x.clamp(0.0, 1.0) if clamp else x

    def class_of(self, z_BZ: Tensor) -> Tensor | None:
        """The class (B) that each z is made into; None for an unconditional generator."""
        return class_of_z(z_BZ, self.num_classes) if self.num_classes else None

    @torch.no_grad()
    def measure_w(self, samples: int = 10_000, seed: int = 0, *, mean: bool = True) -> None:
        """Fill `w_std`, and unless told otherwise `w_mean`, from mapped z ~ N(0, 1)."""
        z = torch.randn(samples, self.z_dim, generator=torch.Generator().manual_seed(seed))
        w = self.map(z.to(self.w_mean.device))
        if mean:
            self.w_mean.copy_(w.mean(dim=0))
        self.w_std.copy_(w.std(dim=0))
