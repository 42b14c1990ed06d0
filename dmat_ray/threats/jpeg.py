"""JPEG (arXiv 1908.08016): the attack moves the coefficients that a JPEG file of the image would hold."""

import math

import torch
from torch import Tensor

from dmat_ray.config import JpegThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball
from dmat_ray.types import Batch

# Annex K of ITU-T T.81, for luma and chroma: the steps of quality 50
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *[(99,) * 8] * 4,
)  # fmt: skip
# JFIF: full-range BT.601
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
FROM_YCC = torch.linalg.inv(torch.tensor(TO_YCC, dtype=torch.float64)).tolist()


def dct_matrix(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of eight values, (8, 8)."""
    k = torch.arange(8, dtype=like.dtype, device=like.device)
    rows = torch.cos(math.pi / 8 * (k[None, :] + 0.5) * k[:, None]) / 2
    return torch.cat([rows[:1] / math.sqrt(2), rows[1:]])


class Jpeg(Ball):
    """theta is (B, C, H', W'): additions to the DCT coefficients of 8x8 blocks, in steps of the standard's tables.

    What the image itself has is not rounded (rounding has no gradient), and chroma keeps its resolution, unlike in the published
    code, which needs sides of multiples of 16; here the image is continued by its last pixels to whole blocks.
    """

    def __init__(self, config: JpegThreat) -> None:
        super().__init__(config.norm, config.eps)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Uniform in the ball; zero without draws."""
        x = batch.x_BCHW
        return self.within(draws, x.new_empty(*x.shape[:2], *(-(-side // 8) * 8 for side in x.shape[2:])))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """Encoded, moved, decoded. Decoding is linear: only what is added has to be decoded."""
        x = batch.x_BCHW
        height, width = x.shape[2:]
        colour = x.shape[1] == 3
        tables = x.new_tensor([LUMA, CHROMA, CHROMA] if colour else [LUMA]) / 255
        rows, columns = theta.shape[2] // 8, theta.shape[3] // 8
        coefficients = theta.view(*theta.shape[:2], rows, 8, columns, 8) * tables[:, None, :, None, :]
        dct = dct_matrix(x)
        # along rows in strips of blocks, then along columns: two products, nothing is moved in memory
        strips = dct.T @ coefficients.view(*theta.shape[:2], rows, 8, -1)
        moved = (strips.view(-1, 8) @ dct).view(theta.shape)[:, :, :height, :width]
        if colour:
            moved = torch.einsum("ij,bjhw->bihw", x.new_tensor(FROM_YCC), moved)
        return (x + moved).clamp(0.0, 1.0)
