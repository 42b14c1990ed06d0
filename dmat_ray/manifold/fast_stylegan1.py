"""The fast synthesis of StyleGAN 1, and what that of StyleGAN 2 shares with it; `fast` says what is fast about it.

The formulas are those of `stylegan1` (Karras et al., arXiv 1812.04948).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmat_ray.manifold.base import EqualLinear
from dmat_ray.manifold.stylegan1 import Epilogue, Layer, Synthesis, transposed_kernel

SLOPE = 0.2


def packed(x_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a constant (kernel or map), in the memory layout of the activations."""
    return x_BCHW.detach().to(dtype).clone(memory_format=torch.channels_last)


def per_channel(s_BC: Tensor, x_BCHW: Tensor) -> Tensor:
    """One number an example and channel, in the shape and dtype that scales x."""
    return s_BC.to(x_BCHW.dtype)[:, :, None, None]


def spatial_sum(x_BCHW: Tensor) -> Tensor:
    """Sums over the pixels (B, C), in float32.

    Columns first: a bfloat16 column sum is accumulated in float32 and rounded once, and those errors average out; asking
    for float32 at once would convert all of x. The order of axes is that of the memory, where a CPU sums ten times faster.
    """
    return x_BCHW.permute(0, 2, 3, 1).sum(dim=1).sum(dim=1, dtype=torch.float32)


class Filter(torch.autograd.Function):
    """x_BCHW under a fixed symmetric depthwise kernel; the gradient is the same filter with the opposite padding."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, kernel, padding=padding, groups=x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, kernel, padding = inputs
        ctx.save_for_backward(kernel)
        ctx.padding = kernel.shape[-1] - 1 - padding

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        return F.conv2d(grads[0], kernel, padding=ctx.padding, groups=len(kernel)), None, None


class Restyle(torch.autograd.Function):
    """scale (x - mean) / std + shift with the mean and deviation of each example's channel (AdaIN, eq. 1)."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        mean = spatial_sum(x) / pixels
        deviation = x - per_channel(mean, x)
        rstd = torch.rsqrt(spatial_sum(deviation.square_()) / pixels + 1e-8)
        gain = scale * rstd
        return torch.addcmul(per_channel(shift - gain * mean, x), x, per_channel(gain, x)), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad: Tensor = grads[0]
        x, scale, mean, rstd = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        of_shift = spatial_sum(grad)
        of_scale = rstd * (spatial_sum(x * grad) - mean * of_shift)
        # grad minus its mean and its part along the normalised x, as gain * grad + slope * x + rest
        gain = scale * rstd
        slope = -gain * rstd * of_scale / pixels
        rest = -gain * of_shift / pixels - slope * mean
        of_x = torch.addcmul(per_channel(rest, x), x, per_channel(slope, x)).addcmul_(grad, per_channel(gain, x))
        return of_x, of_scale, of_shift


def filter_kernel(taps: list[float], channels: int, gain: float, dtype: torch.dtype) -> Tensor:
    """The depthwise kernel (C, 1, n, n) of a separable filter whose weights sum to `gain`."""
    line = torch.tensor(taps) / sum(taps)
    return packed((gain * line[:, None] * line).expand(channels, 1, -1, -1), dtype)


def filtered(x_BCHW: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """x under a kernel of `filter_kernel`, with zeros beyond the border."""
    y: Tensor = Filter.apply(x_BCHW, kernel, padding)  # type: ignore[no-untyped-call]
    return y


class Affine(nn.Module):
    """An `EqualLinear` with its gains folded in, and `offset` added to its bias."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: EqualLinear, offset: Tensor | float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.weight * linear.weight_gain).detach())
        self.register_buffer("bias", (linear.bias * linear.bias_gain + offset).detach())

    def forward(self, w_BD: Tensor) -> Tensor:
        return F.linear(w_BD, self.weight, self.bias)


class Style(nn.Module):
    """w_BD -> the scale and the shift (B, C) of an AdaIN layer."""

    def __init__(self, epilogue: Epilogue) -> None:
        super().__init__()
        # the scale of eq. 1 is counted from 1, the shift from 0
        self.affine = Affine(epilogue.affine, torch.cat([torch.ones_like(epilogue.bias), torch.zeros_like(epilogue.bias)]))

    def forward(self, w_BD: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.affine(w_BD).chunk(2, dim=1)
        return scale, shift


class FastLayer(nn.Module):
    """A layer of StyleGAN 1."""

    kernel: Tensor
    offset: Tensor
    blur: Tensor

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = layer.up
        weight = layer.weight * layer.gain
        if layer.up:
            weight = transposed_kernel(weight if layer.fused else weight.flip(2, 3))
            self.register_buffer("blur", filter_kernel([1.0, 2.0, 1.0], weight.shape[1], 1.0, dtype))
        epilogue = layer.epilogue
        offset = epilogue.noise * epilogue.noise_strength[:, None, None] + epilogue.bias[:, None, None]
        self.register_buffer("kernel", packed(weight, dtype))
        self.register_buffer("offset", packed(offset[None], dtype))
        self.style = Style(epilogue)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.up:
            x = filtered(F.conv_transpose2d(x, self.kernel, stride=2, padding=1), self.blur, 1)
        else:
            x = F.conv2d(x, self.kernel, padding=1)
        x = F.leaky_relu_(x.add_(self.offset), SLOPE)
        styled: Tensor = Restyle.apply(x, *self.style(w))[0]  # type: ignore[no-untyped-call]
        return styled


class FastSynthesis(nn.Module):
    """w_BLD -> image in about [-1, 1]."""

    start: Tensor
    image_kernel: Tensor
    image_bias: Tensor

    def __init__(self, synth: Synthesis, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("start", packed(synth.first.activate(synth.const), torch.float32))
        self.first = Style(synth.first)
        self.layers = nn.ModuleList(FastLayer(layer, dtype) for layer in cast(list[Layer], synth.layers))
        self.register_buffer("image_kernel", packed(synth.image_weight * synth.image_gain, dtype))
        self.register_buffer("image_bias", synth.image_bias.detach().clone())

    def forward(self, w: Tensor) -> Tensor:
        scale, shift = self.first(w[:, 0])
        x = torch.addcmul(shift[:, :, None, None], self.start, scale[:, :, None, None])
        x = x.to(self.image_kernel.dtype, memory_format=torch.channels_last)
        for k, layer in enumerate(self.layers, start=1):
            x = layer(x, w[:, k])
        return F.conv2d(x, self.image_kernel).float() + self.image_bias[:, None, None]
