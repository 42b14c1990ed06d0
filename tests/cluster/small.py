"""Settings small enough for two cores, and servers on loopback."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow_databases import with_database

from dmat_ray import cli
from dmat_ray.config import Config

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data.train_limit", "60", "--data.test_limit", "20"),
    # without LPIPS, whose package takes every process seconds to import
    *("--projection.lpips", "0", "--projection.steps", "6", "--projection.candidates", "200", "--projection.poor_l1", "0.9"),
    *("--projection.batch_size", "20", "--projection.shard_size", "20", "--cluster.projection_actors", "1"),
    *("--training.epochs", "2", "--training.batch_size", "20", "--training.val_examples", "20"),
    *("--training.lr_epochs", "0,2", "--training.lr_values", "0.05,0.01"),
    *("--evaluation.limit", "10", "--evaluation.batch_size", "10", "--evaluation.check_examples", "0"),
    *("--cluster.evaluation_actors", "1"),
]
# slow enough that a kill comes in the middle
DMAT = ["--training.epochs", "3", "--objective.latent.steps", "20"]


def settings(output: Path, *options: Any, preset: tuple[str, ...] = ("demo",)) -> Config:
    """The demo's settings at a size for tests, under `output`."""
    with_database(Path(output))
    config, _ = cli.parse("test", ["--preset", *preset, "--output", str(output), *SMALL, *map(str, options)])
    return config


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_until_answers(url: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 240) -> None:
    """Poll `url` until something answers; fails with the log if the process ends or time is up first."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


class PostgresServer:
    """A real one on loopback, of Debian's package; it does not run as root, so its files are the user postgres's."""

    @staticmethod
    def programs() -> Path | None:
        """Where its programs are, if it is installed."""
        return next((p.parent for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)), None)

    def __init__(self) -> None:
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="dmat_ray_postgres_"))
        self._port = free_ports(1)[0]
        self.uri = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def __enter__(self) -> "PostgresServer":
        programs, data = self.programs(), self._folder / "data"
        assert programs is not None
        if self._user:
            shutil.chown(self._folder, "postgres", "postgres")
        make = [programs / "initdb", "--username", "postgres", "--auth", "trust", "--no-sync", "-D", data]
        subprocess.run(make, check=True, capture_output=True, cwd=self._folder, **self._user)
        options = ["-D", data, "-h", "127.0.0.1", "-p", str(self._port), "-k", self._folder, "-c", "fsync=off"]
        self._process = subprocess.Popen(
            [programs / "postgres", *options], stderr=subprocess.DEVNULL, cwd=self._folder, **self._user
        )
        end = time.monotonic() + 60
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert self._process.poll() is None and time.monotonic() < end, "PostgreSQL does not start"  # noqa: PT018
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGINT)  # its fast shutdown
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class MlflowServer:
    """A real one on loopback that can be killed and started again on the same port; with sqlite behind it or another database.

    With a password it has users, of whom `admin` has that.
    """

    def __init__(self, folder: Path, database: str | None = None, password: str | None = None) -> None:
        self.folder, port = folder, free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self._command += ["--backend-store-uri", database or f"sqlite:///{folder / 'm.db'}"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        # without the processes that run its own jobs, each of which imports all of MLflow
        self._environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._first = urllib.request.Request(f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1")
        if password is not None:
            self._command += ["--app-name", "basic-auth"]
            self._first.add_header("Authorization", f"Basic {base64.b64encode(f'admin:{password}'.encode()).decode()}")
            self._environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": password[::-1], "MLFLOW_AUTH_ADMIN_PASSWORD": password}

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=self._environment
            )
        wait_until_answers(f"{self.url}/health", self._process, self.folder / "log")
        # the first question takes as long as what it has to import, on a busy machine longer than clients wait
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(self._first, timeout=240)

    def kill(self) -> None:
        """With all of its workers: the session that it was started in is its own."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Processes that descend from `pid` and whose title, which Ray sets, holds `title`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes that descend from this one."""
    return processes_below(os.getpid(), "RayTrainWorker")


def start_job(job: str, output: Path, *options: str) -> "subprocess.Popen[str]":
    """A job as a user starts it, with its own Ray unless the options say otherwise."""
    with_database(output)
    command = [sys.executable, str(ROOT / "jobs" / job), "--output", str(output), *SMALL, *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 400) -> None:
    """Poll until `condition`, or fail if the process ends or time is up first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end, "time is up"
        time.sleep(0.1)  # what is looked at are often all processes of a cluster


def history(output: Path) -> list[dict[str, float]]:
    """Each epoch's metrics of the model `dmat`, but for the speed."""
    run = json.loads((output / "models" / "dmat" / "run.json").read_text())
    return [{k: v for k, v in epoch.items() if k != "examples_per_second"} for epoch in run["history"]]


def same_training(output: Path, calm: Path) -> None:
    """Every metric of every epoch is that of the undisturbed run, up to float rounding."""
    assert [h["epoch"] for h in history(output)] == [1, 2, 3]
    for found, expected in zip(history(output), history(calm), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a job that must succeed; returns what it printed."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def torchrun(output: Path, place: Path, *options: str) -> None:
    """jobs/train_local.py with two workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_ports(1)[0])]
    given = ["--preset", "demo", "dmat", *SMALL, "--output", str(output), "--manifold_set", str(place), *options]
    command += [str(ROOT / "jobs" / "train_local.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
