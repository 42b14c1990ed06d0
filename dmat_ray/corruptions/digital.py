"""Contrast, elastic transform, pixelate, JPEG and saturation."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmat_ray.corruptions.filters import along_axes, box_map, gaussian, sample
from dmat_ray.rng import Draws


def contrast(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Each channel moved towards its mean over the image."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + share * (x - mean)


def elastic_transform(x: Tensor, draws: Draws, far: float, smooth: float, affine: float) -> Tensor:
    """A random affine map that moves three points by at most `affine` pixels, then a smooth random flow.

    The published code rounds places under the affine map to 1/32 of a pixel; here nothing is rounded.
    """
    height, width = x.shape[2:]
    corners = x.new_tensor([[1, 1], [1, -1], [-1, -1]]) * (min(height, width) // 3)
    points = corners + x.new_tensor([width // 2, height // 2])
    moved = points + affine * (2 * draws.uniform(3, 2, like=x) - 1)
    # from a place (column, row, 1) of the result to the place of the image that is seen there
    back = torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[:, :, :1])], dim=2), points.expand_as(moved))
    row, column = torch.meshgrid(*(torch.arange(size).to(x) for size in (height, width)), indexing="ij")
    seen = torch.stack([column, row, torch.ones_like(row)], dim=2).flatten(0, 1) @ back
    columns, rows = seen.unflatten(1, (height, width)).unbind(dim=3)
    x = sample(x, rows, columns, "mirror")
    flow = far * gaussian(2 * draws.uniform(2, height, width, like=x) - 1, smooth, truncate=3.0, border="reflect")
    return sample(x, row + flow[:, 0], column + flow[:, 1], "reflect")


def pixelate(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Made smaller by means over boxes, then as large as before by repetition."""
    small = [(size, int(size * share)) for size in x.shape[2:]]
    boxes = along_axes(x, *(box_map(size, new) for size, new in small))
    return along_axes(boxes, *(box_map(new, size) for size, new in small))


def jpeg_compression(x: Tensor, draws: Draws, quality: int) -> Tensor:
    """Rounded to 8 bits, saved as JPEG of that quality (half the resolution for colour) and read again, on the CPU."""
    decoded = []
    for image in x.mul(255).round().byte().movedim(1, 3).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "JPEG", quality=quality)
        decoded.append(np.array(Image.open(buffer)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).movedim(3, 1).to(x) / 255


def saturate(x: Tensor, draws: Draws, factor: float, more: float) -> Tensor:
    """Saturation of HSV times `factor` plus `more`; hue and value stay. Grey images have none, and stay as they are."""
    if x.shape[1] == 1:
        return x
    value = x.amax(dim=1, keepdim=True)
    spread = value - x.amin(dim=1, keepdim=True)
    target = (spread / value.clamp_min(1e-12) * factor + more).clamp(max=1.0) * value
    # what has no hue counts as red
    below = torch.where(spread > 0, (value - x) / spread.clamp_min(1e-12), x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1))
    return value - below * target
