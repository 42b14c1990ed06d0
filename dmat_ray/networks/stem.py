"""The first convolution of an image network, with a faster gradient to the image.

ResNets begin with seven by seven taps and stride two. The gradient to three channels of pixels is then a transposed
convolution with three output channels, for which CPUs' libraries have no good kernel: it was 7 % of an attack on ResNet-50.
The same sums are one plain convolution with stride one: each of the stride x stride phases of the pixels takes its own share
of the taps, and the phases are channels that `pixel_shuffle` puts in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def phase_kernel(weight_OCKK: Tensor, stride: int, padding: int) -> tuple[Tensor, int]:
    """The kernel (C stride^2, O, m, m) that takes the output's gradient to the image's, and how far it reaches to the left.

    Pixel i = stride q + r meets output o through tap r + padding + stride (q - o).
    """
    taps = weight_OCKK.shape[2]
    lowest, highest = -((stride - 1 + padding) // stride), (taps - 1 - padding) // stride
    m, first = highest - lowest + 1, padding + stride * lowest
    # taps from `first` on, of which those that do not exist are zero
    before, after = -first, first + m * stride - taps
    whole = F.pad(weight_OCKK, (before, after, before, after))
    o, c = weight_OCKK.shape[:2]
    phases = whole.view(o, c, m, stride, m, stride).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    return phases.reshape(c * stride * stride, o, m, m), highest


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, left: int, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.left, ctx.stride, ctx.size = left, stride, x.shape[2:]
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad: Tensor = grads[0]
        (kernel,) = ctx.saved_tensors
        m = kernel.shape[2]
        counts = [-(-size // ctx.stride) for size in ctx.size]
        # zeros on both sides, as many as the side that needs more, and what they add is cut off
        pads = [max(ctx.left, n + m - 1 - ctx.left - size) for n, size in zip(counts, grad.shape[2:], strict=True)]
        phases = F.conv2d(grad, kernel, padding=pads)
        top, start = (pad - ctx.left for pad in pads)
        phases = phases[:, :, top : top + counts[0], start : start + counts[1]]
        of_x = F.pixel_shuffle(phases, ctx.stride)[:, :, : ctx.size[0], : ctx.size[1]]
        return of_x, None, None, None, None, None, None


class Stem(nn.Module):
    """A frozen convolution (with a bias) of at most four channels and a stride above one."""

    kernel: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = int(conv.stride[0]), int(conv.padding[0])
        kernel, self.left = phase_kernel(conv.weight.detach(), self.stride, self.padding)
        self.register_buffer("kernel", kernel)

    @torch.no_grad()
    def refresh(self) -> None:
        """To be called when the weight has changed."""
        self.kernel.copy_(phase_kernel(self.weight, self.stride, self.padding)[0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Stem.apply(x, self.weight, self.bias, self.kernel, self.left, self.stride, self.padding)  # type: ignore[no-untyped-call]
        return y


def fits(conv: nn.Module) -> bool:
    """Whether a layer may become a Stem."""
    return (
        type(conv) is nn.Conv2d
        and conv.in_channels <= 4
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.padding[0] == conv.padding[1] < conv.kernel_size[0] == conv.kernel_size[1]
        and conv.stride[0] == conv.stride[1] > 1
    )
