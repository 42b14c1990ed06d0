"""MLflow's database in an output folder, without Ray: killed while it is made, made by several at once, damaged."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow_databases import with_database

from dmat_ray import settings
from dmat_ray.cluster import tracking
from dmat_ray.cluster.mlflow_client import answering_client
from dmat_ray.errors import UserError
from dmat_ray.storage import at

pytestmark = pytest.mark.slow

JOB = """
import os, signal, sys
import sqlalchemy
from dmat_ray import settings
from dmat_ray.cluster import tracking

name, folder, end = sys.argv[1], sys.argv[2], int(sys.argv[3])

@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
def stop(connection, cursor, statement, *_):
    if end and statement.startswith("ALTER TABLE _alembic_tmp_tags RENAME"):
        os.kill(os.getpid(), end)

import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
with tracking.tracked(settings("demo", output=folder), name, "train") as run:
    run.metrics({"epoch": 1.0}, step=1)
"""


def job(name: str, folder: Path, end: int = 0) -> "subprocess.Popen[str]":
    """A process that tracks something once a line comes, and gets a signal to `end` it halfway through MLflow's migrations."""
    command = [sys.executable, "-c", JOB, name, str(folder), str(int(end))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def runs(folder: Path) -> list[str]:
    client = mlflow.MlflowClient(uri(folder))
    found = client.search_runs([client.get_experiment_by_name("dmat_ray demo").experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    return sorted(run.info.run_name for run in found)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".mlflow")]


@pytest.mark.parametrize(
    "end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)], ids=["SIGKILL", "Ctrl-C"]
)
def test_a_job_that_ends_while_it_makes_the_database_does_not_break_the_next(tmp_path, end):
    killed = job("killed", tmp_path, end)
    _, said = killed.communicate("\n", timeout=300)
    assert killed.returncode == -end, said
    left = hidden(tmp_path)
    assert bool(left) == (end == signal.SIGKILL)
    with tracking.tracked(settings("demo", output=str(tmp_path)), "after", "train") as run:
        run.metrics({"epoch": 1.0}, step=1)
    assert runs(tmp_path) == ["train: after"]
    assert hidden(tmp_path) == left, "somebody may be at work on it"
    for path in left:
        os.utime(path, (0, 0))
    answering_client(uri(tmp_path), at(tmp_path))
    assert not hidden(tmp_path)


def test_jobs_that_begin_at_once_in_an_empty_folder_all_track(tmp_path):
    jobs = [job(name, tmp_path) for name in "ab"]
    for one in jobs:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in jobs:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate(timeout=300)[1] for one in jobs]
    assert [one.returncode for one in jobs] == [0, 0], said
    assert runs(tmp_path) == ["train: a", "train: b"]
    assert not hidden(tmp_path)


def refused(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("link", [os.link, pytest.param(refused, marks=pytest.mark.exhaustive)], ids=["links", "no links"])
def test_a_database_that_is_there_by_now_is_kept(tmp_path, monkeypatch, link):
    """Made by another process, which was faster."""
    faster = []

    def late(source: Path, target: Path) -> None:
        if not faster:
            faster.append(target)
            with_database(tmp_path)
            mlflow.MlflowClient(uri(tmp_path)).create_experiment("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    client = answering_client(uri(tmp_path), at(tmp_path))
    assert faster == [tmp_path / "mlflow.db"]
    assert client.get_experiment_by_name("theirs") is not None
    assert not hidden(tmp_path)


def halfway(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")


def no_database(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


@pytest.mark.parametrize("damage", [halfway, no_database])
def test_a_database_that_cannot_be_opened_is_named_with_the_way_out(tmp_path, monkeypatch, damage: Callable[[Path], None]):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # it would try for minutes
    damage(tmp_path / "mlflow.db")
    with pytest.raises(UserError) as told:
        answering_client(uri(tmp_path), at(tmp_path))
    assert str(told.value).startswith(f"'{tmp_path / 'mlflow.db'}' cannot be opened as MLflow's database: ")
    assert str(told.value).endswith("; results are not in it: move it away, and a new one is made")
    assert "\n" not in str(told.value)


def test_a_database_that_another_process_holds_is_not_called_broken(tmp_path, monkeypatch):
    with_database(tmp_path)
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(UserError, match=r"mlflow\.db' does not answer: .*locked.*; another process may hold it") as told:
            answering_client(uri(tmp_path), at(tmp_path))
    finally:
        holder.close()
    assert "move it away" not in str(told.value)


def test_a_folder_that_cannot_hold_a_database_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)
    with pytest.raises(UserError, match=r"MLflow's database '.*/none/mlflow\.db' cannot be made: .*; give an --output that"):
        answering_client("sqlite:////dev/null/none/mlflow.db", at("/dev/null/none"))
