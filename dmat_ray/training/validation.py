"""Clean and robust accuracy on held-out training examples, after every epoch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AdversarialTerm, Config
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.devices import tf32
from dmat_ray.types import Batch, Generator, RunContext


@dataclass(frozen=True)
class Validator:
    """Accuracy on held-out training examples: clean, under each space's attack, and standing under all of them.

    `data` is this worker's part of them; accuracies are of all.
    """

    config: Config
    data: ManifoldSet
    generator: Generator

    @tf32(False)
    def __call__(self, network: nn.Module, context: RunContext) -> dict[str, float]:
        attacks, seed = terms(self.config), self.config.training.seed
        mine = np.arange(len(self.data))
        names = ["clean", *attacks, "robust"]
        right = torch.zeros(len(names) + 1, device=context.device)
        network.eval()  # as it will be used, and so that its batch-norm statistics stay those of the training
        # as many as a training step has here, which is known to fit
        size = max(1, self.config.training.batch_size // context.world_size // self.config.training.accumulate)
        for start in range(0, len(mine), size):
            batch = self.data.batch(mine[start : start + size], self.config.training.images).to(context.device)
            with torch.no_grad():
                rows = [_correct(network, batch.x_BCHW, batch)]
            for name, term in attacks.items():
                found = attack(network, threats.build(term, self.generator), batch, term, seed=seed, purpose=f"validation/{name}")
                with torch.no_grad():
                    rows.append(_correct(network, found.x_BCHW, batch))
            rows.append(torch.stack(rows).all(dim=0))
            counts = torch.stack([row.sum() for row in rows])
            right += torch.cat([counts, counts.new_tensor([len(batch)])])
        context.average_([right])
        return {f"val_{name}": float(right[i] / right[-1]) for i, name in enumerate(names)}


def terms(config: Config) -> dict[str, AdversarialTerm]:
    """The attacks on held-out examples, by name: those of both spaces, whatever their weight, and those that are trained on."""
    found: dict[str, AdversarialTerm] = {"image": config.objective.image}
    if config.training.images == "on_manifold":
        found["latent"] = config.objective.latent
    return found | {name: term for name, term in config.objective.adversarial.items() if term.weight > 0}


def _correct(network: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    correct: Tensor = network(x).argmax(dim=1) == batch.y_B
    return correct
