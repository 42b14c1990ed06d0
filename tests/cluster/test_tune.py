"""A search: what it finds, what it leaves in a real MLflow server, and that no kill changes anything of it.

The calm search that all is compared with is not calm at all: its MLflow server and a trial's process are killed on the way.
"""

import os
import shutil
import signal
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from chromium import MISSING, browser, document
from mlflow import MlflowClient
from ray.tune.experiment.trial import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from searches import ONE_BY_ONE, SPACE, options, runs_of, told, tuned
from small import MlflowServer, PostgresServer, finish, processes_below, start_job, wait_for

from dmat_ray.cluster import champion, searchers, tune
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.reports import search_result
from dmat_ray.reports.search_result import SearchResult
from dmat_ray.reports.trials import metric, value
from dmat_ray.training import trainer

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


@dataclass(frozen=True)
class Searched:
    """A finished search."""

    config: Config
    found: SearchResult
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

    return Searched(config, tune.search(Plan(config, say), say), lines)


def test_a_search_ranks_its_trials_and_survives_what_is_killed(searched):
    found = searched.found
    assert [t.name for t in found.trials] == [f"little_{n:03d}" for n in range(1, 5)]
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


def assert_tracked(uri: str, config: Config, found: SearchResult) -> None:
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


@pytest.mark.exhaustive
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
    name = f"{searched.config.tracking.experiment} little"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server.url)  # as docs/search.md says it; told otherwise, MLflow asks its default registry for aliases
    try:
        folder = mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(before)
    network, run = checkpoint.load_classifier(Path(folder))
    assert run["config"]["name"] == searched.found.best
    published, _ = checkpoint.load_classifier(Path(searched.config.output) / "models" / searched.found.best)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), published.state_dict().values(), strict=True))


def test_a_second_call_does_nothing(searched, say, lines):
    found = tune.search(Plan(searched.config, say), say)
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
            tune.search(Plan(config, say), say, resume=resume)


def test_a_search_is_not_gone_on_with_in_another_space(searched, say):
    config = tuned(Path(searched.config.output), *ONE_BY_ONE)
    Path(config.tune.space).write_text(SPACE.replace("times(0.5, 2)", "times(0.5, 3)"))
    with pytest.raises(UserError, match=r"has space: objective.image.eps = .*, now it is"):
        tune.search(Plan(config, say), say, resume=True)
    Path(config.tune.space).write_text(SPACE)


@pytest.mark.exhaustive
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
    found = search_result.read(folder)
    assert told(found.trials) == told(searched.found.trials)
    assert (found.best, found.front, found.tested) == (searched.found.best, searched.found.front, searched.found.tested)
    config = tuned(tmp_path, *ONE_BY_ONE)
    assert_tracked(f"sqlite:///{tmp_path / 'mlflow.db'}", config, found)


def test_a_search_whose_state_was_cut_off_goes_on_from_its_copy(searched, tmp_path, say, lines):
    """As a kill leaves it that comes while Tune writes; here all trials had ended."""
    output = shutil.copytree(searched.config.output, tmp_path / "output")
    folder = output / "tune" / "little"

    def newest() -> Path:
        return max((folder / "ray_tune").glob("experiment_state-*.json"))

    def cut_off() -> Path:
        (folder / search_result.FILE).unlink()
        os.truncate(newest(), newest().stat().st_size // 2)
        return newest()

    with zipfile.ZipFile(folder / "ray_tune.zip") as copy:
        assert newest().name in copy.namelist()
        assert len(copy.namelist()) == 4, "the tuner's, Tune's own, and of the searcher two"
        assert all(copy.read(name) == (folder / "ray_tune" / name).read_bytes() for name in copy.namelist())

    state = cut_off()
    config = tuned(output, *ONE_BY_ONE)
    found = tune.search(Plan(config, say), say, resume=True)
    assert any(line.startswith(f"'{state}' is damaged (") and "going on with its copy in" in line for line in lines)
    assert not any("epoch" in line and line.startswith("little_00") for line in lines), "nothing is trained again"
    assert told(found.trials) == told(searched.found.trials)
    assert (found.best, found.front, found.tested) == (searched.found.best, searched.found.front, searched.found.tested)

    assert cut_off() != state, "each session writes one of its own"
    (folder / "ray_tune.zip").unlink()
    with pytest.raises(UserError, match=r"^the search in '.*little' cannot go on: '.*' is damaged \(.*\); give it another name"):
        tune.search(Plan(config, say), say, resume=True)


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
