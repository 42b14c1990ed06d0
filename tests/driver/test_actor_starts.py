"""Actors of Ray Data whose store is away while they start, without Ray."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmat_ray.cluster import evaluate, pools, predict, session, shard_projector
from dmat_ray.config import Config
from dmat_ray.data.set_reader import digest, read_manifest
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import files

pytestmark = pytest.mark.slow  # imports Ray


@pytest.fixture
def starts(make_config, set_folder, tmp_path, monkeypatch):
    """By stage: where its actor asks its storage last, and how the actor is made."""
    config: Config = make_config()
    facts = {"models": {}, "set": digest(read_manifest(set_folder))}
    monkeypatch.setattr(session, "device_of_actor", lambda: torch.device("cpu"))
    monkeypatch.setattr(shard_projector, "device_of_actor", lambda: torch.device("cpu"))
    return {
        "project": (shard_projector.set_maker, "build_projector", lambda: shard_projector.ShardProjector(config.to_json(), [])),
        "predict": (predict.checkpoint, "load_classifier", lambda: predict.Predictor(1, "model")),
        "evaluate": (
            evaluate.manifold_set,
            "open_set",
            lambda: evaluate.UnitEvaluator(config.to_json(), str(set_folder), {}, str(tmp_path), facts),
        ),
    }


@pytest.mark.parametrize("stage", ["project", "predict", "evaluate"])
@pytest.mark.parametrize(
    ("fails", "error", "asked"),
    [(0, None, 1), (2, None, 3), (9, StorageError, 3), (9, UserError, 1)],
    ids=["there", "away for a minute", "away for good", "what only the user can mend"],
)
def test_an_actor_starts_though_its_store_is_away_for_a_minute(starts, monkeypatch, stage, fails, error, asked):
    """Ray Data ends a stage of which a few actors in a row have failed to start."""
    room, name, start = starts[stage]
    calls, slept = [], []

    def ask(*_, **__):
        calls.append(1)
        if len(calls) <= fails:
            raise (error or StorageError)("'s3://bucket/set' cannot be read")
        return SimpleNamespace(id=np.array([])), {}

    monkeypatch.setattr(room, name, ask)
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_: None)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    if error is None:
        start()
    else:
        with pytest.raises(error, match="cannot be read"):
            start()
    assert len(calls) == asked
    assert slept == list(pools.START_PAUSES_S[: asked - 1])
