"""Random flips and crops of training images, as usual for small photographs (He et al., arXiv 1512.03385, section 4.2)."""

import torch
import torch.nn.functional as F

from dmat_ray.config import TrainingConfig
from dmat_ray.rng import Draws
from dmat_ray.types import Batch


def augment(batch: Batch, settings: TrainingConfig, epoch: int) -> Batch:
    """The batch with each image padded by `crop_padding` black pixels, cropped to its size, and with `flip` mirrored or not.

    What is drawn for an image depends on the seed, its id and the epoch alone. w is left out: g(w) is not the new image.
    """
    x, most = batch.x_BCHW, 2 * settings.crop_padding
    height, width = x.shape[2:]
    draws = Draws(settings.seed, batch.id, f"augment/{epoch}").uniform(3, like=x)
    # a number just below 1 may round to the one beyond the last place
    top, left = (draws[:, :2] * (most + 1)).long().clamp(max=most).unbind(1)
    rows, columns = top[:, None] + torch.arange(height).to(top), left[:, None] + torch.arange(width).to(left)
    mirrored = (draws[:, 2] < 0.5) & settings.flip
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(x, [settings.crop_padding] * 4)
    image, channel = torch.arange(len(x)).to(top), torch.arange(x.shape[1]).to(top)
    moved = padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    return Batch(batch.id, moved, batch.y_B)
