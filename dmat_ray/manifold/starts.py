"""Where the search for an image's w begins: the mean, the nearest of many samples, or what an encoder says."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.samples import chunk_size
from dmat_ray.types import Generator

CHUNK = 64  # samples at once, or fewer of large images
THUMBNAIL = 32  # pixels a side that samples are compared by

Start = Callable[[Tensor], Tensor]


def thumbnails(x_BCHW: Tensor) -> Tensor:
    """(B, C h w): the pixels, averaged down to `THUMBNAIL` a side where there are more."""
    return F.adaptive_avg_pool2d(x_BCHW, min(THUMBNAIL, x_BCHW.shape[-1])).flatten(1)


class Nearest:
    """The w of that sample whose thumbnail is closest (L2); samples are rendered once, their images are not kept."""

    @torch.no_grad()
    def __init__(self, generator: Generator, candidates: int, seed: int) -> None:
        z = torch.randn(candidates, generator.z_dim, generator=torch.Generator().manual_seed(seed)).to(generator.w_mean)
        parts = [generator.mapping(part) for part in z.split(CHUNK)]
        # mapped z are one w for all layers, kept once
        self.w = torch.cat([w[:, :1] if w.stride(1) == 0 else w for w in parts])
        self.layers = generator.num_ws
        together = min(CHUNK, chunk_size(generator.resolution))
        images = (generator.synthesis(w.expand(-1, self.layers, -1)) for w in self.w.split(together))
        self.pixels = torch.cat([thumbnails(x) for x in images])

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        # in float64 a tie of two samples does not hang on which images stand beside this one
        wanted = thumbnails(x_BCHW).double()
        parts = []
        for pixels in self.pixels.split(4096):
            part = pixels.double()
            parts.append(part.square().sum(dim=1) - 2 * wanted @ part.T)
        return self.w[torch.cat(parts, dim=1).nan_to_num(torch.inf).argmin(dim=1)].expand(-1, self.layers, -1)


def build(generator: Generator, config: ProjectionConfig, encoder: nn.Module | None) -> Start:
    """x_BCHW in [0, 1] -> w_BLD, as `config.start` says; raises UserError if that is an encoder and there is none."""
    if config.start == "nearest":
        return Nearest(generator, config.candidates, config.seed)
    if config.start == "encoder":
        if encoder is None:
            raise UserError(
                "projection.start is encoder, and there is none: train one with jobs/train_encoder.py, give its folder as "
                "projection.encoder, or start without: projection.start nearest"
            )
        return encoder
    return lambda x: generator.w_mean.expand(len(x), generator.num_ws, -1)
