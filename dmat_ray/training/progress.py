"""How far a training has come, and the means of an epoch's metrics so far: what a checkpoint holds beside the network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmat_ray.data.epochs import NOTHING, Done
from dmat_ray.types import RunContext


@dataclass
class Sums:
    """Losses and accuracies of an epoch so far, on the device, and the first step where one was not finite."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    bad: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """A step's. Nothing waits for the device."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
            if name.endswith("loss"):
                now = torch.where(torch.isfinite(value), -1, step)
                self.bad[name] = torch.where(self.bad[name] < 0, now, self.bad[name]) if name in self.bad else now

    def agree(self, context: RunContext) -> None:
        """Give every worker the mean over workers, which is what a checkpoint holds; later means are as without it."""
        # copies: a first step's value may be shared with what the step keeps
        self.sums = {name: value.clone() for name, value in self.sums.items()}
        context.average_([self.sums[name] for name in sorted(self.sums)])

    def means(self, context: RunContext) -> dict[str, float]:
        """Each metric's mean over its steps and all workers."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] / self.counts[name] for name in names])
        context.average_([values])
        return {f"train_{name}": value for name, value in zip(names, values.tolist(), strict=True)}

    def first_bad(self) -> tuple[int | None, str]:
        """The first step with a loss that is not finite, counted from 0, and the term; None and "" if there is none."""
        found = [(int(step), name) for name, step in self.bad.items() if int(step) >= 0]
        # the whole loss is named only if no term alone is to blame
        return min(found, key=lambda f: (f[0], f[1] == "loss")) if found else (None, "")


@dataclass
class Progress:
    """Where a training is: whole epochs, what is done of the next, and the best so far."""

    epoch: int = 0
    done: Done = NOTHING
    sums: Sums = field(default_factory=Sums)
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None  # metrics, and the state of the network that had them
    finished: bool = False

    def state(self) -> dict[str, Any]:
        """For a checkpoint; the history and the best metrics are in its run.json."""
        best = None if self.best is None else self.best["network"]
        return {"done": self.done.state(), "sums": self.sums.sums, "counts": self.sums.counts, "best": best}

    @classmethod
    def of(cls, run: dict[str, Any], state: dict[str, Any], device: torch.device) -> "Progress":
        """What a checkpoint tells."""
        sums = Sums({k: v.to(device) for k, v in state["sums"].items()}, state["counts"])
        best = None if state["best"] is None else {"metrics": run["best"], "network": state["best"]}
        return cls(run["epoch"], Done(**state["done"]), sums, run["history"], best, run["finished"])
