"""Filters of images that several corruptions share: linear maps along one axis, small kernels, trails, resampling.

Borders have scipy's names: nearest (a a a | a b c d), reflect (c b a | a b c d) and mirror (d c b | a b c d).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def separable(x_BCHW: Tensor, taps: Sequence[float], border: str) -> Tensor:
    """x under an odd number of symmetric taps along both axes, of any length against the image."""
    return along_axes(x_BCHW, *(_band(size, taps, border) for size in x_BCHW.shape[2:]))


def along_axes(x_BCHW: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The linear maps rows (H', H) and columns (W', W) applied to the two axes of x."""
    return rows.to(x_BCHW) @ x_BCHW @ columns.to(x_BCHW).T


def _band(size: int, taps: Sequence[float], border: str) -> Tensor:
    """The map (size, size) of a filter along an axis, with the border's taps folded back inside."""
    reach = len(taps) // 2
    places = torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)
    if border == "nearest":
        places = places.clamp(0, size - 1)
    elif border == "reflect":
        places = places % (2 * size)
        places = torch.minimum(places, 2 * size - 1 - places)
    else:
        places = places % (2 * size - 2)
        places = torch.minimum(places, 2 * size - 2 - places)
    weights = torch.tensor(taps, dtype=torch.float64).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, places, weights)


def gaussian_taps(std: float, reach: int) -> list[float]:
    """A Gaussian at -reach to reach that sums to 1."""
    values = [math.exp(-0.5 * (i / std) ** 2) for i in range(-reach, reach + 1)]
    return [v / sum(values) for v in values]


def gaussian(x_BCHW: Tensor, std: float, truncate: float = 4.0, border: str = "nearest") -> Tensor:
    """x under a Gaussian cut at `truncate` standard deviations, as scipy.ndimage cuts it; std 0 changes nothing."""
    reach = int(truncate * std + 0.5)
    return separable(x_BCHW, gaussian_taps(std, reach), border) if reach else x_BCHW


def correlate(x_BCHW: Tensor, kernel_KK: Tensor) -> Tensor:
    """Each channel of x under an odd kernel that is not turned, mirrored at the border."""
    reach = len(kernel_KK) // 2
    planes = F.pad(x_BCHW, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(planes, kernel_KK.to(x_BCHW)[None, None]).view_as(x_BCHW)


def trail(x_BCHW: Tensor, radius: int, std: float, degrees_B: Tensor) -> Tensor:
    """x under one half of a Gaussian, 2 radius + 1 taps that lead away from the pixel at an angle: ImageMagick's motion blur.

    A tap is a whole pixel, the nearest to the line; beyond the border the outermost pixels go on.
    """
    half = gaussian_taps(std, 2 * radius)[2 * radius :]
    turn = degrees_B.double() * (math.pi / 180)
    batch = torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None, None]
    rows, columns = (torch.arange(size, device=x_BCHW.device) for size in x_BCHW.shape[2:])
    images, blurred = x_BCHW.movedim(1, 3), torch.zeros_like(x_BCHW)
    for i, weight in enumerate(half):
        down, right = (torch.ceil(i * part - 0.5).long()[:, None] for part in (turn.sin(), turn.cos()))
        at_rows, at_columns = (rows + down).clamp(0, len(rows) - 1), (columns + right).clamp(0, len(columns) - 1)
        blurred += weight / sum(half) * images[batch, at_rows[:, :, None], at_columns[:, None, :]].movedim(3, 1)
    return blurred


def zoom_map(size: int, factor: float) -> Tensor:
    """The map (size, size) of an axis whose middle is enlarged by `factor`, linear between pixels, and cut to its size."""
    kept = math.ceil(size / factor)
    larger = round(kept * factor)
    places = (size - kept) // 2 + (torch.arange(size, dtype=torch.float64) + (larger - size) // 2) * ((kept - 1) / (larger - 1))
    return (1 - (places[:, None] - torch.arange(size)).abs()).clamp_min(0)


def box_map(size: int, new: int) -> Tensor:
    """The map (new, size) of an axis that is resized under a box, as Pillow does it: means downwards, nearest upwards."""
    scale = size / new
    middles = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    away = (torch.arange(size) - middles[:, None] + 0.5) / max(scale, 1.0)
    inside = ((away > -0.5) & (away <= 0.5)).double()
    return inside / inside.sum(dim=1, keepdim=True)


def sample(x_BCHW: Tensor, rows_BHW: Tensor, columns_BHW: Tensor, border: str) -> Tensor:
    """x at those places (in pixels, 0 is the middle of the first), bilinear; border is reflect or mirror."""
    corners = border == "mirror"
    height, width = x_BCHW.shape[2:]
    down, right = (
        2 * at / (size - 1) - 1 if corners else (2 * at + 1) / size - 1 for at, size in ((rows_BHW, height), (columns_BHW, width))
    )
    grid = torch.stack([right, down], dim=3)
    return F.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=corners)


def luma(x_BCHW: Tensor) -> Tensor:
    """Rec. 601 luma, (B, 1, H, W); grey images as they are."""
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    return (x_BCHW * x_BCHW.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
