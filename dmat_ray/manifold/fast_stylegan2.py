"""The fast synthesis of StyleGAN 2; `fast` says what is fast about it.

The formulas are those of `stylegan2` (Karras et al., arXiv 1912.04958 and 2006.06676).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmat_ray.manifold.base import LRELU_GAIN
from dmat_ray.manifold.fast_stylegan1 import SLOPE, Affine, filter_kernel, filtered, packed, per_channel, spatial_sum
from dmat_ray.manifold.resampling import upsample
from dmat_ray.manifold.stylegan2 import ModulatedConv, StyledConv, Synthesis, ToImage


class Activate(torch.autograd.Function):
    """leaky_relu(x scale + offset): autograd's own way takes more passes over x."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return F.leaky_relu_(torch.addcmul(offset, x, per_channel(scale, x)), SLOPE)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, _ = inputs
        ctx.save_for_backward(x, scale, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        x, scale, output = ctx.saved_tensors
        grad: Tensor = torch.ops.aten.leaky_relu_backward(grads[0], output, SLOPE, True)
        of_scale = spatial_sum(grad * x)
        return grad.mul_(per_channel(scale, x)), of_scale, None


class Modulation(nn.Module):
    """w_BD -> the style (B, I) that scales a convolution's inputs and the factor (B, O) that scales its outputs (eq. 3).

    `gain` multiplies the outputs.
    """

    energy: Tensor

    def __init__(self, conv: ModulatedConv, gain: float) -> None:
        super().__init__()
        self.affine = Affine(conv.affine)
        # demodulation undoes any factor of the kernel, so the gain enters as 1/gain^2 of what is under the root
        energy = (conv.weight * conv.gain).square().sum(dim=(2, 3)).T / gain**2
        self.register_buffer("energy", energy.detach().contiguous())
        self.epsilon = 1e-8 / gain**2

    def forward(self, w_BD: Tensor) -> tuple[Tensor, Tensor]:
        style = self.affine(w_BD)
        return style, torch.rsqrt(style.square() @ self.energy + self.epsilon)


class FastConv(nn.Module):
    """A styled convolution of StyleGAN 2, whose activation gain of sqrt(2) stands in the demodulation and the offset."""

    kernel: Tensor
    offset: Tensor
    filter: Tensor

    def __init__(self, layer: StyledConv, dtype: torch.dtype) -> None:
        super().__init__()
        conv = layer.conv
        self.up, self.clamp = conv.up, layer.clamp
        self.modulation = Modulation(conv, LRELU_GAIN)
        weight = conv.weight * conv.gain
        if conv.up:
            weight = weight.transpose(0, 1)
            self.register_buffer("filter", filter_kernel([1.0, 3.0, 3.0, 1.0], weight.shape[1], 4.0, dtype))
        offset = layer.bias[:, None, None]
        if layer.noise_strength is not None:
            offset = offset + layer.noise * layer.noise_strength
        self.register_buffer("kernel", packed(weight, dtype))
        self.register_buffer("offset", packed(offset[None] * LRELU_GAIN, dtype))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style, demodulation = self.modulation(w)
        x = x * per_channel(style, x)
        if self.up:
            x = filtered(F.conv_transpose2d(x, self.kernel, stride=2), self.filter, 1)
        else:
            x = F.conv2d(x, self.kernel, padding=1)
        x = Activate.apply(x, demodulation, self.offset)  # type: ignore[no-untyped-call]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class FastImage(nn.Module):
    """An image layer of StyleGAN 2: each example has a matrix of its own, so that x is not scaled first."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: ToImage) -> None:
        super().__init__()
        self.affine = Affine(layer.conv.affine)
        self.clamp = layer.clamp
        self.register_buffer("weight", (layer.conv.weight * layer.conv.gain)[:, :, 0, 0].detach())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, height, width = x.shape
        weight_BOI = (self.affine(w)[:, None] * self.weight).to(x.dtype)
        x_BCN = x.permute(0, 2, 3, 1).reshape(b, height * width, c).transpose(1, 2)
        image: Tensor = (weight_BOI @ x_BCN).view(b, -1, height, width).float() + self.bias[:, None, None]
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class FastSynthesis(nn.Module):
    """w_BLD -> image in about [-1, 1]."""

    const: Tensor

    def __init__(self, synth: Synthesis, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("const", packed(synth.const, dtype))
        self.convs = nn.ModuleList(FastConv(layer, dtype) for layer in cast(list[StyledConv], synth.convs))
        self.images = nn.ModuleList(FastImage(layer) for layer in cast(list[ToImage], synth.images))

    def forward(self, w: Tensor) -> Tensor:
        x = self.convs[0](self.const, w[:, 0])
        image: Tensor = self.images[0](x, w[:, 1])
        for k in range(1, len(self.images)):
            x = self.convs[2 * k - 1](x, w[:, 2 * k - 1])
            x = self.convs[2 * k](x, w[:, 2 * k])
            image = upsample(image) + self.images[k](x, w[:, 2 * k + 1])
        return image
