"""Searches that ask the network for its outputs and for no gradient: random points, and Square (arXiv 1912.00049).

Where gradients are masked these find what the others miss; `random` is the noise that any search has to beat.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import AttackConfig
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import per_example
from dmat_ray.threats.image import ImageBall
from dmat_ray.types import Batch, Query, Threat

SHARE = 0.8  # of the pixels that the first squares cover (AutoAttack's, arXiv 2003.01690)
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last of 10,000 queries before that share is halved
SMALLEST = {"linf": 1, "l2": 3}  # side of a square
TILES = 5  # squares that a first image in L2 has along each side


class Random:
    """Random points of the budget, each independent of those before; the result is the worst."""

    needs_gradient = False
    keeps_best = True

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        if draws is None:
            raise UserError(f"method {config.method} draws random numbers for every query; it needs random_start=true")
        self.threat, self.batch, self.draws = threat, batch, draws
        self.best: Tensor | None = None

    def start(self) -> Tensor:
        """The first point."""
        return self.threat.start(self.batch, self.draws)

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """Another point."""
        self._note(theta, seen.loss_B)
        return self.start()

    def last(self, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The point with the highest loss."""
        return self._note(theta, loss(theta))

    def _note(self, theta: Tensor, loss_B: Tensor) -> Tensor:
        if self.best is None:
            self.best, self.best_loss_B = theta, loss_B
        better = loss_B > self.best_loss_B
        self.best = torch.where(per_example(better, theta), theta, self.best)
        self.best_loss_B = torch.where(better, loss_B, self.best_loss_B)
        return self.best


class Square(Random):
    """Squares at random places, each kept if it raises the loss; they shrink as the search goes on (arXiv 1912.00049).

    Every example has squares of its own, where the published code moves one place about for the whole batch.
    """

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        super().__init__(threat, batch, config, draws)
        if not isinstance(threat, ImageBall) or threat.norm not in SMALLEST:
            raise UserError("method square searches threat image with norm linf or l2; for others give method random")
        self.norm, self.eps = threat.norm, threat.eps
        self.step, self.steps = 0, config.steps
        # all at once, so that no step waits for the host: two corners, whether the pattern is turned, and signs
        self.numbers = self.draws.uniform(config.steps, 5 + batch.x_BCHW.shape[1], like=batch.x_BCHW)

    def start(self) -> Tensor:
        """Stripes one pixel wide for L-infinity, tiles of patterns for L2."""
        x = self.batch.x_BCHW
        if self.norm == "linf":
            return self.threat.project(self.batch, self.eps * _signs(self.draws.uniform(x.shape[1], 1, x.shape[3], like=x)))
        side = max(1, min(x.shape[2:]) // TILES)
        rows, columns = x.shape[2] // side, x.shape[3] // side
        wave_SS = pattern(side, x)
        turned = self.draws.uniform(1, rows, columns, 1, 1, like=x) < 0.5
        signs = _signs(self.draws.uniform(x.shape[1], rows, columns, 1, 1, like=x))
        tiles = (torch.where(turned, wave_SS, wave_SS.T) * signs).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        down, right = x.shape[2] - rows * side, x.shape[3] - columns * side
        return self._filled(F.pad(tiles, (right // 2, right - right // 2, down // 2, down - down // 2)))

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """The best so far with one more square."""
        best, numbers = self._note(theta, seen.loss_B), self.numbers[:, self.step]
        side = side_at(self.step, self.steps, self.norm, *self.batch.x_BCHW.shape[2:])
        self.step += 1
        signs = _signs(numbers[:, 5:, None, None])
        there, down, right = self._window(numbers[:, 0], numbers[:, 1], side)
        if self.norm == "linf":
            return self.threat.project(self.batch, torch.where(there, self.eps * signs, best))
        elsewhere, _, _ = self._window(numbers[:, 2], numbers[:, 3], side)
        # the new square may be as large as those that were here and there, and what is left of the budget
        left = (self.eps**2 - best.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0.0) / best.shape[1]
        size = (left + (best * (there | elsewhere)).square().sum(dim=(2, 3), keepdim=True)).sqrt()
        wave_SS = pattern(side, best)
        rows, columns = (at.clamp(0, side - 1) for at in (down, right))
        wave = torch.where(
            per_example(numbers[:, 4] < 0.5, best),
            wave_SS[rows[:, :, None], columns[:, None, :]][:, None],
            wave_SS.T[rows[:, :, None], columns[:, None, :]][:, None],
        )
        new = _unit_planes((wave * signs + _unit_planes(best * there)) * there) * size
        return self._filled(torch.where(there, new, best * ~elsewhere))

    def _window(self, down_B: Tensor, right_B: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, H, W), true in the square that two numbers in [0, 1) place; rows (B, H), columns (B, W), 0 where it begins."""
        height, width = self.batch.x_BCHW.shape[2:]
        places = []
        for share_B, length in ((down_B, height), (right_B, width)):
            begin = (share_B * (length - side + 1)).long().clamp(max=length - side)
            places.append(torch.arange(length, device=share_B.device) - begin[:, None])
        rows, columns = ((at >= 0) & (at < side) for at in places)
        return (rows[:, :, None] & columns[:, None, :])[:, None], places[0], places[1]

    def _filled(self, delta: Tensor) -> Tensor:
        """As long as the budget allows, then clipped."""
        size = per_example(delta.flatten(1).norm(dim=1).clamp_min(1e-12), delta)
        return self.threat.project(self.batch, delta / size * self.eps)


def side_at(step: int, steps: int, norm: str, height: int, width: int) -> int:
    """Side of the squares of a step; in L2 it is odd."""
    at = step * 10_000 // steps
    share = SHARE / 2 ** sum(at > last for last in HALVINGS)
    side = max(round(math.sqrt(share * height * width)), SMALLEST[norm])
    if norm != "l2":
        return min(side, height, width)
    return min(side // 2 * 2 + 1, (min(height, width) - 1) // 2 * 2 + 1)


def pattern(side: int, like: Tensor) -> Tensor:
    """What a square in L2 adds, (S, S) of norm 1: a hill in its upper half, a dale in its lower."""
    above = side // 2
    wave = torch.cat([_hill(above, side, like), -_hill(side - above, side, like)])
    unit_SS: Tensor = wave / wave.norm()
    return unit_SS


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """Of norm 1, falling in rings around the middle: the sum of 1 / (j + 1)^2 from a pixel's ring j outwards."""
    rings = max(height, width) // 2 + 1
    heights = (1.0 / torch.arange(1, rings + 1, dtype=like.dtype, device=like.device) ** 2).flip(0).cumsum(0).flip(0)
    rows, columns = ((torch.arange(n, device=like.device) - n // 2).abs() for n in (height, width))
    hill = heights[torch.maximum(rows[:, None], columns[None, :])]
    unit: Tensor = hill / hill.norm().clamp_min(1e-12)
    return unit


def _signs(uniform: Tensor) -> Tensor:
    return (uniform < 0.5).to(uniform) * 2 - 1


def _unit_planes(planes: Tensor) -> Tensor:
    """Each channel of each example at norm 1, or 0."""
    return planes / planes.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-12)
