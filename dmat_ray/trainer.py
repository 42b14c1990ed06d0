"""The training loop, once, for laptop and cluster: it knows its `RunContext` and no more about where it runs."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmat_ray import checkpoint, classifiers, objectives, threats
from dmat_ray.attack import attack
from dmat_ray.config import AdversarialTerm, Config, TrainingConfig
from dmat_ray.data.epochs import EpochSource, InMemory
from dmat_ray.data.manifold_set import ManifoldSet, steps_per_epoch
from dmat_ray.data.set_reader import digest, require_generator
from dmat_ray.errors import UserError
from dmat_ray.rng import derive
from dmat_ray.types import Batch, Generator, RunContext


def learning_rate(config: TrainingConfig, epoch: float) -> float:
    """Piecewise linear through the knots; constant before the first and after the last. `epoch` counts fractions."""
    return float(np.interp(epoch, config.lr_epochs, config.lr_values))


def check_inputs(config: Config, manifest: dict[str, Any], generator_sha256: str, world_size: int) -> None:
    """Raise UserError for a combination of settings and set that cannot be trained."""
    require_generator(manifest, generator_sha256, "the on-manifold set")
    if config.training.images == "natural" and (terms := objectives.on_manifold_terms(config.objective)):
        raise UserError(f"objective.{terms[0]} needs training.images on_manifold: natural images have no exact w")
    if config.training.batch_size < world_size:
        raise UserError(f"training.batch_size {config.training.batch_size} is smaller than the {world_size} workers")
    if len(manifest["class_names"]) < 2:
        raise UserError("the on-manifold set has one class only")


@dataclass(frozen=True)
class _Validator:
    """Accuracy on held-out training examples: clean, under each space's attack, and standing under all of them."""

    config: Config
    data: ManifoldSet
    generator: Generator

    def __call__(self, network: nn.Module, context: RunContext) -> dict[str, float]:
        objective, seed = self.config.objective, self.config.training.seed
        terms: dict[str, AdversarialTerm] = {"image": objective.image}
        if self.config.training.images == "on_manifold":
            terms["latent"] = objective.latent
        terms |= {name: term for name, term in objective.adversarial.items() if term.weight > 0}
        mine = np.arange(len(self.data))[context.rank :: context.world_size]
        names = ["clean", *terms, "robust"]
        right = torch.zeros(len(names) + 1, device=context.device)
        network.eval()  # as it will be used, and so that its batch-norm statistics stay those of the training
        for start in range(0, len(mine), 100):
            batch = self.data.batch(mine[start : start + 100], self.config.training.images).to(context.device)
            with torch.no_grad():
                rows = [_correct(network, batch.x_BCHW, batch)]
            for name, term in terms.items():
                found = attack(network, threats.build(term, self.generator), batch, term, seed=seed, purpose=f"validation/{name}")
                with torch.no_grad():
                    rows.append(_correct(network, found.x_BCHW, batch))
            rows.append(torch.stack(rows).all(dim=0))
            counts = torch.stack([row.sum() for row in rows])
            right += torch.cat([counts, counts.new_tensor([len(batch)])])
        context.average_([right])
        return {f"val_{name}": float(right[i] / right[-1]) for i, name in enumerate(names)}


def _correct(network: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    correct: Tensor = network(x).argmax(dim=1) == batch.y_B
    return correct


def train(
    config: Config, data: ManifoldSet | EpochSource, generator: Generator, generator_sha256: str, context: RunContext
) -> dict[str, float]:
    """Train a classifier on the training split `data`, in memory or streamed, and return the last epoch's metrics.

    After every epoch metrics go to `context.report`, with a checkpoint every `checkpoint_every` epochs and at the end.
    Goes on from `context.latest_checkpoint()`; raises UserError if that was trained with other settings.
    """
    settings, device = config.training, context.device
    source: EpochSource = InMemory(data, settings) if isinstance(data, ManifoldSet) else data
    manifest, set_sha256 = source.manifest, digest(source.manifest)
    check_inputs(config, manifest, generator_sha256, context.world_size)
    torch.manual_seed(derive(settings.seed, "weights") % 2**31)
    channels, resolution, _ = manifest["shapes"]["on_manifold"]
    class_names = tuple(manifest["class_names"])
    network = classifiers.build(config.classifier, channels, len(class_names)).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.lr_values[0], momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    run = checkpoint.describe_run(config, class_names, channels, resolution, generator_sha256, set_sha256)
    first_epoch: int = 0
    history: list[dict[str, float]] = []
    if (found := context.latest_checkpoint()) is not None:
        old = checkpoint.read_run(found)
        checkpoint.require_same_config(old["config"], config, found)
        if old["set_sha256"] != set_sha256:
            raise UserError(f"'{found}' was trained on another on-manifold set; train under another --name")
        checkpoint.load_weights(found, network)
        state = checkpoint.load_state(found)
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, history = state["epoch"], old["history"]
    objective = objectives.build(config.objective, generator)
    trained = context.wrap(network)
    held_out = source.held_out
    validate = None if held_out is None else _Validator(config, held_out, generator)
    steps = steps_per_epoch(source.size, settings.batch_size)

    for epoch in range(first_epoch, settings.epochs):
        began = time.monotonic()
        network.train()
        sums: dict[str, Tensor] = {}
        for step, cpu_batch in enumerate(source.batches(epoch, context.rank, context.world_size)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, epoch + step / steps)
            batch = cpu_batch.to(device)
            loss, terms = objective(network, trained, batch, seed=settings.seed, purpose=f"train/{epoch}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums[name] + value if name in sums else value
        metrics = _reduced(sums, steps, context)
        if not np.isfinite(metrics["train_loss"]):
            raise UserError(f"the loss is {metrics['train_loss']} in epoch {epoch + 1}; lower training.lr_values")
        metrics["epoch"], metrics["lr"] = epoch + 1.0, learning_rate(settings, epoch + 1)
        # every worker has its own batch-norm statistics; what is validated and saved has their mean
        context.average_([b for b in network.buffers() if b.is_floating_point()])
        if validate is not None:
            metrics |= validate(network, context)
        metrics["examples_per_second"] = source.size / (time.monotonic() - began)
        history.append(metrics)
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % settings.checkpoint_every == 0:
            _report_checkpoint(context, network, {**run, "epoch": epoch + 1, "metrics": metrics, "history": history}, optimizer)
        else:
            context.report(metrics)
    return history[-1]


def _reduced(sums: dict[str, Tensor], steps: int, context: RunContext) -> dict[str, float]:
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names]) / steps
    context.average_([values])
    return {f"train_{name}": value for name, value in zip(names, values.tolist(), strict=True)}


def _report_checkpoint(context: RunContext, network: nn.Module, run: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    if context.rank != 0:
        context.report(run["metrics"])
        return
    with tempfile.TemporaryDirectory(prefix="dmat_ray_") as folder:
        checkpoint.save(Path(folder), network, run, {"optimizer": optimizer.state_dict(), "epoch": run["epoch"]})
        context.report(run["metrics"], Path(folder))
