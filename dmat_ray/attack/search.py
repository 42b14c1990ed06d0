"""How theta moves from one gradient to the next: projected gradient descent, with momentum, with a step that adapts itself, and
through the outside of the budget.

Each search is told what the last theta did to the network and gives the next one. All of it is per example and stays on
the device. Searches that need no gradient are in `black_box.py`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dmat_ray.attack import black_box
from dmat_ray.config import LPA_ROUNDS, AttackConfig
from dmat_ray.config.attacks import require_steps
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import Ball, UnitBox, per_example
from dmat_ray.types import Batch, Measured, Query, Threat

DECAY = 1.0  # of momentum (arXiv 1710.06081)
INERTIA, RISING = 0.75, 0.75  # alpha and rho of arXiv 2003.01690
# of Auto-PGD in L1 (arXiv 2103.01208): share of the steps between two looks, of the coordinates at first; the others by its code
SPARSE_INTERVAL, SPARSE_FIRST, SPARSER, FEWER, SHORTEST = 0.04, 0.2, 1.5, 0.95, 10.0
WEIGHT = 10.0  # lambda of Fast-LPA (arXiv 2006.12655), at the end
FIRST_WEIGHT = 0.01  # of the LPA of the same paper


def step_size_of(config: AttackConfig, threat: Threat) -> float:
    """The configured step, or a default: the threat's own (shrinking with sqrt(steps)), else 2.5 limit / steps."""
    if config.step_size is not None:
        return config.step_size
    if threat.default_step is not None:
        # the published sqrt(0.001 / steps) cannot cross the box; never less than crosses it 2.5 times over
        return max(threat.default_step / math.sqrt(config.steps), 2.5 * threat.limit / config.steps)
    return 2.5 * threat.limit / config.steps


def require_reach(config: AttackConfig, threat: Threat) -> None:
    """Raise UserError for steps too short to get from the middle of a threat's ball, or unit box, to its border."""
    try:
        if isinstance(threat, UnitBox):
            # less than the half from the middle to the border: published steps, 200 of sqrt(0.001 / 200), come to 0.447
            require_steps(config, 0.4, "the least that makes sense in a unit box", "boxes")
        else:
            require_steps(config, threat.limit, "the threat's limit")
    except ValueError as error:
        raise UserError(str(error)) from None


class Search(Protocol):
    """One search from one start. It is made of a threat, a batch, settings, and with random_start the draws to start from."""

    needs_gradient: bool
    keeps_best: bool  # the result is one of the queries, wherever it goes on to; else it is where it ends

    def start(self) -> Tensor:
        """The first theta."""

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """The next theta, given what was seen at this one."""

    def last(self, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The result, given the theta that came last; `loss` puts a theta through the network if asked."""


class Pgd:
    """Steps of one length (arXiv 1706.06083); the result is where it ends, as published. FGSM is one of them."""

    needs_gradient = True
    keeps_best = False

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        self.threat, self.batch, self.draws, self.step_size = threat, batch, draws, step_size_of(config, threat)

    def start(self) -> Tensor:
        """The threat's."""
        return self.threat.start(self.batch, self.draws)

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """Steepest ascent, back inside the budget."""
        return self._ascend(theta, seen.gradient)

    def _ascend(self, theta: Tensor, gradient: Tensor) -> Tensor:
        return self.threat.project(self.batch, theta + self.step_size * self.threat.direction(self.batch, theta, gradient))

    def last(self, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Where it ended."""
        return theta


class Momentum(Pgd):
    """Along the sum of all gradients so far, each with mean absolute value 1 (MIM, arXiv 1710.06081)."""

    velocity: Tensor | None = None

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """Steepest ascent of the sum."""
        size = seen.gradient.flatten(1).abs().mean(dim=1).clamp_min(1e-30)
        gradient = seen.gradient / per_example(size, seen.gradient)
        self.velocity = gradient if self.velocity is None else DECAY * self.velocity + gradient
        return self._ascend(theta, self.velocity)


class Apgd(Pgd):
    """Auto-PGD (arXiv 2003.01690): starts with steps as wide as the budget and halves them, example by example, where the loss
    has stopped rising; then it goes on from the best theta so far, which is also its result.
    """

    keeps_best = True

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        super().__init__(threat, batch, config, draws)
        self.checkpoints = apgd_checkpoints(config.steps)
        self.step = 0
        self.since = 0  # the step of the last checkpoint
        self.started = False

    def _begin(self, theta: Tensor, loss_B: Tensor, gradient: Tensor) -> None:
        self.size_B = torch.full_like(loss_B, self.threat.span)
        self.before, self.loss_before_B = theta, loss_B
        self.best, self.best_loss_B, self.best_gradient = theta, loss_B, gradient
        self.best_at_checkpoint_B, self.halved_B = loss_B, torch.ones_like(loss_B, dtype=torch.bool)
        self.rises_B = torch.zeros_like(loss_B)
        self.started = True

    def _note(self, theta: Tensor, loss_B: Tensor, gradient: Tensor | None) -> None:
        """Keep what is the best so far, and count the steps that raised the loss."""
        self.rises_B = self.rises_B + (loss_B > self.loss_before_B)
        better = loss_B > self.best_loss_B
        self.best = torch.where(per_example(better, theta), theta, self.best)
        self.best_loss_B = torch.where(better, loss_B, self.best_loss_B)
        if gradient is not None:
            self.best_gradient = torch.where(per_example(better, theta), gradient, self.best_gradient)
        self.loss_before_B = loss_B

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """The next theta: a step with inertia, from the best theta where the step was halved."""
        loss_B, gradient = seen.loss_B, seen.gradient
        if not self.started:
            self._begin(theta, loss_B, gradient)
        else:
            self._note(theta, loss_B, gradient)
        if self.step in self.checkpoints:
            stalled = self.rises_B <= RISING * (self.step - self.since)
            unmoved = ~self.halved_B & (self.best_loss_B <= self.best_at_checkpoint_B)
            halve = stalled | unmoved
            self.size_B = torch.where(halve, self.size_B / 2, self.size_B)
            again = per_example(halve, theta)
            theta = torch.where(again, self.best, theta)
            gradient = torch.where(again, self.best_gradient, gradient)
            self.halved_B, self.best_at_checkpoint_B = halve, self.best_loss_B
            self.rises_B, self.since = torch.zeros_like(self.rises_B), self.step
        direction = self.threat.direction(self.batch, theta, gradient)
        target = self.threat.project(self.batch, theta + per_example(self.size_B, theta) * direction)
        share = INERTIA if self.step else 1.0
        moved = theta + share * (target - theta) + (1 - share) * (theta - self.before)
        self.before, self.step = theta, self.step + 1
        return self.threat.project(self.batch, moved)

    def last(self, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The best theta seen."""
        self._note(theta, loss(theta), None)
        return self.best


class SparseApgd(Apgd):
    """Auto-PGD in L1 (arXiv 2103.01208): how many coordinates a step moves follows how many the best theta has, and the step goes
    back to its full length where these have become fewer.
    """

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        super().__init__(threat, batch, config, draws)
        assert isinstance(threat, Ball)
        self.direction, self.interval = threat.sparse_direction, max(int(SPARSE_INTERVAL * config.steps), 1)

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """The next theta: from the best theta where the steps have become sparser."""
        loss_B, gradient = seen.loss_B, seen.gradient
        most, count = self.threat.limit, theta[0].numel()
        if not self.started:
            self._begin(theta, loss_B, gradient)
            self.size_B, self.sparse_B = torch.full_like(loss_B, most), torch.full_like(loss_B, SPARSE_FIRST)
            self.moved_B = torch.full_like(loss_B, count)
        else:
            self._note(theta, loss_B, gradient)
        if self.step and self.step % self.interval == 0:
            moved_B = (self.best != 0).flatten(1).sum(dim=1).to(loss_B)
            fewer = moved_B < FEWER * self.moved_B
            self.sparse_B, self.moved_B = moved_B / (SPARSER * count), moved_B
            self.size_B = torch.where(fewer, most, self.size_B / SPARSER).clamp_min(most / SHORTEST)
            theta = torch.where(per_example(fewer, theta), self.best, theta)
            gradient = torch.where(per_example(fewer, theta), self.best_gradient, gradient)
        self.step += 1
        direction = self.direction(self.batch, theta, gradient, self.sparse_B)
        return self.threat.project(self.batch, theta + per_example(self.size_B, theta) * direction)


def apgd(threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> Search:
    """Auto-PGD, as it is published for the norm of the threat."""
    if isinstance(threat, Ball) and threat.norm == "l1":
        return SparseApgd(threat, batch, config, draws)
    return Apgd(threat, batch, config, draws)


def apgd_checkpoints(steps: int) -> list[int]:
    """Steps after which the step's length is reconsidered: at 0.22 of all, then at intervals that shrink by 0.03 down to 0.06."""
    points, interval, at = [], max(int(0.22 * steps), 1), 0
    least, shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    while (at := at + interval) < steps:
        points.append(at)
        interval = max(interval - shrink, least)
    return points


class Lagrange(Pgd):
    """A Lagrangian relaxation of the budget (Fast-LPA of arXiv 2006.12655): raises loss - weight * max(0, distance - limit), the
    weight growing tenfold from WEIGHT / 10 on while the steps shrink tenfold, and goes back inside the budget at the end.

    Each step is as long, in the threat's distance, as its share of `step_size` (by default the whole limit) says. This is made
    for distances whose balls have no simple shape; in L-infinity, where one coordinate is the distance, pgd is stronger.
    """

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        super().__init__(threat, batch, config, draws)
        if not isinstance(threat, Measured):
            raise UserError(
                f"method {config.method} needs a threat whose steps have a length: perceptual, or one with a ball and no box"
            )
        self.measured, self.step, self.steps = threat, 0, config.steps
        self.step_size = threat.limit if config.step_size is None else config.step_size

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """A step along the Lagrangian's gradient, which may lead out of the budget."""
        done = self.step / self.steps
        self.step += 1
        _, outwards = self._beyond(theta)
        return self._climb(theta, seen.gradient - WEIGHT * 0.1 ** (1 - done) * outwards, done)

    def _beyond(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """How far theta is from where the search began to move, and the gradient of what of this exceeds the limit."""
        with torch.enable_grad():
            here = theta.detach().requires_grad_(True)
            distance_B = self.threat.distance(self.batch, here)
            (outwards,) = torch.autograd.grad((distance_B - self.threat.limit).clamp_min(0.0).sum(), here)
        return distance_B.detach(), outwards

    def _climb(self, theta: Tensor, uphill: Tensor, done: float) -> Tensor:
        """A step along `uphill`, as long as is due when a share `done` of the steps is."""
        uphill = uphill / per_example(uphill.flatten(1).norm(dim=1).clamp_min(1e-30), uphill)
        length = self.measured.length(self.batch, theta, uphill)
        step: Tensor = uphill * per_example(self.step_size * 0.1**done / (length + 1e-4), uphill)
        return theta + step

    def last(self, theta: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Back inside the budget."""
        return self.threat.project(self.batch, theta)


class Lpa(Lagrange):
    """The same in five rounds, a fifth of the steps each (LPA of arXiv 2006.12655): the weight is each example's own, begins at
    FIRST_WEIGHT and grows tenfold after every round that ends outside the budget. What is broken inside it is left alone.
    """

    def __init__(self, threat: Threat, batch: Batch, config: AttackConfig, draws: Draws | None) -> None:
        super().__init__(threat, batch, config, draws)
        self.weight_B = batch.x_BCHW.new_full((len(batch),), FIRST_WEIGHT)
        self.done_B = torch.zeros_like(batch.y_B, dtype=torch.bool)

    def next(self, theta: Tensor, seen: Query) -> Tensor:
        """A step, but of what is broken inside the budget."""
        number = LPA_ROUNDS * self.step // self.steps
        done = LPA_ROUNDS * self.step / self.steps - number
        self.step += 1
        distance_B, outwards = self._beyond(theta)
        self.done_B = self.done_B | seen.broken_B & (distance_B <= self.threat.limit)
        moved = self._climb(theta, seen.gradient - per_example(self.weight_B, outwards) * outwards, done)
        if LPA_ROUNDS * self.step // self.steps > number:
            self.weight_B = torch.where(distance_B >= self.threat.limit, 10 * self.weight_B, self.weight_B)
        return torch.where(per_example(self.done_B, theta), theta, moved)


STRAYS = ("lagrange", "lpa")  # methods that look outside of the budget on their way
SEARCHES: dict[str, Callable[[Threat, Batch, AttackConfig, Draws | None], Search]] = {
    "pgd": Pgd,
    "momentum": Momentum,
    "apgd": apgd,
    "lagrange": Lagrange,
    "lpa": Lpa,
    "square": black_box.Square,
    "random": black_box.Random,
}
