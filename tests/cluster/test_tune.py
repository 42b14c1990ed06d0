"""A search: what it finds, what it leaves in a real MLflow server, and that no kill changes anything of it.

The calm search that all is compared with is not calm at all: its MLflow server and a trial's process are killed on the way.
"""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import ray
import torch
from chromium import MISSING, browser, document
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.tune.experiment.trial import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from small import MlflowServer, PostgresServer, finish, processes_below, settings, start_job, wait_for

from dmat_ray import checkpoint, trainer
from dmat_ray.cluster import champion, searchers, tune
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import ClusterConfig, Config, TuneConfig
from dmat_ray.data.epochs import held_out_positions
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.trials import Trial, metric, value

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
SPACE = """
from ray import tune
from dmat_ray.cluster.spaces import simplex, times

SPACE = {
    "objective.image.eps": times(0.5, 2),
    ("objective.image.weight", "objective.latent.weight"): simplex(),
    "objective.latent.steps": 1,
}
"""
SUITE = """
attacks:
  - {threat: clean, name: clean}
  - {threat: image, name: linf, eps: 0.02, steps: 2}
summaries:
  - {name: worst, how: worst, of: [linf]}
"""
# one trial at a time, so that what is drawn does not depend on which ends first
ONE_BY_ONE = ["--tune.searcher", "tpe", "--tune.num_samples", "5", "--tune.epochs", "3", "--tune.max_concurrent", "1"]
ONE_BY_ONE += ["--cluster.train_workers", "1", "--tune.objective", "0.7*clean + 0.3*linf", "--tune.evaluate", "false"]


def options(folder: Path) -> list[str]:
    """The space and the yardstick of these tests, as files in `folder`."""
    (folder / "little.py").write_text(SPACE)
    (folder / "little.yaml").write_text(SUITE)
    return ["--tune.space", str(folder / "little.py"), "--tune.suites", str(folder / "little.yaml")]


def tuned(output: Path, *more: Any) -> Config:
    output.mkdir(exist_ok=True)
    return settings(output, *options(output), *more, preset=("demo", "dmat"))


def told(every: list[Trial]) -> list[dict[str, Any]]:
    """What must not depend on kills and on time."""
    return [{k: v for k, v in trial.to_json().items() if k != "seconds"} for trial in sorted(every, key=lambda t: t.name)]


@dataclass(frozen=True)
class Searched:
    """A finished search."""

    config: Config
    found: champion.Found
    lines: list[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    """An MLflow server on loopback, with PostgreSQL behind it where that is installed (as make test does if it can)."""
    folder = tmp_path_factory.mktemp("mlflow")
    if PostgresServer.programs() is None:
        with MlflowServer(folder) as server:
            yield server
    else:
        with PostgresServer() as database, MlflowServer(folder, database.uri) as server:
            yield server


@pytest.fixture(scope="module")
def searched(server, finished, tmp_path_factory) -> Searched:
    """The server is killed after the first epoch and comes back with the second trial, in which a process is killed."""
    config = tuned(tmp_path_factory.mktemp("searched"), *ONE_BY_ONE, "--tracking.uri", server.url, "--tracking.patience_s", 300)
    finished.copy_set(Path(config.output))
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("little_001: epoch 1/"):
            server.kill()
        if line.startswith("little_002 starts"):
            server.start()
        if line.startswith("little_002: epoch 2/") and not any("tried again" in one for one in lines):
            (process,) = processes_below(os.getpid(), "ImplicitFunc")
            process.kill()

    return Searched(config, tune.search(config, say), lines)


def test_a_search_ranks_its_trials_and_survives_what_is_killed(searched):
    found = searched.found
    assert [t.name for t in found.trials] == [f"little_{n:03d}" for n in range(1, 6)]
    assert any(line.startswith("warning: little_002 has failed") and "tried again" in line for line in searched.lines)
    assert {t.status for t in found.trials} <= {"finished", "stopped"}
    values = {t.name: 0.7 * t.scores["clean"] + 0.3 * t.scores["linf"] for t in found.trials}
    assert values[found.best] == max(values.values())
    for trial in found.trials:
        assert [h["epoch"] for h in trial.history] == list(range(1, trial.epochs + 1)), "each epoch once, though one was killed"
        assert trial.knobs["objective.image.weight"] + trial.knobs["objective.latent.weight"] == pytest.approx(1)
    assert max(t.epochs for t in found.trials) == 3
    assert (Path(searched.config.output) / "tune" / "little" / champion.PAGE).is_file()


def test_a_trial_is_a_training_of_its_settings(searched, tmp_path):
    """Of the one whose process was killed: bit by bit what the loop gives without Ray, and its scores those of that model."""
    (trial,) = [t for t in searched.found.trials if t.name == "little_002"]
    folder = Path(searched.config.output) / "tune" / "little" / "trials" / trial.name / "line_00"
    newest = max(folder.glob("checkpoint_*"))
    run = checkpoint.read_run(newest)
    config = Config.model_validate(run["config"])
    assert config.objective.image.eps == trial.knobs["objective.image.eps"]
    assert config.objective.latent.steps == 1
    assert config.training.epochs == 3
    data = open_set(Path(searched.config.output) / "on_manifold_set", "train")
    generator = generators.load_configured(config.generator, "cpu")
    sha = generators.fingerprint(config.generator.path)
    epochs: list[int] = []

    class EnoughError(Exception):
        """As many epochs as the trial had."""

    def note(metrics: Any) -> None:
        epochs.append(int(metrics["epoch"]))
        if len(epochs) == trial.epochs:
            raise EnoughError

    with pytest.raises(EnoughError):
        trainer.train(config, data, generator, sha, LocalContext(tmp_path, note))
    alone = checkpoint.load_classifier(tmp_path / "checkpoint")[0].state_dict()
    theirs = checkpoint.load_classifier(newest)[0].state_dict()
    assert all(torch.equal(theirs[key], alone[key]) for key in alone)


def runs_of(uri: str, config: Config) -> tuple[Run, dict[str, Run]]:
    """The search's run, and those of its trials by name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    every = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in every if r.data.tags["dmat_ray.stage"] == "tune"]
    children = [r for r in every if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(every) == len(children) + 1, "none is there twice, and none is anybody else's"
    return parent, {r.info.run_name.removeprefix("trial: "): r for r in children}


def assert_tracked(uri: str, config: Config, found: champion.Found) -> None:
    """A tree of runs with every epoch once, and the best model in the registry."""
    client = MlflowClient(uri)
    parent, children = runs_of(uri, config)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_trial"] == found.best
    assert children.keys() == {trial.name for trial in found.trials}
    for trial in found.trials:
        child = children[trial.name]
        assert child.info.status == "FINISHED"
        assert float(child.data.params["objective.image.eps"]) == trial.knobs["objective.image.eps"]
        assert float(child.data.tags["knob.objective.image.eps"]) == trial.knobs["objective.image.eps"]
        points = client.get_metric_history(child.info.run_id, "yardstick.clean")
        assert [(p.step, p.value) for p in points] == [(h["epoch"], h["clean"]) for h in trial.history]
        assert child.data.metrics["objective_0"] == pytest.approx(0.7 * trial.scores["clean"] + 0.3 * trial.scores["linf"])
    best = children[found.best]
    for column, share in found.tested[found.best].items():
        assert best.data.metrics[f"test/yardstick/{column}"] == pytest.approx(share)

    name = f"{config.tracking.experiment} little"
    version = client.get_model_version_by_alias(name, champion.CHAMPION)
    assert version.run_id == best.info.run_id
    versions = client.search_model_versions(f"name = '{name}'")
    neighbours = {client.get_run(v.run_id).info.run_name.removeprefix("trial: ") for v in versions}
    assert neighbours == {found.best, *found.front}
    for one in versions:
        trial = client.get_run(one.run_id).info.run_name.removeprefix("trial: ")
        assert one.tags["pareto_front"] == str(trial in found.front).lower()
        assert one.tags["trial"] == trial


def test_runs_are_a_tree_and_the_best_is_the_champion(searched, server):
    assert_tracked(server.url, searched.config, searched.found)


@pytest.mark.skipif(browser() is None, reason=MISSING)
def test_the_runs_can_be_looked_at(searched, server, tmp_path):
    """MLflow's own page in a real browser, which fetches them from the server."""
    _, children = runs_of(server.url, searched.config)
    best = children[searched.found.best].info
    page = f"{server.url}/#/experiments/{best.experiment_id}/runs"
    wide = ("--virtual-time-budget=60000", "--window-size=1600,1200")
    assert "tune: little" in document(page, tmp_path, *wide)
    shown = document(f"{page}/{best.run_id}", tmp_path, *wide)
    assert f"trial: {searched.found.best}" in shown
    assert "tune: little" in shown, "its parent"


def test_the_champion_can_be_downloaded_and_used(searched, server, tmp_path):
    mlflow.set_tracking_uri(server.url)
    name = f"{searched.config.tracking.experiment} little"
    folder = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path))
    network, run = checkpoint.load_classifier(Path(folder))
    assert run["config"]["name"] == searched.found.best
    published, _ = checkpoint.load_classifier(Path(searched.config.output) / "models" / searched.found.best)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), published.state_dict().values(), strict=True))


def test_a_second_call_does_nothing(searched, say, lines):
    found = tune.search(searched.config, say)
    assert told(found.trials) == told(searched.found.trials)
    assert found.best == searched.found.best
    assert any("nothing to do" in line for line in lines)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tune.epochs", "2"], r"has tune.epochs = 3, now it is 2; .* --tune.name"),
        (["--objective.latent.eps", "0.05"], "has objective.latent.eps = 0.06, now it is 0.05"),
        (["--tune.suites", "digits_search"], r"yardstick: \w+ = "),
    ],
)
def test_a_search_is_not_gone_on_with_as_another(searched, say, more, message):
    config = tuned(Path(searched.config.output), *ONE_BY_ONE, *more)
    for resume in (True, False):
        with pytest.raises(UserError, match=message):
            tune.search(config, say, resume=resume)


def test_a_search_is_not_gone_on_with_in_another_space(searched, say):
    config = tuned(Path(searched.config.output), *ONE_BY_ONE)
    Path(config.tune.space).write_text(SPACE.replace("times(0.5, 2)", "times(0.5, 3)"))
    with pytest.raises(UserError, match=r"has space: objective.image.eps = .*, now it is"):
        tune.search(config, say, resume=True)
    Path(config.tune.space).write_text(SPACE)


def test_a_killed_driver_goes_on_as_if_nothing_had_been(searched, finished, tmp_path):
    """With it dies its Ray, the head node included. The searcher draws what it would have drawn, and no trial is repeated."""
    finished.copy_set(tmp_path)
    more = [*options(tmp_path), *ONE_BY_ONE]
    job = start_job("tune.py", tmp_path, "--preset", "demo", "dmat", *more)
    trial_folders = tmp_path / "tune" / "little" / "trials"
    wait_for(lambda: len(list(trial_folders.glob("little_003/line_00/checkpoint_*"))) >= 1, job)
    last = [max(trial_folders.glob(f"little_00{n}/line_00/checkpoint_*")) / "run.json" for n in (1, 2)]
    done = {path: path.stat().st_mtime_ns for path in last}
    job.send_signal(signal.SIGKILL)
    job.wait()

    refused = start_job("tune.py", tmp_path, "--preset", "demo", "dmat", *more)
    assert "--resume goes on with it" in refused.communicate(timeout=400)[0]
    assert refused.returncode == 2

    output = finish(start_job("tune.py", tmp_path, "--preset", "demo", "dmat", *more, "--resume"))
    assert "little_001: epoch" not in output, "what was finished is not trained again"
    assert "little_002: epoch" not in output
    assert {p: p.stat().st_mtime_ns for p in done} == done
    folder = tmp_path / "tune" / "little"
    found = champion.read(folder)
    assert told(found.trials) == told(searched.found.trials)
    assert (found.best, found.front, found.tested) == (searched.found.best, searched.found.front, searched.found.tested)
    config = tuned(tmp_path, *ONE_BY_ONE)
    assert_tracked(f"sqlite:///{tmp_path / 'mlflow.db'}", config, found)


def test_a_population_carries_weights_and_changes_settings(finished, tmp_path, say, lines):
    more = ["--tune.searcher", "random", "--tune.scheduler", "pbt", "--tune.num_samples", 4, "--tune.epochs", 4]
    more += [
        "--cluster.train_workers",
        1,
        "--tune.objective",
        "clean",
        "--tune.evaluate",
        False,
        "--training.schedule",
        "cosine",
        "--training.lr",
        0.2,
    ]
    config = tuned(tmp_path, *more)
    finished.copy_set(tmp_path)
    found = tune.search(config, say)
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
    assert any("takes another's weights" in line for line in lines)
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


def test_several_objectives_give_a_front_and_what_fails_is_recorded(finished, tmp_path, say):
    """A network that cannot take images so small fails whenever it is drawn, and one with a huge rate diverges."""
    more = ["--tune.searcher", "nsga2", "--tune.scheduler", "none", "--tune.num_samples", 8, "--tune.epochs", 1]
    more += ["--tune.objective", "clean", "--tune.objective", "linf", "--cluster.train_workers", 1, "--tune.retries", 1]
    config = tuned(tmp_path, *more)
    Path(config.tune.space).write_text(
        "from ray import tune\n"
        'SPACE = {"classifier.name": tune.choice(["digits_cnn", "digits_cnn", "inception_v3"]),\n'
        '         "training.schedule": "cosine", "training.lr": tune.choice([0.05, 0.1, 1e12])}\n'
    )
    finished.copy_set(tmp_path)
    found = tune.search(config, say)
    assert len(found.trials) == 8
    for trial in found.trials:
        expected = "diverged" if trial.knobs["training.lr"] > 1 else "finished"
        assert trial.status == ("failed" if trial.knobs["classifier.name"] == "inception_v3" else expected), trial
        assert bool(trial.error) == (trial.status == "failed")
    assert {t.status for t in found.trials} == {"finished", "failed", "diverged"}, "drawn by the seed"
    points = {t.name: (t.scores["clean"], t.scores["linf"]) for t in found.trials if t.status == "finished"}
    assert {points[name] for name in found.front} == {points[name] for name in points.keys() - beaten(points)}
    assert found.evaluated.keys() == found.tested.keys() == {found.best, *found.front}
    assert set(found.evaluated[found.best]) >= {"on_manifold/clean", "natural/clean", "on_manifold/OM-PGD-20"}
    _, children = runs_of(f"sqlite:///{tmp_path / 'mlflow.db'}", config)
    status = {t.name: "FAILED" if t.status in ("failed", "diverged") else "FINISHED" for t in found.trials}
    assert {name: run.info.status for name, run in children.items()} == status


def test_a_trial_of_two_workers_is_a_ray_train_run(finished, tmp_path, say):
    """What it reports is what its model says of the held-out images."""
    more = ["--tune.searcher", "grid", "--tune.scheduler", "none", "--tune.epochs", 1]
    more += ["--cluster.train_workers", 2, "--tune.evaluate", False]
    config = tuned(tmp_path, *more)
    Path(config.tune.space).write_text('from ray import tune\nSPACE = {"objective.image.eps": tune.choice([0.05])}\n')
    finished.copy_set(tmp_path)
    found = tune.search(config, say)
    (trial,) = found.trials
    assert (trial.status, trial.epochs, found.best, found.front) == ("finished", 1, trial.name, [trial.name])
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
    """The driver's clock is put forward by an hour after the first epoch."""
    more = ["--tune.searcher", "random", "--tune.num_samples", 3, "--tune.epochs", 2, "--tune.max_concurrent", 1]
    more += ["--cluster.train_workers", 1, "--tune.evaluate", False, "--tune.scheduler", "median"]
    finished.copy_set(tmp_path)
    config = tuned(tmp_path, *more)
    short = config.model_copy(update={"tune": config.tune.model_copy(update={"max_wall_minutes": 50.0})})

    def say_and_wait(line: str) -> None:
        say(line)
        if "little_000: epoch 1/2" in line:
            monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))

    found = tune.search(short, say_and_wait)
    monkeypatch.undo()
    assert found.ended_by == "tune.max_wall_minutes 50"
    assert any("is used up" in line for line in lines)
    assert [(t.name, t.status, t.epochs) for t in found.trials] == [("little_000", "stopped", 1)]
    assert tune.search(short, say).ended_by, "what there is is a result"

    whole = tune.search(config, say, resume=True)
    assert not whole.ended_by
    assert [(t.name, t.status, t.epochs) for t in whole.trials] == [(f"little_{n:03d}", "finished", 2) for n in range(3)]

    # what is done once all trials have ended can be asked for afterwards
    more = config.model_copy(update={"tune": config.tune.model_copy(update={"confirm_seeds": 1})})
    assert not tune.search(more, say).confirmed
    assert "did another tune.confirm_seeds; --resume goes on with it" in lines[-1]
    confirmed = tune.search(more, say, resume=True)
    assert confirmed.confirmed == {"best": ["little_best_seed1"], "start": ["little_start_seed1"]}
    assert told(confirmed.trials) == told(whole.trials)
    best = whole.trial(whole.best)
    for kind, eps in (("best", best.knobs["objective.image.eps"]), ("start", config.objective.image.eps)):
        _, run = checkpoint.load_classifier(tmp_path / "models" / f"little_{kind}_seed1")
        trained = Config.model_validate(run["config"])
        assert (trained.objective.image.eps, trained.training.seed, trained.training.epochs) == (eps, 1, 2)
        assert run["finished"]
    assert "trained anew with 1 seeds" in champion.summary(confirmed)
    assert "Trained anew with 1 seeds" in (tmp_path / "tune" / "little" / champion.PAGE).read_text()


def stub(name: str, epoch: int = 0) -> TuneTrial:
    """A trial as Tune's schedulers see it, that had been told of so many epochs."""
    trial = TuneTrial("stub", stub=True, trial_id=name, trial_name_creator=lambda _: name)
    if epoch:
        trial.run_metadata.last_result = {"epoch": float(epoch)}
    return trial


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_remembers_after_a_kill(searched, scheduler):
    """It decides of a new trial as one that was never interrupted: the trials before are told to the one, read by the other."""
    plan = Plan(tuned(Path(searched.config.output), *ONE_BY_ONE), print)
    settings = plan.config.tune.model_copy(update={"scheduler": scheduler})
    controller = SimpleNamespace(get_live_trials=list)  # none waits for a turn
    calm, restored, blank = (searchers.scheduler(settings, plan.space, plan.work) for _ in range(3))
    objective = plan.work.objectives[0]
    for trial in searched.found.trials:
        told_live, read_again = stub(f"live_{trial.name}"), stub(trial.name, trial.epochs)
        calm.on_trial_add(controller, told_live)
        for scores in trial.history:
            result = {"epoch": scores["epoch"], metric(0): value(objective, scores)}
            calm.on_trial_result(controller, told_live, {**result, "training_iteration": int(scores["epoch"])})
        restored.on_trial_add(controller, read_again)
    decisions: dict[str, list[str]] = {"calm": [], "restored": [], "blank": []}
    for score in (0.0, 0.05, 0.1, 0.5):
        for name, one in (("calm", calm), ("restored", restored), ("blank", blank)):
            new = stub(f"new_{score}")
            one.on_trial_add(controller, new)
            results = [{"epoch": e, metric(0): score, "training_iteration": e} for e in (1, 2)]
            for result in results:
                decisions[name].append(one.on_trial_result(controller, new, result))
                if decisions[name][-1] == TrialScheduler.STOP:
                    break
    assert decisions["restored"] == decisions["calm"]
    assert decisions["blank"] != decisions["calm"], "so that it matters"


def test_a_trial_that_has_no_room_is_refused_before_anything_starts(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    config = tuned(tmp_path, *ONE_BY_ONE, "--cluster.gpus_per_worker", 1, "--cluster.train_workers", 3)
    with pytest.raises(UserError, match=r"a trial needs 3 CPU and 3 GPU \(3 workers\), the cluster has .* CPU and 0 GPU"):
        tune.search(config, say)
    assert not list((tmp_path / "tune" / "little").glob("trials/*"))


def test_as_many_trials_run_as_have_room_for_all_their_workers(ray_session):
    """On a cluster that is there; half a worker's room is none, or trials would wait for each other."""
    cpus = int(ray.cluster_resources()["CPU"])
    there = {"address": "auto"}  # not a Ray of its own, which is bounded by its cores
    for workers in (1, 2, 4):
        cluster = ClusterConfig(train_workers=workers, **there)
        assert searchers.trials_at_once(TuneConfig(), cluster, alone=True) == cpus // workers
        assert searchers.trials_at_once(TuneConfig(max_concurrent=1), cluster, alone=True) == 1
    with pytest.raises(UserError, match="the cluster has"):
        searchers.trials_at_once(TuneConfig(), ClusterConfig(train_workers=cpus + 1, **there), alone=False)
    own = searchers.trials_at_once(TuneConfig(), ClusterConfig(train_workers=1), alone=True)
    assert own == min(cpus, os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tune.objective", "unseen"], r"names 'unseen', which no trial reports; suite .*little.yaml has clean, linf, worst"),
        (["--training.val_examples", "0"], "training.val_examples is 0"),
        (["--training.images", "natural"], r"objective.latent needs training.images on_manifold"),
        (["--tune.suites", "nowhere"], "suite 'nowhere' does not exist"),
    ],
)
def test_a_search_that_cannot_work_is_refused(finished, tmp_path, say, more, message):
    finished.copy_set(tmp_path)
    with pytest.raises(UserError, match=message):
        tune.search(tuned(tmp_path, *more), say)
    assert not (tmp_path / "tune").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_nothing_to_resume_is_said(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    with pytest.raises(UserError, match=r"there is no search in .* to resume"):
        tune.search(tuned(tmp_path), say, resume=True)
