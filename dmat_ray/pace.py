"""When to look up from a training loop: what workers have to agree on, they ask each other every other second, not every step."""

import time

import torch

from dmat_ray.types import RunContext

LOOK_S = 2.0
TELL_AFTER_S, LEAST_STEPS = 20.0, 3  # after the first step of a process: when to say how long its first report will take


class Pace:
    """Called after every step; says whether all workers should now write a checkpoint within the epoch."""

    def __init__(self, context: RunContext, minutes: float | None) -> None:
        self._context = context
        self._limit_s = float("inf") if minutes is None else 60 * minutes
        self._saved = self._looked = time.monotonic()
        self._since, self._pause = 0, 1

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()

    def looks(self) -> bool:
        """True if it is time to look; the same on all workers."""
        self._since += 1
        return self._since >= self._pause

    def wants_checkpoint(self) -> tuple[bool, bool]:
        """Whether a checkpoint is due, and whether it is because a machine will go; the same on all workers."""
        now = time.monotonic()
        due = float(self._context.rank == 0 and now - self._saved >= self._limit_s)
        told = torch.tensor([due, (now - self._looked) / self._since], device=self._context.device)
        self._context.average_([told])
        due, step_s = told.tolist()
        self._pause = max(1, round(LOOK_S / max(step_s, 1e-4)))
        self._looked, self._since = now, 0
        leaving = self._context.preempted()
        return due > 0 or leaving, leaving
