"""Evaluation: attacks on trained models, one row per (model, test set, attack, example).

Everything else (tables, intervals, worst cases) derives from rows. A row's numbers depend on the example, the model
and the seed, never on how examples were shared out among actors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import ON_MANIFOLD, CleanRow, EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.errors import UserError
from dmat_ray.types import Batch, Generator

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("set", pa.string()),
        ("attack", pa.string()),
        ("id", pa.string()),
        ("label", pa.int64()),
        ("clean_prediction", pa.int64()),
        ("prediction", pa.int64()),
        ("correct", pa.bool_()),
        ("loss", pa.float32()),
        ("margin", pa.float32()),
        ("distance", pa.float32()),
        ("linf", pa.float32()),
        ("l2", pa.float32()),
        ("seed", pa.int64()),
    ]
)
SORT = [("model", "ascending"), ("set", "ascending"), ("attack", "ascending"), ("id", "ascending")]


@dataclass(frozen=True)
class Chunk:
    """A unit of work: examples `start` to `stop` of one test set, for one model."""

    model: str
    set: str
    start: int
    stop: int


def chunks(models: list[str], config: EvaluationConfig, size: int) -> list[Chunk]:
    """All units of an evaluation of `size` test examples; they depend on the settings, not on the cluster."""
    starts = range(0, size, config.batch_size)
    return [
        Chunk(model, name, start, min(start + config.batch_size, size))
        for model in models
        for name in config.sets
        for start in starts
    ]


def rows_of(
    network: nn.Module, generator: Generator, batch: Batch, config: EvaluationConfig, model: str, set_name: str
) -> Iterator[tuple[pa.Table, torch.Tensor]]:
    """For each attack of the suite that applies to this test set: its rows, and the attacked images.

    Latent attacks need w and are left out on natural images. Raises UserError if the network's output is not finite.
    """
    with torch.no_grad():
        clean_logits = network(batch.x_BCHW)
    if not bool(torch.isfinite(clean_logits).all()):
        raise UserError(f"model '{model}' puts out values that are not finite")
    for row in config.attacks:
        if isinstance(row, ON_MANIFOLD) and batch.w_BLD is None:
            continue
        distance = torch.zeros(len(batch), device=batch.x_BCHW.device)
        x, logits = batch.x_BCHW, clean_logits
        if not isinstance(row, CleanRow):
            threat = threats.build(row, generator)
            found = attack(network, threat, batch, row, seed=config.seed, purpose=f"evaluation/{set_name}/{row.name}")
            x, distance = found.x_BCHW, threat.distance(batch, found.theta)
            with torch.no_grad():
                logits = network(x)
        yield _table(model, set_name, row.name, batch, clean_logits, logits, x, distance, config.seed), x


def _table(
    model: str,
    set_name: str,
    attack_name: str,
    batch: Batch,
    clean_logits: torch.Tensor,
    logits: torch.Tensor,
    x: torch.Tensor,
    distance: torch.Tensor,
    seed: int,
) -> pa.Table:
    n = len(batch)
    prediction = logits.argmax(dim=1)
    loss = nn.functional.cross_entropy(logits, batch.y_B, reduction="none")
    own = logits.gather(1, batch.y_B[:, None]).squeeze(1)
    others = logits.scatter(1, batch.y_B[:, None], -torch.inf).amax(dim=1)
    moved = (x - batch.x_BCHW).flatten(1)
    columns: dict[str, Any] = {
        "model": [model] * n,
        "set": [set_name] * n,
        "attack": [attack_name] * n,
        "id": list(batch.id),
        "label": batch.y_B,
        "clean_prediction": clean_logits.argmax(dim=1),
        "prediction": prediction,
        "correct": prediction == batch.y_B,
        "loss": loss,
        "margin": own - others,
        "distance": distance,
        "linf": moved.abs().amax(dim=1),
        "l2": moved.norm(dim=1),
        "seed": [seed] * n,
    }
    arrays = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in columns.items()}
    return pa.table(arrays, schema=SCHEMA)


def require_fit(run: dict[str, Any], data: ManifoldSet, model: str) -> None:
    """Raise UserError unless a model's classes and image shape are those of the set."""
    shape = list(data.natural.shape[1:])
    if run["class_names"] != list(data.class_names):
        raise UserError(
            f"model '{model}' knows the classes {', '.join(run['class_names'])}, the set has {', '.join(data.class_names)}"
        )
    if [run["channels"], run["resolution"], run["resolution"]] != shape:
        raise UserError(
            f"model '{model}' takes {run['channels']}x{run['resolution']}x{run['resolution']} images, the set has {shape}"
        )


def evaluate_chunk(
    network: nn.Module, generator: Generator, data: ManifoldSet, chunk: Chunk, config: EvaluationConfig, device: torch.device
) -> pa.Table:
    """All rows of one chunk."""
    batch = data.batch(np.arange(chunk.start, chunk.stop), chunk.set).to(device)
    tables = [table for table, _ in rows_of(network, generator, batch, config, chunk.model, chunk.set)]
    return pa.concat_tables(tables)
