"""Two functions of an image against each other."""

from collections.abc import Callable

import torch
from torch import Tensor


def require_same(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Outputs, and gradients to x of a sum that weighs each output differently, in float64."""
    found, expected = [], []
    for results, function in ((found, f), (expected, g)):
        start = x.clone().requires_grad_(True)
        out = function(start)
        weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        results += [out, *torch.autograd.grad((out * weights).sum(), start)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
