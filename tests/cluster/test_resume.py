"""Trainings whose driver or worker is killed -9 go on where they stopped, and end where an undisturbed one does."""

import contextlib
import json
import os
import re
import signal
import threading
import time

import pytest
import ray
import ray.train
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from searches import tuned
from small import DMAT, finish, history, same_training, settings, start_job, torchrun, train_workers, wait_for

from dmat_ray.cluster import jobs, tune
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.cluster.train import training_folder
from dmat_ray.errors import UserError
from dmat_ray.storage.lease import sole

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


@pytest.mark.exhaustive
def test_killed_driver_of_a_training_goes_on_from_a_checkpoint_that_is_whole(tmp_path, finished):
    finished.copy_set(tmp_path)
    address = ray.get_runtime_context().gcs_address
    options = ("--preset", "demo", "dmat", "--name", "dmat", "--cluster.address", address, *DMAT)
    process = start_job("train.py", tmp_path, *options)
    # when the second is there the first is registered: of one that has only been written Ray does not know
    wait_for(lambda: len(list((tmp_path / "train").rglob("checkpoint_*/run.json"))) == 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "models").exists()
    (tmp_path / "mlflow.db").unlink()  # as if it had been told nothing
    newest = max((tmp_path / "train").rglob("checkpoint_*/state.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    (noted,) = (tmp_path / "train").rglob("checkpoint_manager_snapshot.json")
    noted.write_bytes(b"")  # as a full disk leaves what is written in place
    resumed = finish(start_job("train.py", tmp_path, *options))
    assert f"'{newest.parent}' is damaged: its state.pt is not what was written; going back to the one before" in resumed
    assert "going on with epoch 2, with 2 workers" in resumed
    assert "epoch 1/3" not in resumed
    assert "epoch 3/3" in resumed
    same_training(tmp_path, finished.output)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2, 3]


def test_a_job_that_is_submitted_twice_is_refused(tmp_path, finished, say):
    """While the first is at work; a process that was killed leaves its lease, which nobody heeds (the tests around this one)."""
    finished.copy_set(tmp_path)
    training, searching = settings(tmp_path, preset=("demo", "dmat")), tuned(tmp_path)
    for lease, again in (
        (sole(training_folder([training])), lambda: jobs.train([training], say)),
        (sole(Plan(searching, say).folder), lambda: tune.search(Plan(searching, say), say)),
    ):
        with lease, pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*; wait until it ends"):
            again()


@pytest.mark.exhaustive  # one kill also in test_submission.py, of one worker
@pytest.mark.parametrize("kills", [1, 2])
def test_worker_killed_within_an_epoch_is_replaced_and_training_goes_on(tmp_path, finished, kills):
    """Ray with a killed worker ends where torchrun does undisturbed: ten steps an epoch, each with two dozen of an attack.

    A second kill is one more than `max_failures` says, but the first attempt has come further.
    """
    finished.copy_set(tmp_path)
    slow = ("--training.epochs", str(kills), "--training.batch_size", "4", "--objective.latent.steps", "24", "--name", "dmat")
    torchrun(tmp_path / "calm", tmp_path / "on_manifold_set", *slow)
    lines: list[str] = []
    killed = threading.Event()

    def kill_workers() -> None:
        def steps() -> list[int]:
            found = []
            for path in tmp_path.glob("train/*/checkpoint_*/run.json"):
                with contextlib.suppress(FileNotFoundError):  # an older one, which has gone meanwhile
                    run = json.loads(path.read_text())
                    found.append(10 * run["epoch"] + run["step"])
            return found

        before = 0
        for kill in range(kills):
            # when the second of an attempt is there the first is registered
            while len(new := [step for step in steps() if step > before]) < 2:
                time.sleep(0.05)
            assert kill or all(0 < step < 9 for step in new), "the first is killed within its first epoch"
            before = max(new)
            os.kill(train_workers()[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_workers, daemon=True).start()
    often = ("--training.checkpoint_minutes", "0.001", "--cluster.max_failures", "1")
    jobs.train([settings(tmp_path, *slow, *often, preset=("demo", "dmat"))], lines.append)
    assert killed.is_set()
    assert any("going on with epoch 1, after step" in line for line in lines)
    assert not any("warning" in line for line in lines)
    assert sum("failed 2 times, and have come further: going on" in line for line in lines) == kills - 1
    assert [h["epoch"] for h in history(tmp_path)] == list(range(1, kills + 1))
    for found, expected in zip(history(tmp_path), history(tmp_path / "calm"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("ends", [pytest.param("it fails", marks=pytest.mark.exhaustive), "it is stopped"])
def test_what_a_group_has_finished_is_kept_and_the_next_goes_on_in_another_group(tmp_path, finished, say, lines, ends):
    finished.copy_set(tmp_path)
    once = ("--cluster.max_failures", "0")
    standard = settings(tmp_path, "--name", "standard", *once, preset=("demo", "standard"))
    dmat = settings(tmp_path, "--name", "dmat", *DMAT, *once, preset=("demo", "dmat"))
    before = signal.getsignal(signal.SIGINT)

    def end_in_the_second_epoch_of_the_second() -> None:
        def epochs() -> set[tuple[str, int]]:
            runs = [json.loads(path.read_text()) for path in tmp_path.glob("train/*/checkpoint_*/run.json")]
            return {(run["config"]["name"], run["epoch"]) for run in runs}

        while ("dmat", 1) not in epochs():
            time.sleep(0.05)
        if ends == "it fails":
            os.kill(train_workers()[0].pid, signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_in_the_second_epoch_of_the_second, daemon=True).start()
    with pytest.raises(ray.train.TrainingFailedError if ends == "it fails" else SystemExit):
        jobs.train([standard, dmat], say)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["standard"]
    assert ("finished and stored: standard" in lines) == (ends == "it is stopped")
    trained, calm = (load_file(place / "models" / "standard" / "model.safetensors") for place in (tmp_path, finished.output))
    assert all(torch.allclose(trained[name], calm[name], rtol=1e-3, atol=1e-5) for name in calm)
    assert [path.name[:9] for path in (tmp_path / "train").iterdir()] == ["2_models-"]

    del lines[:]
    jobs.train([dmat], say)
    assert any(re.search("dmat: going on with epoch [23]", line) for line in lines)
    assert not any("epoch 1/3" in line for line in lines)
    same_training(tmp_path, finished.output)
    assert list((tmp_path / "train").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C does what it did before a training"
