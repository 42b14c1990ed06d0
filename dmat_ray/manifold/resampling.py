"""The fixed filters of StyleGAN 1 and 2, as sums of shifted views: quick on a CPU in both directions, any dtype."""

import torch.nn.functional as F
from torch import Tensor


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


def blur_121(x: Tensor) -> Tensor:
    """x_BCHW under the separable filter [1,2,1]/4, zeros beyond the border; [1,2,1] is [1,1] twice over itself."""
    x = F.pad(x, (1, 1, 1, 1))
    for _ in range(2):
        x = x[:, :, 1:] + x[:, :, :-1]
        x = x[:, :, :, 1:] + x[:, :, :, :-1]
    return x * (1.0 / 16.0)
