"""What trials of a search are judged by: the columns of a suite on held-out training examples, whatever a trial trains on.

A budget that is searched over must not be the one that accuracy is measured at: the smallest would win.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dmat_ray.config import EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.evaluation.evaluation import SCHEMA, Evaluator, evaluate_here
from dmat_ray.evaluation.metrics import Results
from dmat_ray.types import Generator, RunContext

PREFIX = "yardstick."  # of its columns among an epoch's metrics


def columns(config: EvaluationConfig) -> list[str]:
    """The columns of the suite."""
    return Results(SCHEMA.empty_table(), config).columns(config.sets[0])


@dataclass(frozen=True)
class Yardstick:
    """A suite on held-out examples of one test set; `data` is this worker's part. Every column is a mean over examples."""

    config: EvaluationConfig
    data: ManifoldSet
    generator: Generator

    def __call__(self, network: nn.Module, context: RunContext) -> dict[str, float]:
        """PREFIX + column -> accuracy in [0, 1], over all workers. Leaves the network in eval mode."""
        count, names = len(self.data), columns(self.config)
        found = [0.0] * len(names)
        if count:
            # a new one each time: what it keeps of a network are its weights of that time
            evaluator = Evaluator(self.config, self.data, self.generator, lambda _: network, ["trial"], context.device)
            results = Results(evaluate_here(evaluator, np.arange(count)), self.config)
            found = [results.accuracy("trial", self.config.sets[0], name).value for name in names]
        sums = torch.tensor([*(value * count for value in found), count], dtype=torch.float64, device=context.device)
        context.average_([sums])
        return {f"{PREFIX}{name}": float(total / sums[-1]) for name, total in zip(names, sums, strict=False)}
