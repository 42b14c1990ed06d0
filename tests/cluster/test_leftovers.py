"""What unfinished trainings have left, of whichever group. In test_resume.py one is killed, and another goes on from it."""

import contextlib
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from searches import tuned
from small import settings

from dmat_ray import lease, models, trainer
from dmat_ray.cluster import train, tune
from dmat_ray.cluster.context import next_name
from dmat_ray.cluster.leftovers import Leftover, left_by_others
from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.lease import sole
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.storage import at

pytestmark = pytest.mark.cluster


def trained(config: Config, folder: Path, group: Path) -> None:
    """A training in this process, whose last checkpoint is put where Ray Train keeps them; and one of the epoch before."""
    data, sha = open_set(models.set_folder(config), "train"), generators.fingerprint(config.generator.path)
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


def test_a_training_that_another_run_has_taken_over_ends(tmp_path, finished, ray_session, monkeypatch):
    """The other one's file is all that it sees, as after a suspension."""
    finished.copy_set(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)
    config = settings(tmp_path, "--training.epochs", "200", "--cluster.train_workers", "1")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "epoch 1/200" in line:
            (file,) = (tmp_path / "train").glob(".*.lease/writer.json")
            file.write_text(json.dumps({**json.loads(file.read_text()), "owner": "another"}))

    with pytest.raises(UserError, match=r"another run has taken over '.*' while this one did not answer; this one ends"):
        train.train_models([config], say)
    assert not any("epoch 199/200" in line for line in lines)
    assert not models.model_folder(config).is_dir()
    (found,) = (tmp_path / "train").glob(f"{config.name}-*")
    assert Leftover(at(found)).of(config), "the other one goes on from there"


def test_a_search_that_another_run_has_taken_over_ends(tmp_path, finished, ray_session, monkeypatch):
    finished.copy_set(tmp_path)
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)
    more = ["--tune.searcher", "random", "--tune.num_samples", 1, "--tune.epochs", 60, "--cluster.train_workers", 1]
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "epoch 1/60" in line:
            (file,) = (tmp_path / "tune").glob(".*.lease/writer.json")
            file.write_text(json.dumps({**json.loads(file.read_text()), "owner": "another"}))

    with pytest.raises(UserError, match=r"another run has taken over '.*' while this one did not answer; this one ends"):
        tune.search(tuned(tmp_path, *more, "--tune.evaluate", False), say)
    assert not any("epoch 60/60" in line or "best is" in line for line in lines)
    assert not (tmp_path / "models").exists()


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
    with contextlib.ExitStack() as stack:
        (beside,) = left_by_others([mine], own, stack)
        assert beside.folder == at(group)
    with sole(group), contextlib.ExitStack() as stack:
        assert list(left_by_others([mine], own, stack)) == [], "another job is at work there"
    with contextlib.ExitStack() as stack:
        other = settings(tmp_path, "--name", "other", preset=("demo", "standard"))
        assert list(left_by_others([other], at(tmp_path / "train" / "other-ba9876543210"), stack)) == []
        with sole(group):
            pass  # nor is its own training kept from it

    assert not found.is_used_up(str(tmp_path))
    models.publish(newest, models.model_folder(mine))
    assert found.is_used_up(str(tmp_path))

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
    with contextlib.ExitStack() as stack:
        assert list(left_by_others([config], at(train / "mine-ba9876543210"), stack)) == []
    place.rename(tmp_path / "elsewhere")
    with contextlib.ExitStack() as stack:
        (empty,) = left_by_others([config], at(train / "mine-ba9876543210"), stack)
        assert empty.is_used_up(str(tmp_path)), "there is nothing in it"
