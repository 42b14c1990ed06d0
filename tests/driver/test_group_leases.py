"""Which trainings may be at work at the same time, and what they find of earlier ones. Ray's part is left out."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmat_ray.cluster import train
from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.training import trained_models, trainer

pytestmark = pytest.mark.slow  # imports Ray


@pytest.fixture
def configs(make_config, set_folder, tmp_path) -> list[Config]:
    """Two models of one output."""
    place = {"output": str(tmp_path / "runs"), "manifold_set": str(set_folder)}
    return [make_config(name=name, **place) for name in ("at", "dmat")]


@pytest.fixture
def whole(configs, tmp_path) -> Callable[[Config], Path]:
    """whole(config) is the last checkpoint of a training, which was done in this process."""

    def make(config: Config) -> Path:
        if not (folder := tmp_path / "whole" / config.name).is_dir():
            folder.mkdir(parents=True)
            data, sha = open_set(config.manifold_set, "train"), generators.fingerprint(config.generator.path)
            trainer.train(config, data, generators.load_configured(config.generator, "cpu"), sha, LocalContext(folder))
        return folder / "checkpoint"

    return make


class Workers:
    """In the place of Ray Train: leaves the last checkpoint of each model, and does something else meanwhile."""

    def __init__(self, whole: Callable[[Config], Path]) -> None:
        self.whole, self.given, self.meanwhile = whole, [], []

    def fit(self, worker, settings, cluster, folder, say, **_):
        self.given.append(settings)
        if self.meanwhile:
            self.meanwhile.pop()()
        for number, values in enumerate(settings["configs"]):
            shutil.copytree(self.whole(Config.model_validate(values)), folder.local / f"checkpoint_2026-01-02_00-00-0{number}")


@pytest.fixture
def workers(whole, monkeypatch) -> Workers:
    made = Workers(whole)
    run = SimpleNamespace(metrics=lambda values, step: None, artifact=lambda *_: None)
    monkeypatch.setattr(train, "listen", lambda *_: contextlib.nullcontext("mailbox"))
    monkeypatch.setattr(train.tracking, "tracked", lambda *_, **__: contextlib.nullcontext(run))
    monkeypatch.setattr(train.session, "await_machines", lambda *_, **__: None)
    monkeypatch.setattr(train.workers, "fit", made.fit)
    return made


def interrupted(configs: list[Config], whole: Callable[[Config], Path]) -> Path:
    """The folder of a group that was killed after each of its models' first epoch."""
    group = train.training_folder(configs).local
    for number, config in enumerate(configs):
        place = group / f"checkpoint_2026-01-01_00-00-0{number}"
        shutil.copytree(whole(config), place)
        run = json.loads((place / "run.json").read_text())
        (place / "run.json").write_text(json.dumps({**run, "epoch": 1, "history": run["history"][:1], "finished": False}))
    return group


def test_two_jobs_finish_what_a_group_has_left_each_from_its_checkpoint(configs, whole, workers):
    """At the same time; the group's folder goes with the last of them."""
    at, dmat = configs
    group = interrupted(configs, whole)
    told: list[str] = []
    workers.meanwhile = [lambda: train.train_models([dmat], told.append)]
    train.train_models([at], told.append)
    left = [settings["left"] for settings in workers.given]
    assert left == [{"at": [f"{group}/checkpoint_2026-01-01_00-00-00"]}, {"dmat": [f"{group}/checkpoint_2026-01-01_00-00-01"]}]
    assert all(map(trained_models.is_trained, configs))
    assert list(group.parent.iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [([0], [0]), ([0], [0, 1]), ([0, 1], [1]), ([0, 1], [1, 0])])
def test_a_model_that_another_job_trains_is_not_trained_twice(configs, whole, workers, first, second):
    """Alone or beside others, in any order; afterwards it is there, and the rest is trained."""
    one, two = ([configs[number] for number in numbers] for numbers in (first, second))
    group = interrupted(configs, whole)
    refusals: list[str] = []

    def again() -> None:
        with pytest.raises(UserError) as refused:
            train.train_models(two, print)
        refusals.append(str(refused.value))

    workers.meanwhile = [again]
    train.train_models(one, print)
    (refusal,) = refusals
    assert re.search(rf"/train/\.\w+-\w+\.lease' is being written by process {os.getpid()} on .*; wait until it ends", refusal)
    told: list[str] = []
    train.train_models(two, told.append)
    rest = [config.name for config in two if config not in one]
    names = ", ".join(config.name for config in two if config in one) if rest else "this"
    assert told[0] == f"another job has meanwhile trained {names}"
    trained = [[values["name"] for values in settings["configs"]] for settings in workers.given]
    assert trained == [[config.name for config in one], *([rest] if rest else [])]
    done = all(map(trained_models.is_trained, configs))
    assert group.exists() == (not done)
