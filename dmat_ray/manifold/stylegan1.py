"""StyleGAN 1 in plain PyTorch: the generator of the DMAT paper.

Written from Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks" (arXiv
1812.04948): constant input, per-layer noise, instance normalisation restyled from w (AdaIN), nearest-neighbour
upsampling with a [1,2,1] blur, equalised learning rates. The noise buffers are fixed: g must be a function of w alone.
From `fused_from` on, upsampling and convolution are one transposed convolution, as in the published networks, whose
trained kernels are the mirror images of the unfused ones there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGAN1Config
from dmat_ray.manifold.base import LRELU_GAIN, EqualLinear, LatentGenerator, Mapping
from dmat_ray.manifold.resampling import blur_121


def transposed_kernel(kernel: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (I, O, 4, 4): pixel doubling, then `kernel` as a true convolution, in one of stride 2."""
    padded = F.pad(kernel, (1, 1, 1, 1))
    summed = padded[:, :, 1:, 1:] + padded[:, :, :-1, 1:] + padded[:, :, 1:, :-1] + padded[:, :, :-1, :-1]
    return summed.transpose(0, 1)


class Epilogue(nn.Module):
    """Noise, bias, leaky ReLU, instance normalisation, and the style of w: y_s (x - mean) / std + y_b (eq. 1)."""

    noise: Tensor

    def __init__(self, channels: int, resolution: int, w_dim: int) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.affine = EqualLinear(w_dim, 2 * channels)

    def activate(self, x: Tensor) -> Tensor:
        """Everything that does not depend on w: noise, bias, activation, normalisation."""
        x = x + self.noise * self.noise_strength[:, None, None] + self.bias[:, None, None]
        x = F.leaky_relu(x, 0.2)
        x = x - x.mean(dim=(2, 3), keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + 1e-8)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale, shift = self.affine(w)[:, :, None, None].chunk(2, dim=1)
        styled: Tensor = self.activate(x) * (scale + 1.0) + shift
        return styled


class Layer(nn.Module):
    """One 3x3 convolution, upsampled first if `up`, and its epilogue."""

    def __init__(self, inputs: int, outputs: int, resolution: int, config: StyleGAN1Config, *, up: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.gain = LRELU_GAIN / math.sqrt(inputs * 9)
        self.up, self.fused = up, up and resolution >= config.fused_from
        self.epilogue = Epilogue(outputs, resolution, config.w_dim)

    def convolve(self, x: Tensor) -> Tensor:
        """The layer's convolution without its epilogue."""
        weight = self.weight * self.gain
        if not self.up:
            return F.conv2d(x, weight, padding=1)
        if self.fused:
            return blur_121(F.conv_transpose2d(x, transposed_kernel(weight), stride=2, padding=1))
        return blur_121(F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self.epilogue(self.convolve(x), w)
        return out


class Synthesis(nn.Module):
    """w_BLD -> image in about [-1, 1]: two layers a resolution, one w each, and a 1x1 convolution to image channels."""

    def __init__(self, config: StyleGAN1Config) -> None:
        super().__init__()
        width = config.width
        self.const = nn.Parameter(torch.ones(1, width(4), 4, 4))
        self.first = Epilogue(width(4), 4, config.w_dim)
        self.layers = nn.ModuleList([Layer(width(4), width(4), 4, config, up=False)])
        for resolution in config.resolutions[1:]:
            below, here = width(resolution // 2), width(resolution)
            self.layers.append(Layer(below, here, resolution, config, up=True))
            self.layers.append(Layer(here, here, resolution, config, up=False))
        last = width(config.resolution)
        self.image_weight = nn.Parameter(torch.randn(config.channels, last, 1, 1))
        self.image_bias = nn.Parameter(torch.zeros(config.channels))
        self.image_gain = 1.0 / math.sqrt(last)

    def forward(self, w: Tensor) -> Tensor:
        x = self.first(self.const.expand(w.shape[0], -1, -1, -1), w[:, 0])
        for k, layer in enumerate(self.layers, start=1):
            x = layer(x, w[:, k])
        return F.conv2d(x, self.image_weight * self.image_gain, self.image_bias)


class StyleGAN1(LatentGenerator):
    """The StyleGAN 1 generator; W+ is (2 log2(resolution) - 2, w_dim)."""

    def __init__(self, config: StyleGAN1Config) -> None:
        super().__init__(config.z_dim, config.w_dim, config.num_ws, config.resolution, config.channels)
        self.config = config
        self.map = Mapping(config)
        self.synth = Synthesis(config)
