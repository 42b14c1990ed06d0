"""Kinds of search: a population, several objectives, trials of several workers, and a budget that ends one."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from searches import SPACE, options, runs_of, told, tuned
from small import processes_below, start_job, wait_for

from dmat_ray.cluster import champion, trial_watch, tune
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import Config
from dmat_ray.data.epochs import held_out_positions
from dmat_ray.data.manifold_set import open_set
from dmat_ray.models import checkpoint
from dmat_ray.reports import search_result

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive, pytest.mark.usefixtures("ray_session")]


def test_a_population_carries_weights_and_changes_settings(finished, tmp_path, say, lines):
    """Its driver is killed, and its Ray with it, once weights have changed hands."""
    more = ["--tune.searcher", "random", "--tune.scheduler", "pbt", "--tune.num_samples", 4, "--tune.epochs", 4]
    more += ["--cluster.train_workers", 1, "--tune.objective", "clean", "--tune.evaluate", False]
    config = tuned(tmp_path, *more)
    finished.copy_set(tmp_path)
    given = options(tmp_path)
    cosine = SPACE.replace("SPACE = {", 'SPACE = {"training.schedule": "cosine", "training.lr": 0.2,')
    (tmp_path / "little.py").write_text(cosine)
    job = start_job("tune.py", tmp_path, "--preset", "demo", "dmat", *given, *map(str, more))
    folder = tmp_path / "tune" / "little"

    def branched() -> list[Path]:
        return [p for p in folder.glob("trials/*/line_*/checkpoint_*/run.json") if "lineage" in json.loads(p.read_text())]

    wait_for(lambda: bool(branched()), job)
    job.send_signal(signal.SIGKILL)
    assert "takes another's weights" in job.communicate()[0]
    assert not (folder / "result.json").exists(), "it was killed in the middle"
    found = tune.search(Plan(config, say), say, resume=True)
    assert any("going on" in line for line in lines)
    assert {t.status for t in found.trials} == {"finished"}
    moved = [t for t in found.trials if t.lineage]
    assert moved, "a population of four has a worst"
    low, high = 0.5 * config.objective.image.eps, 2 * config.objective.image.eps
    for trial in found.trials:
        assert [h["epoch"] for h in trial.history] == [1, 2, 3, 4]
        assert low <= trial.knobs["objective.image.eps"] <= high
    for trial in moved:
        ancestor = trial.lineage[-1]
        assert ancestor["settings"]["objective.image.eps"] != trial.knobs["objective.image.eps"]
        (other,) = [t for t in found.trials if t.name == ancestor["name"]]
        # as far as they went together they are one training
        upto = int(ancestor["epoch"]) if not other.lineage else 1
        assert trial.history[:upto] == other.history[:upto] or other.lineage
    _, children = runs_of(f"sqlite:///{tmp_path / 'mlflow.db'}", config)
    assert children.keys() == {t.name for t in found.trials}


def beaten(points: dict[str, tuple[float, ...]]) -> set[str]:
    """Names of those that another is as good as in all and better in one, by brute force."""
    return {
        name
        for name, one in points.items()
        for other in points.values()
        if other != one and all(a >= b for a, b in zip(other, one, strict=True))
    }


def test_several_objectives_give_a_front_and_what_fails_is_recorded(finished, tmp_path, say, lines):
    """Two settings that are refused together fail whenever both are drawn, and a huge rate diverges; the others go on."""
    more = ["--tune.searcher", "nsga2", "--tune.scheduler", "none", "--tune.num_samples", 8, "--tune.epochs", 1]
    more += ["--tune.objective", "clean", "--tune.objective", "linf", "--cluster.train_workers", 1, "--tune.retries", 1]
    config = tuned(tmp_path, *more)
    Path(config.tune.space).write_text(
        "from ray import tune\n"
        'SPACE = {"objective.image.eps": tune.choice([0.1, 0.15]), "objective.image.steps": tune.choice([3, 2]),\n'
        '         "training.schedule": "cosine", "training.lr": tune.choice([0.05, 0.1, 1e12])}\n'
    )
    finished.copy_set(tmp_path)
    found = tune.search(Plan(config, say), say)
    assert len(found.trials) == 8
    for trial in found.trials:
        expected = "diverged" if trial.knobs["training.lr"] > 1 else "finished"
        short = (trial.knobs["objective.image.eps"], trial.knobs["objective.image.steps"]) == (0.15, 2)
        assert trial.status == ("failed" if short else expected), trial
        assert bool(trial.error) == (trial.status == "failed")
    assert {t.status for t in found.trials} == {"finished", "failed", "diverged"}, "drawn by the seed"
    points = {t.name: (t.scores["clean"], t.scores["linf"]) for t in found.trials if t.status == "finished"}
    assert {points[name] for name in found.front} == {points[name] for name in points.keys() - beaten(points)}
    assert found.evaluated.keys() == found.tested.keys() == {found.best, *found.front}
    assert set(found.evaluated[found.best]) >= {"on_manifold/clean", "natural/clean", "on_manifold/OM-PGD-20"}
    findings = json.loads((tmp_path / "tune" / "little" / "evaluation" / "checks.json").read_text())["findings"]
    warned = {f"warning: {f['model']}: {f['check']}: {f['text']}" for f in findings if f["level"] == "warning"}
    assert warned, "of networks that have seen forty digits once"
    assert all(lines.count(line) == 1 for line in warned)
    _, children = runs_of(f"sqlite:///{tmp_path / 'mlflow.db'}", config)
    status = {t.name: "FAILED" if t.status in ("failed", "diverged") else "FINISHED" for t in found.trials}
    assert {name: run.info.status for name, run in children.items()} == status


def free_cpus() -> float:
    return float(ray.available_resources()["CPU"])


def test_a_trial_of_two_workers_is_a_ray_train_run(finished, tmp_path, say, lines):
    """Its controller is killed and leaves room reserved. What it reports is what its model says of the held-out images.

    Helpers of another job lie on the head node, as many as ten trainings would have.
    """
    more = ["--tune.searcher", "grid", "--tune.scheduler", "none", "--tune.epochs", 2]
    more += ["--cluster.train_workers", 2, "--tune.evaluate", False]
    config = tuned(tmp_path, *more)
    Path(config.tune.space).write_text('from ray import tune\nSPACE = {"objective.image.eps": tune.choice([0.05])}\n')
    finished.copy_set(tmp_path)
    helpers = ray.util.placement_group([{"node:__internal_head__": 0.01}])
    ray.get(helpers.ready())
    before = free_cpus()

    def say_and_kill(line: str) -> None:
        say(line)
        if "epoch 1/2" in line:
            max(processes_below(os.getpid(), "TrainController"), key=lambda process: process.create_time()).kill()

    found = tune.search(Plan(config, say_and_kill), say_and_kill, resume=True)
    assert any("there is no search in" in line and "yet: beginning one" in line for line in lines)
    (trial,) = found.trials
    assert (trial.status, trial.epochs, found.best, found.front) == ("finished", 2, trial.name, [trial.name])
    assert [h["epoch"] for h in trial.history] == [1, 2]
    assert any("tried again" in line for line in lines)
    end = time.monotonic() + 60
    while free_cpus() < before:
        assert time.monotonic() < end, "reserved for nobody"
        time.sleep(0.5)
    ray.util.remove_placement_group(helpers)
    published, run = checkpoint.load_classifier(Path(config.output) / "models" / trial.name)
    assert run["config"]["cluster"]["train_workers"] == 2
    data = open_set(tmp_path / "on_manifold_set", "train")
    loaded = Config.model_validate(run["config"])
    held_out = data.take(held_out_positions(len(data), loaded.training)[1])
    x = held_out.batch(np.arange(len(held_out)), "on_manifold")
    with torch.no_grad():
        right = published(x.x_BCHW).argmax(dim=1) == x.y_B
    assert trial.scores["clean"] == pytest.approx(float(right.float().mean()))


def test_a_budget_ends_a_search_which_can_go_on(finished, tmp_path, say, lines, monkeypatch):
    """The driver's clock is put forward by an hour after the first epoch. Where it goes on a trial is killed, and tried again as
    often as is said by then.
    """
    more = ["--tune.searcher", "random", "--tune.num_samples", 3, "--tune.epochs", 2, "--tune.max_concurrent", 1]
    more += ["--cluster.train_workers", 1, "--tune.evaluate", False, "--tune.scheduler", "median"]
    finished.copy_set(tmp_path)
    config = tuned(tmp_path, *more)
    short = config.model_copy(update={"tune": config.tune.model_copy(update={"max_wall_minutes": 50.0, "retries": 0})})

    def say_and_wait(line: str) -> None:
        say(line)
        if "little_000: epoch 1/2" in line:
            monkeypatch.setattr(trial_watch, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))

    found = tune.search(Plan(short, say_and_wait), say_and_wait)
    monkeypatch.undo()
    assert found.ended_by == "tune.max_wall_minutes 50"
    assert any("is used up" in line for line in lines)
    assert [(t.name, t.status, t.epochs) for t in found.trials] == [("little_000", "stopped", 1)]
    assert tune.search(Plan(short, say), say).ended_by, "what there is is a result"

    killed: list[str] = []

    def say_and_kill(line: str) -> None:
        say(line)
        if not killed and "little_001: epoch 1/2" in line:
            killed.append(line)
            max(processes_below(os.getpid(), "ImplicitFunc"), key=lambda process: process.create_time()).kill()

    whole = tune.search(Plan(config, say_and_kill), say_and_kill, resume=True)
    assert killed
    assert any(line.startswith("warning: little_001 has failed") and "tried again" in line for line in lines)
    assert not whole.ended_by
    assert [(t.name, t.status, t.epochs) for t in whole.trials] == [(f"little_{n:03d}", "finished", 2) for n in range(3)]

    # what is done once all trials have ended can be asked for afterwards
    more = config.model_copy(update={"tune": config.tune.model_copy(update={"confirm_seeds": 1})})
    assert not tune.search(Plan(more, say), say).confirmed
    assert "did another tune.confirm_seeds; --resume goes on with it" in lines[-1]
    confirmed = tune.search(Plan(more, say), say, resume=True)
    assert confirmed.confirmed == {"best": ["little_best_seed1"], "start": ["little_start_seed1"]}
    assert told(confirmed.trials) == told(whole.trials)
    best = whole.trial(whole.best)
    for kind, eps in (("best", best.knobs["objective.image.eps"]), ("start", config.objective.image.eps)):
        _, run = checkpoint.load_classifier(tmp_path / "models" / f"little_{kind}_seed1")
        trained = Config.model_validate(run["config"])
        assert (trained.objective.image.eps, trained.training.seed, trained.training.epochs) == (eps, 1, 2)
        assert run["finished"]
    assert "trained anew with 1 seeds" in search_result.summary(confirmed)
    assert "Trained anew with 1 seeds" in (tmp_path / "tune" / "little" / champion.PAGE).read_text()
