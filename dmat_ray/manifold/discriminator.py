"""The residual StyleGAN 2 discriminator, with minibatch standard deviation (arXiv 1912.04958, form of -ADA)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGAN2Config
from dmat_ray.manifold.base import EqualLinear, leaky_relu, unit_moment
from dmat_ray.manifold.resampling import downsample, filter_1331


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


GROUP = 4  # images that are judged beside each other


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
    """x_BCHW in [-1, 1] -> logit_B, against minibatch standard deviation of groups of GROUP images.

    With classes, the logit is a projection of the features on the embedded class (arXiv 1802.05637).
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        width, self.num_classes = config.width, config.num_classes
        self.stem = EqualConv(config.channels, width(config.resolution), 1)
        self.blocks = nn.Sequential(*(DiscriminatorBlock(width(r), width(r // 2)) for r in reversed(config.resolutions[1:])))
        self.conv = EqualConv(width(4) + 1, width(4), 3)
        self.hidden = EqualLinear(width(4) * 16, width(4))
        self.head = EqualLinear(width(4), config.w_dim if config.num_classes else 1)
        self.embed = EqualLinear(config.num_classes, config.w_dim) if config.num_classes else None

    def forward(self, x: Tensor, y_B: Tensor | None = None) -> Tensor:
        x = self.blocks(leaky_relu(self.stem(x)))
        b, c, h, w = x.shape
        group = GROUP if b % GROUP == 0 else b
        spread = x.reshape(group, b // group, c, h, w).var(dim=0, unbiased=False).add(1e-8).sqrt()
        spread = spread.mean(dim=(1, 2, 3)).repeat(group)[:, None, None, None].expand(-1, 1, h, w)
        x = leaky_relu(self.conv(torch.cat([x, spread], dim=1)))
        features: Tensor = self.head(leaky_relu(self.hidden(x.flatten(1))))
        if self.embed is None or y_B is None:
            return features.sum(dim=1)
        label = unit_moment(self.embed(F.one_hot(y_B, self.num_classes).to(x)))
        logits: Tensor = (features * label).sum(dim=1) / math.sqrt(features.shape[1])
        return logits
