"""Augmentation of everything that the discriminator sees, real and made alike, so that samples do not learn it.

After Karras et al., "Training Generative Adversarial Networks with Limited Data" (ADA, arXiv 2006.06676, appendix B):
each augmentation is applied to each image by its own coin of one probability p; as long as p stays below 0.8, the
distribution under augmentation tells the one without, and nothing leaks. All geometric ones are one resampling of the
image under one affine matrix. `adapted` is the heuristic that finds p.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Draws of a batch: (shape after the batch dimension) -> Tensor with the batch first
Sampler = Callable[..., Tensor]


def _affine(xx: Tensor, xy: Tensor, dx: Tensor, yx: Tensor, yy: Tensor, dy: Tensor) -> Tensor:
    """(B) each -> (B, 3, 3)."""
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    rows = [torch.stack(row, dim=1) for row in ((xx, xy, dx), (yx, yy, dy), (zero, zero, one))]
    return torch.stack(rows, dim=1)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _affine(x, zero, zero, zero, y, zero)


def _turn(angle: Tensor) -> Tensor:
    zero = torch.zeros_like(angle)
    return _affine(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)


def _translate(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _affine(one, zero, x, zero, one, y)


# name -> (on (B) of 0 or 1, unit (B, 2) uniform in [-1, 1], normal (B, 2)) -> matrix; `on` 0 must give the identity
GEOMETRIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flip": lambda on, unit, normal: _scale(1 - 2 * on * (unit[:, 0] < 0), torch.ones_like(on)),
    "rotate90": lambda on, unit, normal: _turn(on * math.pi / 2 * ((unit[:, 0] + 1) * 2).floor().clamp(max=3)),
    # in units of half the image: a deviation of an eighth of its width
    "translate": lambda on, unit, normal: _translate(on * normal[:, 0] * 0.25, on * normal[:, 1] * 0.25),
    "scale": lambda on, unit, normal: _scale(2 ** (on * normal[:, 0] * 0.2), 2 ** (on * normal[:, 0] * 0.2)),
    "tilt": lambda on, unit, normal: _turn(on * unit[:, 0] * math.radians(15)),
    "rotate": lambda on, unit, normal: _turn(on * unit[:, 0] * math.pi),
    "stretch": lambda on, unit, normal: _scale(2 ** (on * normal[:, 0] * 0.2), 2 ** (-on * normal[:, 0] * 0.2)),
}
COLOUR = ("brightness", "contrast", "saturation")


def augment(x_BCHW: Tensor, names: Sequence[str], probability: float, uniform: Sampler, normal: Sampler) -> Tensor:
    """x_BCHW in [-1, 1], each image augmented by each of `names` with `probability`; autocast does not reach in here.

    `uniform(*shape)` gives (B, *shape) in [0, 1), `normal(*shape)` standard normal. The same numbers are drawn whatever
    `probability` is, so that a change of it does not shift those that follow.
    """
    # half precision knows the place of a pixel in a 256 pixel wide image to half a pixel
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return _augmented(x_BCHW, names, probability, uniform, normal)


def _augmented(x_BCHW: Tensor, names: Sequence[str], probability: float, uniform: Sampler, normal: Sampler) -> Tensor:
    geometric = [name for name in names if name in GEOMETRIC]
    if geometric:
        matrix = None
        for name in geometric:
            coins, unit, gauss = uniform(1).to(x_BCHW), uniform(2).to(x_BCHW) * 2 - 1, normal(2).to(x_BCHW)
            step = GEOMETRIC[name]((coins[:, 0] < probability).to(x_BCHW), unit, gauss)
            matrix = step if matrix is None else matrix @ step
        assert matrix is not None
        grid = F.affine_grid(matrix[:, :2], list(x_BCHW.shape), align_corners=False)
        x_BCHW = F.grid_sample(x_BCHW, grid.to(x_BCHW), padding_mode="border", align_corners=False)
    for name in names:
        if name in COLOUR:
            on = (uniform(1).to(x_BCHW) < probability).to(x_BCHW)[:, :, None, None]
            amount = normal(1).to(x_BCHW)[:, :, None, None] * on
            x_BCHW = _recolour(x_BCHW, name, amount)
    return x_BCHW


def _recolour(x: Tensor, name: str, amount: Tensor) -> Tensor:
    """One colour change by `amount` (B, 1, 1, 1), where 0 is none; strengths of arXiv 2006.06676."""
    if name == "brightness":
        return x + amount * 0.2
    if name == "contrast":
        return x * 2 ** (amount * 0.5)
    grey = x.mean(dim=1, keepdim=True)  # along the axis of equal channels, the paper's luma
    return grey + (x - grey) * 2**amount


def adapted(probability: float, real_sign: float, target: float, kimg: float, ada_kimg: float) -> float:
    """The probability after `kimg` thousand images in which D's mean sign on real images was `real_sign`.

    It rises where the discriminator is too sure (overfits) and falls where it is not, at a constant rate, within [0, 0.8].
    """
    step = math.copysign(kimg / ada_kimg, real_sign - target)
    return min(0.8, max(0.0, probability + step))
