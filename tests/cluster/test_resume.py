"""Jobs whose driver is killed -9 go on where they stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import SMALL, settings, train_workers

from dmat_ray.cluster import jobs

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
ROOT = Path(__file__).parents[2]
# slow enough that a kill comes in the middle
PROJECTION = ("--projection.steps", "60", "--projection.batch_size", "5")
TRAINING = (*PROJECTION, "--preset", "demo", "dmat", "--training.epochs", "3", "--objective.latent.steps", "40")


def start(job: str, output: Path, *options: str) -> subprocess.Popen[str]:
    """A job as a user starts it, with its own Ray."""
    command = [sys.executable, str(ROOT / "jobs" / job), "--output", str(output), *SMALL, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Poll until `condition`, or fail if the process ends or time is up first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end, "time is up"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a job that must succeed; returns what it printed."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def calm(ray_session, tmp_path_factory) -> Path:
    """The output folder of a projection and a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("calm")
    jobs.project(settings(output, *PROJECTION), print)
    jobs.train([settings(output, *TRAINING)], print)
    return output


def history(output: Path) -> list[dict[str, float]]:
    """Each epoch's metrics of the model, but for the speed."""
    run = json.loads((output / "models" / "demo_dmat" / "run.json").read_text())
    return [{k: v for k, v in epoch.items() if k != "examples_per_second"} for epoch in run["history"]]


def same_training(output: Path, calm: Path) -> None:
    """Every metric of every epoch is that of the undisturbed run, up to float rounding."""
    assert [h["epoch"] for h in history(output)] == [1, 2, 3]
    for found, expected in zip(history(output), history(calm), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_killed_projection_goes_on(tmp_path, calm):
    shards = tmp_path / "on_manifold_set" / "shards"
    process = start("project.py", tmp_path, *PROJECTION)
    wait_for(lambda: len(list(shards.glob("part-*.parquet"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "on_manifold_set" / "manifest.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in shards.glob("part-*.parquet")}
    assert 2 <= len(before) < 20
    assert "going on" in finish(start("project.py", tmp_path, *PROJECTION))
    assert before == {name: (shards / name).stat().st_mtime_ns for name in before}
    left, right = (pq.read_table(o / "on_manifold_set" / "shards").sort_by("id") for o in (tmp_path, calm))
    assert left.to_pydict() == right.to_pydict()


def test_killed_driver_of_a_training_goes_on(tmp_path, calm):
    shutil.copytree(calm / "on_manifold_set", tmp_path / "on_manifold_set")
    process = start("train.py", tmp_path, *TRAINING)
    wait_for(lambda: any((tmp_path / "train").rglob("checkpoint_*/run.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "models").exists()
    resumed = finish(start("train.py", tmp_path, *TRAINING))
    assert "epoch 1/3" not in resumed
    assert "epoch 3/3" in resumed
    same_training(tmp_path, calm)


def test_killed_worker_is_replaced_and_training_goes_on(tmp_path, calm):
    shutil.copytree(calm / "on_manifold_set", tmp_path / "on_manifold_set")
    lines: list[str] = []
    killed = threading.Event()

    def kill_after_first_epoch() -> None:
        while not any("epoch 1/" in line for line in lines):
            time.sleep(0.05)
        os.kill(train_workers()[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_after_first_epoch, daemon=True).start()
    jobs.train([settings(tmp_path, *TRAINING)], lines.append)
    assert killed.is_set()
    same_training(tmp_path, calm)
