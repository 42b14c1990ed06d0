"""Trainings whose driver or worker is killed -9 go on where they stopped, and end where an undisturbed one does."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from small import DMAT, finish, settings, start_job, train_workers, wait_for

from dmat_ray.cluster import jobs

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def history(output: Path) -> list[dict[str, float]]:
    """Each epoch's metrics of the model, but for the speed."""
    run = json.loads((output / "models" / "dmat" / "run.json").read_text())
    return [{k: v for k, v in epoch.items() if k != "examples_per_second"} for epoch in run["history"]]


def same_training(output: Path, calm: Path) -> None:
    """Every metric of every epoch is that of the undisturbed run, up to float rounding."""
    assert [h["epoch"] for h in history(output)] == [1, 2, 3]
    for found, expected in zip(history(output), history(calm), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_killed_driver_of_a_training_goes_on(tmp_path, finished):
    finished.copy_set(tmp_path)
    address = ray.get_runtime_context().gcs_address
    options = ("--preset", "demo", "dmat", "--name", "dmat", "--cluster.address", address, *DMAT)
    process = start_job("train.py", tmp_path, *options)
    # when the second is there the first is registered: of one that has only been written Ray does not know
    wait_for(lambda: len(list((tmp_path / "train").rglob("checkpoint_*/run.json"))) == 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "models").exists()
    resumed = finish(start_job("train.py", tmp_path, *options))
    assert "epoch 1/3" not in resumed
    assert "epoch 3/3" in resumed
    same_training(tmp_path, finished.output)


def test_killed_worker_is_replaced_and_training_goes_on(tmp_path, finished):
    finished.copy_set(tmp_path)
    lines: list[str] = []
    killed = threading.Event()

    def kill_after_first_epoch() -> None:
        while not any("epoch 1/" in line for line in lines):
            time.sleep(0.05)
        os.kill(train_workers()[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_after_first_epoch, daemon=True).start()
    jobs.train([settings(tmp_path, "--name", "dmat", *DMAT, preset=("demo", "dmat"))], lines.append)
    assert killed.is_set()
    same_training(tmp_path, finished.output)
