"""The StyleGAN 2 generator in plain PyTorch: modulated convolutions and skip connections to the image.

Written from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958), in the
form of the -ADA configuration (arXiv 2006.06676): skip/torgb generator, weight demodulation, equalised learning
rates, [1,3,3,1] resampling filter.
No custom kernels: demodulation scales activations instead of building one kernel per example, which is the same
arithmetic and keeps every convolution ungrouped.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGAN2Config
from dmat_ray.manifold.base import EqualLinear, LatentGenerator, Mapping, leaky_relu
from dmat_ray.manifold.resampling import filter_1331, upsample


def clamped(x: Tensor, bound: float | None) -> Tensor:
    """x within +-bound (the -ADA networks train some layers in half precision and bound them all)."""
    return x if bound is None else x.clamp(-bound, bound)


class ModulatedConv(nn.Module):
    """Convolution modulated by a style: weight scaled per input channel by A(w), then demodulated (eq. 1 and 3)."""

    def __init__(self, inputs: int, outputs: int, size: int, w_dim: int, *, up: bool = False, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.affine = EqualLinear(w_dim, inputs, bias=1.0)
        self.gain = 1.0 / math.sqrt(inputs * size * size)
        self.size, self.up, self.demodulate = size, up, demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w)
        weight = self.weight * self.gain
        x = x * style[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = filter_1331(x, (1, 1), gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=self.size // 2)
        if self.demodulate:
            energy = style.square() @ weight.square().sum(dim=(2, 3)).T
            x = x * torch.rsqrt(energy + 1e-8)[:, :, None, None]
        return x


class StyledConv(nn.Module):
    """One synthesis layer: modulated convolution, optional fixed noise, bias, activation."""

    noise: Tensor

    def __init__(self, inputs: int, outputs: int, resolution: int, config: StyleGAN2Config, *, up: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, config.w_dim, up=up)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(())) if config.noise else None
        self.clamp = config.conv_clamp
        if config.noise:
            self.register_buffer("noise", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w)
        if self.noise_strength is not None:
            # fresh noise while the GAN trains, the stored buffer afterwards: g must be a function of w alone
            noise = torch.randn_like(x[:, :1]) if self.training else self.noise
            x = x + noise * self.noise_strength
        return clamped(leaky_relu(x + self.bias[:, None, None]), self.clamp)


class ToImage(nn.Module):
    """1x1 modulated convolution from features to image channels, without demodulation."""

    def __init__(self, inputs: int, config: StyleGAN2Config) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, config.channels, 1, config.w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(config.channels))
        self.clamp = config.conv_clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return clamped(self.conv(x, w) + self.bias[:, None, None], self.clamp)


class Synthesis(nn.Module):
    """w_BLD -> image in about [-1, 1]: one styled convolution at 4x4, two a resolution above, skip images summed."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        width = config.width
        self.const = nn.Parameter(torch.randn(1, width(4), 4, 4))
        self.convs = nn.ModuleList([StyledConv(width(4), width(4), 4, config, up=False)])
        self.images = nn.ModuleList([ToImage(width(4), config)])
        for resolution in config.resolutions[1:]:
            below, here = width(resolution // 2), width(resolution)
            self.convs.append(StyledConv(below, here, resolution, config, up=True))
            self.convs.append(StyledConv(here, here, resolution, config, up=False))
            self.images.append(ToImage(here, config))

    def forward(self, w: Tensor) -> Tensor:
        x = self.const.expand(w.shape[0], -1, -1, -1)
        x = self.convs[0](x, w[:, 0])
        image: Tensor = self.images[0](x, w[:, 1])
        for k in range(1, len(self.images)):
            x = self.convs[2 * k - 1](x, w[:, 2 * k - 1])
            x = self.convs[2 * k](x, w[:, 2 * k])
            # an image layer shares its w with the first convolution of the next resolution, as in the paper
            image = upsample(image) + self.images[k](x, w[:, 2 * k + 1])
        return image


class StyleGAN2(LatentGenerator):
    """The StyleGAN 2 generator; W+ is (2 log2(resolution) - 2, w_dim)."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__(config.z_dim, config.w_dim, config.num_ws, config.resolution, config.channels, config.num_classes)
        self.config = config
        self.map = Mapping(config)
        self.synth = Synthesis(config)
