"""Jobs whose driver is killed -9 go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small import SMALL, settings

from dmat_ray.cluster import jobs

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


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


@pytest.mark.usefixtures("ray_session")
def test_killed_drivers_are_resumed(tmp_path, say):
    """Projection is killed after its first shards, training after its first checkpoint; both end as if they had not been."""
    # slow enough that the kill comes in the middle
    projection = ("--projection.steps", "60", "--projection.batch_size", "5")
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    shards = killed / "on_manifold_set" / "shards"

    process = start("project.py", killed, *projection)
    wait_for(lambda: len(list(shards.glob("part-*.parquet"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "on_manifold_set" / "manifest.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in shards.glob("part-*.parquet")}
    assert 2 <= len(before) < 20
    assert "going on" in finish(start("project.py", killed, *projection))
    assert before == {name: (shards / name).stat().st_mtime_ns for name in before}

    jobs.project(settings(calm, *projection), say)
    left, right = (pq.read_table(o / "on_manifold_set" / "shards").sort_by("id") for o in (killed, calm))
    assert left.to_pydict() == right.to_pydict()

    training = (*projection, "--preset", "demo", "dmat", "--training.epochs", "3", "--objective.latent.steps", "40")
    process = start("train.py", killed, *training)
    wait_for(lambda: any((killed / "train").rglob("checkpoint_*/run.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list((killed / "models").glob("*")) if (killed / "models").exists() else True
    resumed = finish(start("train.py", killed, *training))
    assert "epoch 1/3" not in resumed
    assert "epoch 3/3" in resumed

    (model,) = jobs.train(
        [settings(calm, *projection, "--training.epochs", 3, "--objective.latent.steps", 40, preset=("demo", "dmat"))], say
    )
    expected = json.loads((model / "run.json").read_text())["history"]
    history = json.loads((killed / "models" / "demo_dmat" / "run.json").read_text())["history"]
    assert [h["epoch"] for h in history] == [1, 2, 3]
    assert [h["train_loss"] for h in history] == pytest.approx([h["train_loss"] for h in expected], rel=1e-4)
