"""Evaluation on a Ray Data actor pool: chunks of test examples out, rows back."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from dmat_ray import checkpoint, evaluation
from dmat_ray.cluster.session import device_of_actor
from dmat_ray.config import Config
from dmat_ray.data import manifold_set, set_reader
from dmat_ray.files import read_json, sha256, write_json
from dmat_ray.manifold import generators
from dmat_ray.storage import Location

ROWS, DONE = "rows.parquet", "evaluation.json"


class ChunkEvaluator:
    """An actor: attacks one model on one chunk of a test set. Models and the set are read once, from their folders."""

    def __init__(self, config: dict[str, Any], set_path: str, models: dict[str, str]) -> None:
        self.config, self.models = Config.model_validate(config), models
        self.device = device_of_actor()
        torch.set_num_threads(self.config.cluster.threads_per_worker)
        self.data = manifold_set.open_set(set_path, "test")
        self.generator = generators.load_configured(self.config.generator, self.device)
        self.loaded: dict[str, torch.nn.Module] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        tables = []
        for text in batch["chunk"]:
            chunk = evaluation.Chunk(**json.loads(text))
            if chunk.model not in self.loaded:
                self.loaded[chunk.model], _ = checkpoint.load_classifier(Path(self.models[chunk.model]), self.device)
            network = self.loaded[chunk.model]
            tables.append(
                evaluation.evaluate_chunk(network, self.generator, self.data, chunk, self.config.evaluation, self.device)
            )
        return pa.concat_tables(tables)


def fingerprint(config: Config, set_path: Location, models: dict[str, Path]) -> dict[str, Any]:
    """What the rows depend on."""
    return {
        "evaluation": config.evaluation.model_dump(mode="json"),
        "generator_precision": config.generator.precision,
        "set": set_reader.digest(set_reader.read_manifest(set_path)),
        "models": {name: sha256(path / checkpoint.MODEL) for name, path in models.items()},
    }


def is_evaluated(config: Config, set_path: Location, models: dict[str, Path], folder: Path) -> bool:
    """True if `folder` holds the rows of exactly this."""
    path = folder / DONE
    return path.is_file() and read_json(path) == fingerprint(config, set_path, models)


def read_rows(folder: Path) -> pa.Table:
    """The rows of a finished evaluation."""
    return pq.read_table(folder / ROWS)


def check(config: Config, set_path: Location, models: dict[str, Path]) -> None:
    """Raise UserError for a set, generator or model that is missing or does not fit the others. Needs no Ray."""
    data = manifold_set.open_set(set_path, "test")
    sha = generators.fingerprint(config.generator.path)
    set_reader.require_generator(data.manifest, sha, f"the set '{set_path}'")
    for name, path in models.items():
        _, run = checkpoint.load_classifier(path)
        evaluation.require_fit(run, data, name)


def evaluate(config: Config, set_path: Location, models: dict[str, Path], folder: Path, say: Callable[[str], None]) -> pa.Table:
    """Rows of every model, test set and attack, after `check`; also written to `folder`. Ray must be connected."""
    size = set_reader.read_manifest(set_path)["usable"]["test"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    work = evaluation.chunks(list(models), config.evaluation, size)
    actors = min(config.cluster.evaluation_actors, len(work))
    say(f"starting {actors} actors for {len(work)} chunks")
    items = ray.data.from_items([{"chunk": json.dumps(vars(c))} for c in work], override_num_blocks=len(work))
    results = items.map_batches(
        ChunkEvaluator,
        fn_constructor_kwargs={
            "config": config.to_json(),
            "set_path": str(set_path),
            "models": {k: str(v) for k, v in models.items()},
        },
        batch_size=1,
        num_cpus=config.cluster.threads_per_worker,
        num_gpus=config.cluster.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors, initial_size=actors),
    )
    tables, began = [], time.monotonic()
    for table in results.iter_batches(batch_format="pyarrow", batch_size=None):
        tables.append(table.cast(evaluation.SCHEMA))
        say(f"evaluated {len(tables)}/{len(work)} chunks, {time.monotonic() - began:.0f} s")
    rows = pa.concat_tables(tables).sort_by(evaluation.SORT)
    found = set(zip(rows["model"].to_pylist(), rows["set"].to_pylist(), strict=True))
    assert len(found) == len(models) * len(config.evaluation.sets), "rows of a model or test set are missing"
    partial = folder / f".{ROWS}.partial"
    pq.write_table(rows, partial, compression="zstd")
    partial.replace(folder / ROWS)
    write_json(folder / DONE, fingerprint(config, set_path, models))
    return rows
