"""StyleGAN 2 in plain PyTorch: mapping, synthesis with skip connections, and the residual discriminator.

Written from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958), in the
form of the -ADA configuration (arXiv 2006.06676): skip/torgb generator, weight demodulation, residual
discriminator with minibatch standard deviation, equalised learning rates, [1,3,3,1] resampling filter.
No custom kernels: demodulation scales activations instead of building one kernel per example, which is the same
arithmetic and keeps every convolution ungrouped.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGAN2Config

LRELU_GAIN = math.sqrt(2.0)


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 times sqrt(2), which keeps the variance of its input."""
    return F.leaky_relu(x, 0.2) * LRELU_GAIN


def filter_1331(x: Tensor, pad: tuple[int, int], gain: float = 1.0) -> Tensor:
    """x_BCHW, zero padded by (before, after) on both axes, under the separable filter [1,3,3,1]/8 (times `gain`).

    [1,3,3,1] is [1,1] three times over itself: six additions of shifted views, whose gradient is additions again,
    where a one-channel convolution spends ten times as long in its backward pass on a CPU.
    """
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    for _ in range(3):
        x = x[:, :, 1:] + x[:, :, :-1]
        x = x[:, :, :, 1:] + x[:, :, :, :-1]
    return x * (gain / 64.0)


def upsample(x: Tensor) -> Tensor:
    """x_BCHW at twice its size: zeros inserted, then filtered (gain 4 restores the mean)."""
    b, c, h, w = x.shape
    spread = x.new_zeros(b, c, h, 2, w, 2)
    spread[:, :, :, 0, :, 0] = x
    return filter_1331(spread.reshape(b, c, 2 * h, 2 * w), (2, 1), gain=4.0)


def downsample(x: Tensor) -> Tensor:
    """x_BCHW at half its size: filtered, then every second pixel."""
    return filter_1331(x, (1, 1))[:, :, ::2, ::2]


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


class EqualConv(nn.Module):
    """A convolution with equalised learning rate; `down` filters and halves the size first."""

    def __init__(self, inputs: int, outputs: int, size: int, *, bias: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain = 1.0 / math.sqrt(inputs * size * size)
        self.size, self.down = size, down

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gain
        if not self.down:
            return F.conv2d(x, weight, self.bias, padding=self.size // 2)
        if self.size == 1:
            return F.conv2d(downsample(x), weight, self.bias)
        return F.conv2d(filter_1331(x, (2, 2)), weight, self.bias, stride=2)


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
        if config.noise:
            self.register_buffer("noise", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w)
        if self.noise_strength is not None:
            # fresh noise while the GAN trains, the stored buffer afterwards: g must be a function of w alone
            noise = torch.randn_like(x[:, :1]) if self.training else self.noise
            x = x + noise * self.noise_strength
        return leaky_relu(x + self.bias[:, None, None])


class ToImage(nn.Module):
    """1x1 modulated convolution from features to image channels, without demodulation."""

    def __init__(self, inputs: int, channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, channels, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        image: Tensor = self.conv(x, w) + self.bias[:, None, None]
        return image


def unit_moment(x: Tensor) -> Tensor:
    """x (B, D) scaled to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Mapping(nn.Module):
    """z_BZ -> w_BD: normalise to the unit-variance sphere, then fully connected layers.

    A class-conditional generator takes its class from z, as the largest of the first `num_classes` coordinates: every
    class is equally likely, and the manifold stays a function of z alone.
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.embed = EqualLinear(config.num_classes, config.w_dim) if config.num_classes else None
        widths = [config.z_dim + (config.w_dim if config.num_classes else 0)] + [config.w_dim] * config.mapping_layers
        self.layers = nn.ModuleList(EqualLinear(a, b, rate=config.mapping_rate) for a, b in pairwise(widths))

    def class_of(self, z: Tensor) -> Tensor:
        """The class (B) that a conditional generator makes of z."""
        return z[:, : self.num_classes].argmax(dim=1)

    def forward(self, z: Tensor) -> Tensor:
        x = unit_moment(z)
        if self.embed is not None:
            label = F.one_hot(self.class_of(z), self.num_classes).to(z)
            x = torch.cat([x, unit_moment(self.embed(label))], dim=1)
        for layer in self.layers:
            x = leaky_relu(layer(x))
        return x


class Synthesis(nn.Module):
    """w_BLD -> image in about [-1, 1]: one styled convolution at 4x4, two a resolution above, skip images summed."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        width = config.width
        self.const = nn.Parameter(torch.randn(1, width(4), 4, 4))
        self.convs = nn.ModuleList([StyledConv(width(4), width(4), 4, config, up=False)])
        self.images = nn.ModuleList([ToImage(width(4), config.channels, config.w_dim)])
        for resolution in config.resolutions[1:]:
            below, here = width(resolution // 2), width(resolution)
            self.convs.append(StyledConv(below, here, resolution, config, up=True))
            self.convs.append(StyledConv(here, here, resolution, config, up=False))
            self.images.append(ToImage(here, config.channels, config.w_dim))

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


class StyleGAN2(nn.Module):
    """The generator g of the image manifold (see `dmat_ray.types.Generator`).

    W+ is (num_ws, w_dim) with num_ws = 2 log2(resolution) - 2. `w_mean` (D) and `w_std` (D) are the mean and the
    standard deviation of mapped samples, filled by `measure_w` when training ends and stored with the weights.
    """

    w_mean: Tensor
    w_std: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.z_dim, self.w_dim = config.z_dim, config.w_dim
        self.resolution: int = config.resolution
        self.channels: int = config.channels
        self.num_ws = config.num_ws
        self.map = Mapping(config)
        self.synth = Synthesis(config)
        self.register_buffer("w_mean", torch.zeros(config.w_dim))
        self.register_buffer("w_std", torch.ones(config.w_dim))

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

    @torch.no_grad()
    def measure_w(self, samples: int = 10_000, seed: int = 0) -> None:
        """Fill `w_mean` and `w_std` from mapped z ~ N(0, 1)."""
        z = torch.randn(samples, self.z_dim, generator=torch.Generator().manual_seed(seed))
        w = self.map(z.to(self.w_mean.device))
        self.w_mean.copy_(w.mean(dim=0))
        self.w_std.copy_(w.std(dim=0))


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualConv(inputs, inputs, 3)
        self.conv1 = EqualConv(inputs, outputs, 3, down=True)
        self.skip = EqualConv(inputs, outputs, 1, bias=False, down=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = leaky_relu(self.conv1(leaky_relu(self.conv0(x))))
        y = (y + self.skip(x)) * math.sqrt(0.5)
        return y


class Discriminator(nn.Module):
    """x_BCHW in [-1, 1] -> logit_B, against minibatch standard deviation of groups of `group` images.

    With classes, the logit is a projection of the features on the embedded class (arXiv 1802.05637).
    """

    def __init__(self, config: StyleGAN2Config, group: int = 4) -> None:
        super().__init__()
        width, self.group, self.num_classes = config.width, group, config.num_classes
        self.stem = EqualConv(config.channels, width(config.resolution), 1)
        self.blocks = nn.Sequential(*(DiscriminatorBlock(width(r), width(r // 2)) for r in reversed(config.resolutions[1:])))
        self.conv = EqualConv(width(4) + 1, width(4), 3)
        self.hidden = EqualLinear(width(4) * 16, width(4))
        self.head = EqualLinear(width(4), config.w_dim if config.num_classes else 1)
        self.embed = EqualLinear(config.num_classes, config.w_dim) if config.num_classes else None

    def forward(self, x: Tensor, y_B: Tensor | None = None) -> Tensor:
        x = self.blocks(leaky_relu(self.stem(x)))
        b, c, h, w = x.shape
        group = self.group if b % self.group == 0 else b
        spread = x.reshape(group, b // group, c, h, w).var(dim=0, unbiased=False).add(1e-8).sqrt()
        spread = spread.mean(dim=(1, 2, 3)).repeat(group)[:, None, None, None].expand(-1, 1, h, w)
        x = leaky_relu(self.conv(torch.cat([x, spread], dim=1)))
        features: Tensor = self.head(leaky_relu(self.hidden(x.flatten(1))))
        if self.embed is None or y_B is None:
            return features.sum(dim=1)
        label = unit_moment(self.embed(F.one_hot(y_B, self.num_classes).to(x)))
        logits: Tensor = (features * label).sum(dim=1) / math.sqrt(features.shape[1])
        return logits
