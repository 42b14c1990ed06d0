"""An evaluation from the driver's side, with an actor of this process in place of Ray's."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmat_ray.cluster import evaluate as stage
from dmat_ray.cluster import gauges, jobs, session, tracking
from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.data import manifold_set
from dmat_ray.errors import UserError
from dmat_ray.evaluation import probes
from dmat_ray.evaluation.units import Unit
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.storage import at, set_folder

pytestmark = pytest.mark.slow
ATTACKS = [{"threat": "clean", "name": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 2}]


@pytest.fixture
def models(tmp_path: Path, make_set: Callable[..., Path]) -> dict[str, Path]:
    """Two of no training, in the output folder of a set."""
    classes = json.loads((make_set() / "manifest.json").read_text())["class_names"]
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = Config(name=name, classifier=ClassifierConfig(name="digits_cnn"))
        network = classifiers.build(config.classifier, 1, len(classes))
        network(torch.rand(8, 1, 8, 8))
        run = checkpoint.describe_run(config, classes, 1, 8, None, None)
        checkpoint.save(tmp_path / "models" / name, network, {**run, "finished": True, "history": []})
    return {name: tmp_path / "models" / name for name in "ab"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the driver has read all weights of a model, and the list of a split's images."""
    read: Counter[str] = Counter()
    digest, usable = checkpoint.digest, manifold_set.usable
    monkeypatch.setattr(checkpoint, "digest", lambda place: read.update([Path(str(place)).name]) or digest(place))
    monkeypatch.setattr(manifold_set, "usable", lambda place, split: read.update([split]) or usable(place, split))

    def run_all(work: stage.Work, todo: Sequence[Unit], what: str, say: Callable[[str], None]) -> None:
        before = dict(read)
        names = {name: str(place) for name, place in work.models.items()}
        actor = stage.UnitEvaluator(work.config.to_json(), str(work.set_path), names, str(work.files), work.facts)
        for unit in todo:
            actor({"name": np.array([work.name(unit)]), "unit": np.array([unit.to_json()])})
        read.clear()
        read.update(before)

    tracked = SimpleNamespace(metrics=lambda *_, **__: None, artifact=lambda *_: None)
    monkeypatch.setattr(stage, "_run_all", run_all)
    monkeypatch.setattr(session, "device_of_actor", lambda: torch.device("cpu"))
    monkeypatch.setattr(gauges, "tested", lambda *_: None)
    monkeypatch.setattr(tracking, "tracked", lambda *_, **__: contextlib.nullcontext(tracked))
    monkeypatch.setattr(jobs, "connected", lambda *_: contextlib.nullcontext())
    return read


def test_test_images_are_listed_and_weights_read_no_more_often_than_it_takes(
    make_config: Callable[..., Config], models: dict[str, Path], read: Counter[str], tmp_path: Path
) -> None:
    """At the start, and weights at the end once more: a model that was replaced meanwhile must not have its rows."""
    config = make_config(output=str(tmp_path), evaluation={"attacks": ATTACKS, "check_examples": 4})
    lines: list[str] = []

    def evaluated() -> dict[str, int]:
        read.clear()
        jobs.evaluate(config, models, lines.append)
        return {name: read[name] for name in ("a", "b", "test")}

    assert evaluated() == {"a": 2, "b": 2, "test": 1}
    assert evaluated() == {"a": 1, "b": 1, "test": 0}
    assert lines[-1] == "the rows and the report are there and unchanged, nothing to do"
    (tmp_path / "report.html").unlink()
    assert evaluated() == {"a": 1, "b": 1, "test": 1}, "for the page"


def test_no_rows_of_another_model_are_written_under_ones_name(
    make_config: Callable[..., Config], models: dict[str, Path], read: Counter[str], tmp_path: Path
) -> None:
    """Which would be taken for its own for ever, were it to come back."""
    config = make_config(output=str(tmp_path), evaluation={"attacks": ATTACKS, "check_examples": 4})
    work = stage.Work(config, at(set_folder(config)), models, at(tmp_path / "evaluation"))
    of_a, weights = probes.units(["a"], config.evaluation, work.positions), models["a"] / "model.safetensors"
    mine = weights.read_bytes()
    weights.write_bytes((models["b"] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model 'a' is another on .* than when the evaluation began"):
        stage._run_all(work, of_a, "", print)
    assert work.left(of_a) == list(of_a)
    weights.write_bytes(mine)
    stage._run_all(work, of_a, "", print)
    assert work.left(of_a) == []
