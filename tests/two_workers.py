"""What torchrun starts in test_local.py: one training with two workers; each writes down what it ends with."""

import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dmat_ray import local_stages
from dmat_ray.config import Config
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.networks import classifiers
from dmat_ray.storage import Location, Place
from dmat_ray.training import trained_models
from dmat_ray.training.step import TrainingStep
from dmat_ray.training.trainer import train
from dmat_ray.types import Batch


class RecordingContext(LocalContext):
    """Keeps the network that the loop wraps, and the metrics of every worker."""

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        self.network, self.reports = module, []
        self.first_weights = {key: value.clone() for key, value in module.state_dict().items()}
        return super().wrap(module)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        self.reports.append(dict(metrics))
        super().report(metrics, checkpoint, wait=wait)


def one_step(config: Config, data: ManifoldSet, context: LocalContext) -> dict[str, torch.Tensor]:
    """Weights after one step in float64 with frozen statistics, each worker with its part of a batch of eight."""
    generator = generators.load_generator(config.generator.path).double()
    torch.manual_seed(7)
    network = classifiers.build(config.classifier, 1, 3).double().train()
    frozen = config.model_copy(update={"objective": config.objective.model_copy(update={"batch_norm": "frozen"})})
    step = TrainingStep(frozen, network, generator, context)
    batch = data.batch(np.arange(8)[context.rank :: context.world_size], "on_manifold")
    assert batch.w_BLD is not None
    step(Batch(batch.id, batch.x_BCHW.double(), batch.y_B, batch.w_BLD.double()), 0, 0, 0.1)
    return network.state_dict()


def is_there_after_a_slow_publication(folder: Path, set_folder: Path, config: Config) -> bool:
    """Whether the model is, once `train` has returned; the first worker alone publishes it."""
    publish = trained_models.publish

    def slow(source: Place, target: Location) -> None:
        time.sleep(2)
        publish(source, target)

    trained_models.publish = slow
    places = {"output": str(folder / "out"), "manifold_set": str(set_folder), "name": "tiny"}
    return (local_stages.train(config.model_copy(update=places)) / "run.json").is_file()


def main() -> None:
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    folder, set_folder = Path(sys.argv[1]), Path(sys.argv[2])
    config = Config.model_validate(json.loads((folder / "config.json").read_text()))
    generator = generators.load_generator(config.generator.path)
    context = RecordingContext(folder)
    train(config, open_set(set_folder, "train"), generator, generators.fingerprint(config.generator.path), context)
    step_weights = one_step(config, open_set(set_folder, "train"), LocalContext(folder))
    rank = float(context.rank)
    averaged = [torch.tensor([rank, 2 * rank]), torch.tensor([[2 + rank]]), torch.tensor(rank, dtype=torch.float64)]
    context.average_(averaged)
    found = {
        "first_weights": context.first_weights,
        "weights": context.network.state_dict(),
        "reports": context.reports,
        "averaged": averaged,
        "step_weights": step_weights,
        "world_size": context.world_size,
        "model_was_there": is_there_after_a_slow_publication(folder, set_folder, config),
    }
    torch.save(found, folder / f"rank{context.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
