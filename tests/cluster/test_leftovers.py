"""What unfinished trainings have left, of whichever group. In test_resume.py one is killed, and another goes on from it."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train.torch
from kills import killed_when_removed
from ray.train import CheckpointConfig, RunConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from searches import tuned
from small import settings

from dmat_ray.cluster import jobs, leftovers, train, tune, workers
from dmat_ray.cluster.context import RayContext, next_name, stored_checkpoints
from dmat_ray.cluster.leftovers import Leftover, left_by_others
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.storage import at, lease
from dmat_ray.storage.lease import sole
from dmat_ray.training import trained_models, trainer

pytestmark = pytest.mark.cluster


def trained(config: Config, folder: Path, group: Path) -> None:
    """A training in this process, whose last checkpoint is put where Ray Train keeps them; and one of the epoch before."""
    data, sha = open_set(trained_models.set_folder(config), "train"), generators.fingerprint(config.generator.path)
    folder.mkdir()
    trainer.train(config, data, generators.load_configured(config.generator, "cpu"), sha, LocalContext(folder))
    for second in (1, 2):
        place = shutil.copytree(folder / "checkpoint", group / f"checkpoint_2026-01-01_00-00-0{second}")
        run = json.loads((place / "run.json").read_text())
        (place / "run.json").write_text(json.dumps({**run, "epoch": second, "finished": second == 2}))


def test_a_later_checkpoint_has_a_later_name_whatever_the_clock_says(monkeypatch):
    for zone in ("Europe/Berlin", "America/Los_Angeles"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        made = next_name(None)
        told = datetime.strptime(made, "checkpoint_%Y-%m-%d_%H-%M-%S.%f").replace(tzinfo=UTC).timestamp()
        assert abs(told - time.time()) < 60, "in UTC, wherever the machine is"
    monkeypatch.undo()
    time.tzset()
    assert next_name("checkpoint_2020-01-01_00-00-00.000000") >= made
    for ahead in ("checkpoint_2999-12-31_23-59-59.999999", "checkpoint_2999"):  # of a clock that was ahead; of nobody
        first = next_name(ahead)
        assert ahead < first < next_name(first)


def taking_over(parent: Path, mark: str, lines: list[str]) -> Callable[[str], None]:
    """Notes lines; from the one with this mark on another run's name is in the lease, also after a beat that was under way."""
    taken: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        taken.extend([line] if mark in line else [])
        for file in parent.glob(".*.lease/writer.json") if taken else []:
            file.write_text(json.dumps({**json.loads(file.read_text()), "owner": "another"}))

    return say


def test_a_training_that_another_run_has_taken_over_ends(tmp_path, finished, ray_session, monkeypatch):
    """The other one's file is all that it sees, as after a suspension."""
    finished.copy_set(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)
    config = settings(tmp_path, "--training.epochs", "200", "--cluster.train_workers", "1")
    lines: list[str] = []
    say = taking_over(tmp_path / "train", "epoch 1/200", lines)
    with pytest.raises(UserError, match=r"another run has taken over '.*' while this one did not answer; this one ends"):
        train.train_models([config], say)
    assert not any("epoch 199/200" in line for line in lines)
    assert not trained_models.model_folder(config).is_dir()
    (found,) = (tmp_path / "train").glob(f"{config.name}-*")
    assert Leftover(at(found)).of(config), "the other one goes on from there"


def test_a_search_that_another_run_has_taken_over_ends(tmp_path, finished, ray_session, monkeypatch):
    finished.copy_set(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)
    more = ["--tune.searcher", "random", "--tune.num_samples", 1, "--tune.epochs", 60, "--cluster.train_workers", 1]
    lines: list[str] = []
    say = taking_over(tmp_path / "tune", "epoch 1/60", lines)
    with pytest.raises(UserError, match=r"another run has taken over '.*' while this one did not answer; this one ends"):
        tune.search(Plan(tuned(tmp_path, *more, "--tune.evaluate", False), say), say)
    assert not any("epoch 60/60" in line or "best is" in line for line in lines)
    assert not (tmp_path / "models").exists()


@pytest.mark.exhaustive  # one that is taken over among its trials above
def test_a_search_that_is_taken_over_after_its_trials_publishes_nothing(tmp_path, finished, ray_session, monkeypatch):
    """While it trains the best settings anew, which may take longer than all of its trials."""
    finished.copy_set(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)
    more = ["--tune.searcher", "random", "--tune.num_samples", 1, "--tune.epochs", 1, "--cluster.train_workers", 1]
    lines: list[str] = []
    say = taking_over(tmp_path / "tune", "training the best settings and those of the start anew", lines)
    config = tuned(tmp_path, *more, "--tune.confirm_seeds", 1, "--training.epochs", 60, "--tune.evaluate", False)
    with pytest.raises(UserError, match=r"another run has taken over '.*' while this one did not answer; this one ends"):
        tune.search(Plan(config, say), say)
    assert any("anew" in line for line in lines)
    assert not list((tmp_path / "models").glob("*_seed1"))
    assert not list((tmp_path / "tune").glob("*/result.json"))


def test_a_model_finds_its_checkpoints_in_the_folder_of_any_group(tmp_path, finished):
    finished.copy_set(tmp_path)
    mine = settings(tmp_path, "--name", "mine", preset=("demo", "standard"))
    group = tmp_path / "train" / "2_models-0123456789ab"
    group.mkdir(parents=True)
    trained(mine, tmp_path / "local", group)
    (tmp_path / "train" / "encoder-0123456789ab").mkdir()
    newest, older = sorted(map(at, group.iterdir()), key=str, reverse=True)

    found = Leftover(at(group))
    assert found.of(mine) == [newest, older]
    assert found.final(mine) == newest
    assert [metrics["epoch"] for metrics in found.history(mine)] == list(range(1, mine.training.epochs + 1))
    for other in (
        settings(tmp_path, "--name", "mine", "--training.weight_decay", "0.1", preset=("demo", "standard")),
        settings(tmp_path, "--name", "other", preset=("demo", "standard")),
    ):
        assert found.of(other) == []
        assert found.final(other) is None
        assert found.history(other) == []

    own = at(tmp_path / "train" / "mine-ba9876543210")
    (beside,) = left_by_others([mine], own)
    assert beside.folder == at(group)
    other = settings(tmp_path, "--name", "other", preset=("demo", "standard"))
    assert list(left_by_others([other], at(tmp_path / "train" / "other-ba9876543210"))) == []

    assert not found.is_used_up(str(tmp_path))
    trained_models.publish(newest, trained_models.model_folder(mine))
    assert found.is_used_up(str(tmp_path))

    kept = shutil.copytree(group, tmp_path / "kept")
    unfinished = left(tmp_path / "train" / "2_models-ba9876543210", 1, "other", 3)
    said: list[str] = []
    with sole(group):
        jobs.train([mine], said.append)
        assert group.is_dir(), "another job is at work there"
    jobs.train([mine], said.append)
    assert said == 2 * ["mine: is trained already and unchanged, nothing to do"]
    assert not group.exists(), "who published it was killed before this"
    own = train.training_folder([mine]).local
    left(own, 1, "mine", 3)
    train.train_models([mine], said.append)
    assert said[-1] == "another job has meanwhile trained this"
    assert not own.exists()
    assert Path(unfinished).is_dir()
    kept.rename(group)

    content = (group / newest.name / "model.safetensors").read_bytes()
    (group / newest.name / "model.safetensors").write_bytes(content[:-1])
    assert found.final(mine) is None, "it is damaged"
    (group / newest.name / "run.json").write_text(json.dumps({"epoch": 2})[:5])
    assert Leftover(at(group)).of(mine) == [older]


@pytest.mark.parametrize("content", ['{"version": 1, "epoch": 7}', '{"version": 2, "epo', None])
def test_checkpoints_that_do_not_tell_whose_they_are_are_left_to_their_training(tmp_path, content):
    """Those of another version of this program, which a rerun with that one goes on from, and damaged ones."""
    config, train = settings(tmp_path, "--name", "mine"), tmp_path / "train"
    place = train / "2_models-0123456789ab" / "checkpoint_2026-01-01_00-00-01"
    place.mkdir(parents=True)
    if content is not None:
        (place / "run.json").write_text(content)
    assert list(left_by_others([config], at(train / "mine-ba9876543210"))) == []
    place.rename(tmp_path / "elsewhere")
    (empty,) = left_by_others([config], at(train / "mine-ba9876543210"))
    assert empty.is_used_up(str(tmp_path)), "there is nothing in it"


def left(group: Path, second: int, name: str, epoch: int, step: int = 0) -> str:
    """What a training that was killed after so many epochs, and steps of the next, has left in the folder of its group."""
    place = group / f"checkpoint_2026-01-01_00-00-0{second}"
    place.mkdir(parents=True)
    history = [{"epoch": float(k)} for k in range(1, epoch + 1)]
    run = {"version": 2, "config": {"name": name}, "epoch": epoch, "step": step, "finished": False, "history": history}
    (place / "run.json").write_text(json.dumps(run))
    return str(place)


@pytest.mark.parametrize("removed", range(4))
@pytest.mark.parametrize("by", ["another", "its own"])
def test_a_group_whose_driver_is_killed_while_it_removes_it_is_removed_by_the_next(tmp_path, monkeypatch, by, removed):
    """Of two checkpoints so many files are gone by then: nobody finds a part of one, and nothing stays for good."""
    storage, mine = tmp_path / "train", settings(tmp_path, "--name", "a")
    group = storage / "2_models-0123456789ab"
    for second, name in enumerate("ab"):
        (Path(left(group, second, name, 3)) / "state.pt").write_text("state")
    monkeypatch.setattr(leftovers, "is_trained", lambda config: True)
    monkeypatch.setattr(train, "is_trained", lambda config: True)
    monkeypatch.setattr(train, "training_folder", lambda todo: at(group))
    monkeypatch.setattr(train, "_key", lambda config: "")
    with killed_when_removed(removed, "run.json", "state.pt"):
        leftovers.sweep(at(storage), [mine]) if by == "another" else train.train_models([mine], print)
    assert not any(len(list(place.local.iterdir())) == 1 for place in stored_checkpoints(group))
    leftovers.sweep(at(storage), [mine])
    assert not storage.exists() or not list(storage.iterdir())


def test_a_model_goes_on_from_its_furthest_checkpoint_whichever_groups_have_them(tmp_path, monkeypatch):
    """Nothing is started here: what the workers would be given, and what MLflow is told of the epochs before."""
    a, b = (settings(tmp_path, "--name", name) for name in "ab")
    own = tmp_path / "train" / "2_models-aaaaaaaaaaaa"
    damaged = own / "checkpoint_2026-01-01_00-00-09"
    mine = [left(own, 2, "a", 3, step=5), left(own, 1, "a", 3)]
    damaged.mkdir()
    others = [left(tmp_path / "train" / "2_models-bbbbbbbbbbbb", 4, "a", 3, step=2), left(tmp_path / "train" / "a-c", 3, "a", 7)]
    left(tmp_path / "train" / "b-c", 3, "b", 9)
    given, told = [], []

    def fit(worker, given_settings, *_, **__):
        given.append(given_settings)
        raise InterruptedError

    run = SimpleNamespace(metrics=lambda values, step: told.append(step))
    monkeypatch.setattr(train, "training_folder", lambda todo: at(own))
    monkeypatch.setattr(train, "_key", lambda config: "")
    monkeypatch.setattr(train, "read_manifest", lambda place: {"data": {}})
    monkeypatch.setattr(train, "listen", lambda *_: contextlib.nullcontext("mailbox"))
    monkeypatch.setattr(train.tracking, "tracked", lambda *_, **__: contextlib.nullcontext(run))
    monkeypatch.setattr(train.session, "await_machines", lambda *_, **__: None)
    monkeypatch.setattr(train.workers, "fit", fit)
    monkeypatch.setattr(leftovers, "is_of", lambda *_: True)
    with pytest.raises(InterruptedError):
        train.train_models([a, b], print)
    assert told == [*range(1, 8), *range(1, 10)]

    monkeypatch.setattr(RayContext, "checkpoints", lambda self: [str(place) for place in stored_checkpoints(own)])
    context = object.__new__(train._NamedContext)
    context._name, context._left = "a", given[0]["left"]["a"]
    assert context.checkpoints() == [str(damaged), others[1], mine[0], others[0], mine[1]]


def test_what_another_group_has_finished_is_no_more_trained(tmp_path, monkeypatch):
    """The newest checkpoint of the group is of a, which has meanwhile ended in another group."""
    trained = []
    latest = left(tmp_path / "2_models-aaaaaaaaaaaa", 1, "a", 3)
    context = SimpleNamespace(checkpoints=lambda: [latest], device="cpu", of_rank_zero=lambda value: value)
    monkeypatch.setattr(train, "RayContext", lambda *_: context)
    monkeypatch.setattr(train, "_NamedContext", lambda *_, **__: context)
    monkeypatch.setattr(train.manifold_set, "open_set", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(train.generators, "load_configured", lambda *_: None)
    monkeypatch.setattr(train, "train", lambda config, *_, **__: trained.append(config.name))
    configs = {name: settings(tmp_path, "--name", name).to_json() for name in "abc"}
    for todo, expected in (("bc", ["b", "c"]), ("abc", ["a", "b", "c"]), ("bac", ["a", "c"])):
        trained.clear()
        train._train({"configs": [configs[name] for name in todo], "mailbox": "mailbox", "set": "set"})
        assert trained == expected


@pytest.mark.parametrize(
    ("damage", "known", "stored"),
    [
        (lambda noted, newest: None, [3, 4], [4, 3, 1, 0]),
        (lambda noted, newest: noted.unlink(), [], [4, 3, 1]),
        (lambda noted, newest: noted.write_bytes(b""), [], [4, 3, 1]),
        (lambda noted, newest: noted.write_text('["checkpoint_results"]'), [], [4, 3, 1]),
        (lambda noted, newest: noted.write_text('{"ray_version": "2.0", "checkpoint_results": []}'), [], [4, 3, 1]),
        (lambda noted, newest: shutil.rmtree(newest), [], [3, 1]),
    ],
    ids=["none", "lost", "empty", "list", "older", "removed"],
)
def test_a_training_goes_on_whatever_has_become_of_what_ray_notes(tmp_path, monkeypatch, damage, known, stored):
    """Ray's own code begins, but for the workers: 3 and 4 are registered, of 4 a file is damaged, 0 and 1 are nobody's."""

    class Trainer:
        def __init__(self, worker, *, run_config, **_):
            storage = StorageContext(run_config.storage_path, run_config.name, run_config.storage_filesystem)
            self.manager = CheckpointManager(run_config.checkpoint_config, storage)
            self.storage = storage

        def fit(self):
            return [int(Path(result.checkpoint.path).name.split("_")[1]) for result in self.manager._checkpoint_results]

    def sealed(number):
        place = tmp_path / "dmat" / f"checkpoint_{number}"
        place.mkdir(parents=True)
        (place / "model").write_text(str(number))
        checkpoint.seal(place, "run.json", {})
        return place

    async def register():
        trainer = Trainer(None, run_config=RunConfig(name="dmat", storage_path=str(tmp_path), checkpoint_config=two))
        for number in (3, 4):
            kept = ray.train.Checkpoint(str(sealed(number)), trainer.storage.storage_filesystem)
            trainer.manager.register_checkpoint(_TrainingReport(checkpoint=kept, metrics={}, validation=False))

    two = CheckpointConfig(num_to_keep=2)
    asyncio.run(register())
    sealed(0)
    sealed(1)
    newest = tmp_path / "dmat" / "checkpoint_4"
    (newest / "model").write_text("half")
    damage(tmp_path / "dmat" / "checkpoint_manager_snapshot.json", newest)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    assert workers.fit(print, {}, settings(tmp_path).cluster, tmp_path / "dmat", print, keep=2) == known
    assert [int(place.name.split("_")[1]) for place in stored_checkpoints(tmp_path / "dmat")] == stored
