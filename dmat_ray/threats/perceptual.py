"""Perceptual attacks (arXiv 2006.12655): pixels move as far as a network that judges similarity does not mind.

The distance is that of unlearned LPIPS, unsquared: between features of a network, one vector a pixel and layer, each of length 1.
With method pgd an attack is the paper's PPGD, with lagrange its Fast-LPA, with lpa its LPA.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import PerceptualThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import clip_straight_through, per_example
from dmat_ray.types import Batch

if TYPE_CHECKING:
    from dmat_ray.networks.perceptual import Perceptual

NOISE = 0.01  # standard deviation of the random start in pixel units, as published
SOLVES = 5  # iterations of conjugate gradients a step, as published
REACH = 0.1  # L2 norm of the step in pixels that `length` measures by, as published
BISECTIONS = 10  # of the way back into the ball, as published
# of the radius, left free for what batches of other sizes round otherwise; TF32 takes more, and only training allows it, whose
# attacks measure an image in a batch as large as that in which it was projected
ROUNDING = 1e-4
EPSILON = 1e-10  # of the lengths of feature vectors, as published


@functools.lru_cache(maxsize=4)
def _judge(net: str, weights: str, dtype: torch.dtype, device: torch.device) -> "Perceptual":
    from dmat_ray.networks.perceptual import Perceptual  # lpips takes seconds to import

    return Perceptual(net, weights, setting="perceptual.weights").lowered(dtype).to(device)


def _features(judge: "Perceptual", x_BCHW: Tensor) -> Tensor:
    from dmat_ray.networks.perceptual import SMALLEST

    height, width = x_BCHW.shape[2:]
    if (least := min(height, width)) < SMALLEST:
        size = [-(-side * SMALLEST // least) for side in (height, width)]
        x_BCHW = F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False)
    rows = []
    for a in judge.maps(x_BCHW):
        square = a.square().sum(dim=1, keepdim=True)
        # where all channels are 0 a root has no slope, and none is needed: those channels are off
        length = torch.where(square > 0, square, 1.0).sqrt()
        rows.append((a / ((length + EPSILON) * (a.shape[2] * a.shape[3]) ** 0.5)).flatten(1))
    return torch.cat(rows, dim=1)


class PerceptualBall:
    """theta is delta, of the shape of x. Raises UserError if the network's weights are not where the settings say."""

    default_step: float | None = None

    def __init__(self, config: PerceptualThreat) -> None:
        self.net, self.weights = config.net, config.weights
        self.eps, self.limit, self.span = config.eps, config.eps, 2 * config.eps
        _judge(self.net, self.weights, torch.float32, torch.device("cpu"))  # what is missing is told before anything begins

    def features(self, x_BCHW: Tensor) -> Tensor:
        """phi(x), one row an image: layers end to end, each pixel of length 1 / sqrt(pixels), so that distances are L2 norms.

        Images with a side below what the network takes are enlarged first (bilinear).
        """
        return _features(_judge(self.net, self.weights, x_BCHW.dtype, x_BCHW.device), x_BCHW)

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Faint Gaussian noise, for the distance has no slope at x; without draws no change."""
        x = batch.x_BCHW
        if draws is None:
            return torch.zeros_like(x)
        return self.project(batch, NOISE * draws.normal(*x.shape[1:], like=x))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """clip(x + delta)."""
        return clip_straight_through(batch.x_BCHW + theta)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """|phi(x') - phi(x)|."""
        with torch.no_grad():
            here = self.features(batch.x_BCHW)
        distance_B: Tensor = torch.linalg.vector_norm(self.features(self.render(batch, theta)) - here, dim=1)
        return distance_B

    def length(self, batch: Batch, theta: Tensor, move: Tensor) -> Tensor:
        """By how much phi changes along the step, by a finite difference."""
        size = move.flatten(1).norm(dim=1).clamp_min(1e-30)
        x = self.render(batch, theta)
        with torch.no_grad():
            change = self.features(x + REACH * move / per_example(size, move)) - self.features(x)
        length_B: Tensor = torch.linalg.vector_norm(change, dim=1) * size / REACH
        return length_B

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """What raises a linear loss most among steps with |J step| = 1, where J is the slope of phi: along (J'J)^-1 gradient.

        The paper's first-order step: conjugate gradients, each example its own, begun anew at every step.
        """
        x = self.render(batch, theta).detach()
        # the network must be there before a transform begins, inside of which it cannot be made
        features = functools.partial(_features, _judge(self.net, self.weights, x.dtype, x.device))
        pulled = torch.func.vjp(features, x)[1]

        def pushed(v: Tensor) -> Any:
            return torch.func.jvp(features, (x,), (v,))[1]

        return _first_order_step(pushed, pulled, gradient)

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """Clipped, then straight towards x until inside the ball (by bisection: not the closest point)."""
        x = batch.x_BCHW
        delta = (x + theta).clamp(0.0, 1.0) - x
        with torch.no_grad():
            here = self.features(x)

            def inside(share_B: Tensor) -> Tensor:
                moved = self.features((x + per_example(share_B, delta) * delta).clamp(0.0, 1.0))
                fits_B: Tensor = torch.linalg.vector_norm(moved - here, dim=1) <= self.eps * (1 - ROUNDING)
                return fits_B

            low, high = x.new_zeros(len(x)), x.new_ones(len(x))
            whole = inside(high)
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                fits = inside(middle)
                low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
            return delta * per_example(torch.where(whole, torch.ones_like(low), low), delta)


def _first_order_step(pushed: Any, pulled: Any, gradient: Tensor) -> Tensor:
    """(J'J)^-1 gradient, approximately, at the length at which |J step| = 1; 0 for no gradient.

    `pushed` is v -> J v, `pulled` is u -> (J'u,).
    """
    residual = gradient / per_example(gradient.flatten(1).norm(dim=1).clamp_min(1e-30), gradient)
    solution, along = torch.zeros_like(residual), residual
    image = torch.zeros_like(pushed(along))
    squared_B = residual.square().flatten(1).sum(dim=1)
    for _ in range(SOLVES):
        pushed_along = pushed(along)
        step_B = squared_B / pushed_along.square().sum(dim=1).clamp_min(1e-30)
        solution = solution + per_example(step_B, along) * along
        image = image + step_B[:, None] * pushed_along
        residual = residual - per_example(step_B, along) * pulled(pushed_along)[0]
        before_B, squared_B = squared_B, residual.square().flatten(1).sum(dim=1)
        along = residual + per_example(squared_B / before_B.clamp_min(1e-30), along) * along
    return solution / per_example(image.norm(dim=1).clamp_min(1e-30), solution)
