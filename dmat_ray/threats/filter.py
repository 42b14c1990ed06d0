"""Adversarial filters: the attack chooses the convolution that an image goes through.

As in arXiv 2002.03500, whose blur is a search over kernels that sum to 1; here one kernel a channel serves the whole image, and
weights may be negative, so that it sharpens as well as blurs, shifts or embosses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import FilterThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball
from dmat_ray.types import Batch


class Filter(Ball):
    """theta is (B, C, S S - 1): the weights of a pixel's neighbours, row by row. The pixel itself has what is left of 1, so
    that a constant image stays as it is. With `mix`, C - 1 more a channel: shares of the other channels, which leave grey alone.
    """

    def __init__(self, config: FilterThreat) -> None:
        super().__init__("linf", config.eps)
        self.size, self.mix = config.size, config.mix

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform; without draws the filter that changes nothing."""
        x = batch.x_BCHW
        others = x.shape[1] - 1 if self.mix else 0
        return self.within(draws, x.new_empty(*x.shape[:2], self.size**2 - 1 + others))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """Mixed, then filtered, the border continued by its last pixels; clipped."""
        x, around = batch.x_BCHW, self.size**2 - 1
        weights, others = theta[..., :around], theta[..., around:]
        if self.mix:
            off = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            mix = torch.zeros_like(off, dtype=theta.dtype).expand(len(x), -1, -1).masked_scatter(off, others)
            x = torch.einsum("bij,bjhw->bihw", mix + torch.diag_embed(1 - others.sum(dim=2)), x)
        middle = 1 - weights.sum(dim=2, keepdim=True)
        kernels = torch.cat([weights[..., : around // 2], middle, weights[..., around // 2 :]], dim=2)
        planes = F.pad(x, [self.size // 2] * 4, mode="replicate").flatten(0, 1)[None]
        kernels = kernels.view(-1, 1, self.size, self.size)
        return F.conv2d(planes, kernels, groups=len(kernels)).view_as(x).clamp(0.0, 1.0)
