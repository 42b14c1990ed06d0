"""Searches that cannot work are refused before anything starts, and as many trials run as have room."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from installed import install
from mlflow_databases import database
from ray.tune.experiment.trial import Trial as TuneTrial
from searches import ONE_BY_ONE, SPACE, tuned

from dmat_ray import presets
from dmat_ray.cluster import champion, searchers, trial_watch, tune
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import ClusterConfig, TuneConfig
from dmat_ray.errors import UserError
from dmat_ray.reports.search_result import SearchResult
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import LiveTable
from dmat_ray.validated import validate

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def test_a_trial_that_has_no_room_is_refused_before_anything_starts(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    config = tuned(tmp_path, *ONE_BY_ONE, "--cluster.gpus_per_worker", 1, "--cluster.train_workers", 3)
    with pytest.raises(UserError, match=r"a trial needs 3 CPU and 3 GPU \(3 workers\), the cluster has .* CPU and 0 GPU"):
        tune.search(Plan(config, say), say)
    assert not list((tmp_path / "tune" / "little").glob("trials/*"))


def test_as_many_trials_run_as_have_room_for_all_their_workers(ray_session, monkeypatch):
    """On a cluster that is there; half a worker's room is none, or trials would wait for each other."""
    cpus = int(ray.cluster_resources()["CPU"])
    there = {"address": "auto"}  # not a Ray of its own, which is bounded by its cores
    for workers in (1, 2, 4):
        cluster = ClusterConfig(train_workers=workers, **there)
        assert searchers.trials_at_once(TuneConfig(), cluster, alone=True) == cpus // workers
        assert searchers.trials_at_once(TuneConfig(max_concurrent=1), cluster, alone=True) == 1
        streamed = searchers.trials_at_once(TuneConfig(), cluster, alone=False, streamed=True)
        assert 1 <= streamed == (cpus - 1) // workers, "a CPU is left for the tasks that stream"
        for most in (cpus, cpus + 1):  # of an autoscaler that gives no more, and of one that gives another
            monkeypatch.setattr(
                ray._private.state.state, "get_max_resources_from_cluster_config", lambda most=most: {"CPU": most}
            )
            scaled = searchers.trials_at_once(TuneConfig(), cluster, alone=False, streamed=True)
            assert scaled == (most - 1) // workers
            monkeypatch.undo()
    with pytest.raises(UserError, match="the cluster has"):
        searchers.trials_at_once(TuneConfig(), ClusterConfig(train_workers=cpus + 1, **there), alone=False)
    with pytest.raises(UserError, match=rf"{cpus} workers of a trial take all {cpus} CPUs, and training.loader stream needs"):
        searchers.trials_at_once(TuneConfig(), ClusterConfig(train_workers=cpus, **there), alone=False, streamed=True)
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
        tune.search(Plan(tuned(tmp_path, *more), say), say)
    assert not (tmp_path / "tune" / "little").exists()
    assert (tmp_path / "mlflow.db").read_bytes() == database(), "nothing is tracked"


@pytest.mark.parametrize(("name", "words"), [("resnet19", "is not known"), ("alexnet", "cannot take 32x32 images: RuntimeError")])
def test_every_network_of_a_space_can_be_trained_on_the_set(finished, tmp_path, say, name, words):
    finished.copy_set(tmp_path)
    space = tmp_path / "networks.py"
    space.write_text(f'from ray import tune\nSPACE = {{"classifier.name": tune.choice(["digits_cnn", "{name}"])}}\n')
    with pytest.raises(UserError, match=f"classifier.name '{name}' {words}"):
        Plan(tuned(tmp_path, "--tune.space", space), say)


def test_settings_that_trials_are_judged_by_tell_searches_apart(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    plain = Plan(tuned(tmp_path), say)
    for option, value, name in (("seed", 7, "evaluation.seed"), ("precision", "bf16", "evaluation.precision")):
        other = Plan(tuned(tmp_path, f"--evaluation.{option}", value), say)
        assert {key for key in other.identity | plain.identity if other.identity.get(key) != plain.identity.get(key)} == {name}


WITH_JPEG = """
from ray import tune
from dmat_ray.cluster.spaces import simplex

SPACE = {
    ("objective.image.weight", "objective.latent.weight", "objective.more.jpg.weight"): simplex(),
    "classifier.name": tune.choice(["digits_cnn", "own/flat"]),
}
"""
PROJECT = """
[project]
name = "theirs"
version = "1"
[project.entry-points."dmat_ray.networks"]
flat = "theirs_searched:flat"
"""
FLAT = """
from torch import nn
def flat(channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 1024, num_classes))
"""


def test_terms_and_networks_that_only_trials_have_tell_searches_apart(finished, tmp_path, say, monkeypatch):
    """A term without a weight before the search has one in trials; a search begun before this counted goes on."""
    finished.copy_set(tmp_path)
    monkeypatch.syspath_prepend(install(tmp_path / "here", PROJECT, theirs_searched=FLAT))
    space = tmp_path / "jpeg.py"
    space.write_text(WITH_JPEG)

    def plan(eps: float) -> Plan:
        term = {"objective": {"more": {"jpg": {"threat": "jpeg", "eps": eps}}}}
        return Plan(validate(presets.merge(tuned(tmp_path, "--tune.space", space).to_json(), term)), say)

    one, other = plan(0.1), plan(0.2)
    assert {key for key in one.identity | other.identity if one.identity.get(key) != other.identity.get(key)} == {
        "objective.more.jpg.eps"
    }
    one.begin()
    with pytest.raises(UserError, match=r"has objective\.more\.jpg\.eps = 0\.1, now it is 0\.2"):
        other.is_finished(resume=True)
    (tmp_path / "here" / "theirs_searched.py").write_text(FLAT + "# more")
    with pytest.raises(UserError, match="has the network own/flat = theirs_searched:flat of theirs, "):
        plan(0.1).is_finished(resume=True)
    begun = json.loads((one.folder / "search.json").read_text())
    known = {key: value for key, value in begun["identity"].items() if ".jpg" not in key and not key.startswith("the network")}
    known |= {key: value for key, value in begun["identity"].items() if key.startswith("space: ")}
    del known["training.flip"]  # a setting that came later
    known["training.patience"] = 3  # which no trial has any more
    (one.folder / "search.json").write_text(json.dumps({**begun, "identity": known}))
    assert not other.is_finished(resume=True)


def test_a_space_of_what_no_trial_can_train_is_refused(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    space = tmp_path / "flip.py"
    space.write_text('from ray import tune\nSPACE = {"training.flip": tune.choice([False, True])}\n')
    with pytest.raises(UserError, match=r"flip\.py' reaches where trials cannot go: training\.flip .* needs the w that makes it"):
        Plan(tuned(tmp_path, "--tune.space", space), say)


def test_another_evaluation_at_the_end_is_left_to_be_done(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    plain = Plan(tuned(tmp_path), say)
    result = SearchResult("", [], [], [], 1, [], "", [], afterwards=plain.afterwards)
    assert plain.left_of(result) == ""
    assert Plan(tuned(tmp_path, "--evaluation.limit", 7), say).left_of(result) == "did another evaluation"
    assert Plan(tuned(tmp_path, "--tune.confirm_seeds", 2), say).left_of(result) == "did another tune.confirm_seeds"
    none = Plan(tuned(tmp_path, "--tune.evaluate", "false", "--evaluation.limit", 7), say)
    assert none.left_of(replace(result, afterwards=none.afterwards | {"evaluation": "gone"})) == ""


class Untracked:
    """A run that nobody keeps."""

    def tag(self, key: str, value: str) -> None:
        pass

    def finish(self, status: str, *, if_open: bool = False) -> None:
        self.status = status


def test_settings_that_do_not_go_together_end_their_trial_alone(finished, tmp_path, say, monkeypatch):
    """Each end of the space is fine with the others as they are, and these two are not."""
    finished.copy_set(tmp_path)
    space = tmp_path / "odd.py"
    space.write_text(
        "from ray import tune\nfrom dmat_ray.cluster.spaces import times\n"
        'SPACE = {"objective.image.eps": times(0.5, 2), "objective.image.steps": tune.choice([8, 4, 2])}\n'
    )
    plan = Plan(
        tuned(tmp_path, "--tune.space", space, "--objective.image.step_size", "0.05", "--objective.image.eps", "0.1"), say
    )
    run, opened = Untracked(), []
    monkeypatch.setattr(trial_watch.tracking, "open_run", lambda config, name, *_, **__: opened.append(config.name) or run)
    plan.folder.mkdir(parents=True)
    drawn = LiveTable((), "search")
    watcher = trial_watch.Watcher(plan, run, say, drawn)
    trial = TuneTrial("stub", stub=True, trial_id="odd_000", trial_name_creator=lambda _: "odd_000")
    trial.config = {"objective.image.eps": 0.2, "objective.image.steps": 2}
    with pytest.raises(ValueError, match="a weak attack"):
        plan.work.config(trial.config, "odd_000")
    watcher.started(trial)
    assert opened == ["odd_000"]
    assert watcher.found["odd_000"].status == "running"
    trial.set_status(TuneTrial.ERROR)
    watcher.ended_one(trial)
    assert (watcher.found["odd_000"].status, run.status) == ("failed", "FAILED")


def test_gpu_hours_are_those_that_were_spent(finished, tmp_path, say):
    """A search that goes on with other machines does not count the hours before anew."""
    finished.copy_set(tmp_path)
    plan = Plan(tuned(tmp_path), say)
    plan.folder.mkdir(parents=True)
    (plan.folder / "spent.json").write_text('{"seconds": {"a": 7200.0}, "gpu_seconds": 36000.0}')
    assert trial_watch.Watcher(plan, Untracked(), say, LiveTable((), "search")).gpu_hours() == 10.0


def test_a_budget_counts_the_epoch_that_is_running(finished, tmp_path, say, monkeypatch):
    finished.copy_set(tmp_path)
    resources = ("--cluster.gpus_per_worker", "1", "--cluster.train_workers", "1", "--tune.max_gpu_hours", "0.5")
    (tmp_path / "one.py").write_text('from ray import tune\nSPACE = {"objective.image.steps": tune.choice([4, 2])}\n')
    plan, clock = Plan(tuned(tmp_path, "--tune.space", tmp_path / "one.py", *resources), say), [1000.0]
    plan.folder.mkdir(parents=True)
    monkeypatch.setattr(trial_watch.tracking, "open_run", lambda *_, **__: Untracked())
    monkeypatch.setattr(trial_watch.time, "monotonic", lambda: clock[0])
    watcher = trial_watch.Watcher(plan, Untracked(), say, LiveTable((), "search"))
    trials = []
    for name in ("one", "waits"):
        trial = TuneTrial("stub", stub=True, trial_id=name, trial_name_creator=str)
        trial.config = {"objective.image.steps": 4}
        trials.append(trial)
        watcher.started(trial)
    trials[0].set_status(TuneTrial.RUNNING)
    trials[1].set_status(TuneTrial.PAUSED)
    tell = trial_watch.Tell()
    with trial_watch.watched(watcher):
        clock[0] += 0.4 * 3600
        tell.on_step_end(1, trials)
        assert watcher.gpu_hours() == pytest.approx(0.4)
        assert json.loads((plan.folder / "spent.json").read_text())["seconds"].keys() == {str(trials[0])}
        clock[0] += 0.2 * 3600
        with pytest.raises(trial_watch.BudgetUsedUpError):
            tell.on_step_end(2, trials)


def test_a_dry_run_knows_how_many_trials_there_will_be(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    assert Plan(tuned(tmp_path, "--tune.num_samples", 7), say).trials == 7
    # three eps, and four corners and thirds of an edge, once more
    grid = ["--tune.searcher", "grid", "--tune.scheduler", "none", "--tune.num_samples", 2]
    config = tuned(tmp_path, *grid, "--tune.grid_points", 4)
    Path(config.tune.space).write_text(SPACE.replace("times(0.5, 2)", "tune.choice([0.01, 0.02, 0.03])"))
    assert Plan(config, say).trials == 2 * 3 * 4


def test_the_best_settings_are_trained_anew_with_their_share_of_the_schedule(finished, tmp_path, say):
    """A warm-up that was half of a trial is half of the whole training; each goes on to its last epoch."""
    finished.copy_set(tmp_path)
    config = tuned(tmp_path, "--tune.confirm_seeds", "2", "--tune.epochs", "1")
    cosine = config.training.model_copy(update={"schedule": "cosine", "lr": 0.1, "lr_warmup": 0.25, "patience": 1})
    plan = Plan(config.model_copy(update={"training": cosine}), say)
    best = Trial("little_001", "finished", {"training.lr_warmup": 0.5}, 1, 0.0, {})
    made = champion.anew(plan, best)
    assert {kind: [one.training.lr_warmup for one in configs.values()] for kind, configs in made.items()} == {
        "best": [1.0, 1.0], "start": [0.25, 0.25]
    }  # fmt: skip
    assert [one.training.seed for one in made["best"].values()] == [1, 2]
    assert {one.training.patience for configs in made.values() for one in configs.values()} == {None}
