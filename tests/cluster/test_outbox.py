"""The entries that wait for a server, without one: several jobs of one output, and what stores of artifacts answer."""

import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from dmat_ray.cluster import outbox
from dmat_ray.cluster.outbox import Outbox
from dmat_ray.storage import at
from dmat_ray.storage.files import text_digest

pytestmark = pytest.mark.cluster
URI = "http://server"


class Client:
    """As much of MLflow's as the outbox needs for tags and files; `answer` is called with what it is sent."""

    answer: Any
    sent: list[str]
    is_down = False

    def __init__(self, uri: str) -> None:
        assert uri == URI

    def search_experiments(self, **_: Any) -> None:
        if self.is_down:
            raise answered(502)

    def set_tag(self, run: str, key: str, value: str) -> None:
        self._take(f"{key}={value}")

    def log_artifact(self, run: str, path: str, folder: str) -> None:
        self._take(Path(path).name)

    def _take(self, what: str) -> None:
        type(self).answer(what)
        self.sent.append(what)


@pytest.fixture
def client(monkeypatch) -> type[Client]:
    """The class of MLflow's client."""

    class Fresh(Client):
        answer, sent = staticmethod(lambda what: None), []

    monkeypatch.setattr(mlflow, "MlflowClient", Fresh)
    monkeypatch.setattr(outbox, "PAUSES_S", (0.001,))
    return Fresh


def tag(key: str, value: str = "1") -> dict[str, Any]:
    return {"do": "tag", "run": "handle", "id": "id", "key": key, "value": value}


def artifact(path: Path) -> dict[str, Any]:
    return {"do": "artifact", "run": "handle", "id": "id", "path": str(path), "folder": None}


def test_an_experiment_that_another_job_has_just_made_is_used(tmp_path, monkeypatch):
    """Both have looked for it, and found nothing."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    box, other = Outbox(uri, at(tmp_path), 60), mlflow.MlflowClient(uri)
    look, looked = box._client.get_experiment_by_name, []

    def late(name):
        looked.append(name)
        if len(looked) == 1:
            assert look(name) is None
            other.create_experiment(name)
            return None
        return look(name)

    monkeypatch.setattr(box._client, "get_experiment_by_name", late)
    create = {"do": "create", "run": "handle", "experiment": "new", "artifacts": None, "key": "k", "name": "n", "parent": None}
    box.put({**create, "tags": {}, "params": {"a": "1"}, "time": 0})
    found = other.get_run(box.id_of("handle"))
    assert found.info.experiment_id == other.get_experiment_by_name("new").experiment_id
    assert found.data.params == {"a": "1"}


def silent(what: str) -> None:
    raise ConnectionError("nobody is there")


def no_files_soon(folder: Path) -> bool:
    end = time.monotonic() + 60
    while list(folder.glob("mlflow_unsent_*")) and time.monotonic() < end:
        time.sleep(0.01)
    return not list(folder.glob("mlflow_unsent_*"))


def test_jobs_of_one_output_do_not_lose_what_others_have_kept(client, tmp_path, capfd):
    client.answer = staticmethod(silent)
    first, second = (Outbox(URI, at(tmp_path), 0.0) for _ in range(2))
    for box, key in ((first, "a"), (second, "b"), (first, "c")):
        box.put(tag(key))
        box.flush()
    # b's is not known to a; a's second file holds what the first held
    files = sorted(tmp_path.glob("mlflow_unsent_*.jsonl"))
    kept = sorted([json.loads(line)["key"] for line in file.read_text().splitlines()] for file in files)
    assert kept == [["a", "c"], ["b"]]
    third = Outbox(URI, at(tmp_path), 0.0)
    third.put(tag("d"))
    third.flush()
    assert len(list(tmp_path.glob("mlflow_unsent_*.jsonl"))) == 1, "all that waits, in one"
    first.put(tag("e"))
    first.flush()
    client.answer = staticmethod(lambda what: None)
    fourth = Outbox(URI, at(tmp_path), 60.0)
    fourth.flush()
    assert {f"{key}=1" for key in "abcde"} <= set(client.sent)
    assert no_files_soon(tmp_path)
    assert "are kept in" in capfd.readouterr().err


class S3UploadFailedError(Exception):
    """boto3's: no OSError, and without a status."""


def answered(status: int) -> requests.HTTPError:
    """What an upload through MLflow's server raises."""
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Server Error", response=response)


@pytest.mark.parametrize(
    "error", [S3UploadFailedError("SlowDown"), PermissionError(13, "Permission denied", "mlartifacts"), answered(503)]
)
def test_an_artifact_is_sent_once_its_store_takes_it(client, tmp_path, capfd, error):
    times = []

    def busy(what: str) -> None:
        times.append(what)
        if what == "report.html" and len(times) < 5:
            raise error

    client.answer = staticmethod(busy)
    box = Outbox(URI, at(tmp_path), 60.0)
    (tmp_path / "report.html").write_text("page")
    for entry in (artifact(tmp_path / "report.html"), tag("last")):
        box.put(entry)
    box.flush()
    assert client.sent == ["report.html", "last=1"]
    said = capfd.readouterr().err
    assert "left out" not in said
    assert "answers again" in said


STORES = (S3UploadFailedError("AccessDenied"), PermissionError(13, "Permission denied", "mlartifacts"))
GATEWAYS = tuple(answered(status) for status in (500, 502, 503, 504))


@pytest.mark.parametrize(
    ("do", "error"),
    [("artifact", error) for error in (*STORES, *GATEWAYS)],
)
def test_what_is_never_taken_does_not_hold_up_the_rest(client, tmp_path, capfd, do, error):
    """By a store of artifacts, or by a proxy that it is too large for."""
    tried = 0

    def full(what: str) -> None:
        nonlocal tried
        if what in ("report.html", "stuck=1"):
            tried += 1
            raise error

    client.answer = staticmethod(full)
    (tmp_path / "report.html").write_text("page")
    # a job before, which was not there for long, has tried it some times
    before = {**(artifact(tmp_path / "report.html") if do == "artifact" else tag("stuck")), "tries": 15}
    (tmp_path / f"mlflow_unsent_{text_digest(URI)[:8]}_0.jsonl").write_text(json.dumps(before))
    box = Outbox(URI, at(tmp_path), 60.0)
    box.put(tag("last"))
    box.flush()
    assert client.sent == ["last=1"]
    assert tried == 5
    assert f"refuses an entry ({do}), which is left out after 20 tries: {error}" in capfd.readouterr().err
    assert not list(tmp_path.glob("mlflow_unsent_*"))


FULL = MlflowException("(sqlite3.OperationalError) database or disk is full", error_code=TEMPORARILY_UNAVAILABLE)


@pytest.mark.parametrize(
    ("error", "reads"), [(answered(502), False), (MlflowException("API request failed with exception"), False), (FULL, True)]
)
def test_what_a_silent_server_does_not_take_is_kept_however_often_it_is_tried(client, tmp_path, error, reads):
    """A proxy answers in its place, or MLflow's client, or it can only be read."""
    tried = 0

    def silence(what: str) -> None:
        nonlocal tried
        tried += 1
        client.is_down = not reads
        raise error

    client.answer = staticmethod(silence)
    box = Outbox(URI, at(tmp_path), 0.0)
    box.put(tag("a"))
    end = time.monotonic() + 60
    while tried <= 2 * outbox.TRIES and time.monotonic() < end:
        time.sleep(0.01)
    assert tried > 2 * outbox.TRIES
    box.flush()
    (kept,) = tmp_path.glob("mlflow_unsent_*.jsonl")
    assert json.loads(kept.read_text()).items() >= tag("a").items()
    assert "tries" not in kept.read_text()


def test_a_terminal_that_is_gone_keeps_nobody_waiting(client, tmp_path, monkeypatch):
    """The thread that sends has to say that the server is away, to a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    client.answer = staticmethod(silent)
    box = Outbox(URI, at(tmp_path), 0.5)
    # unbuffered, so that nothing is left to be written when it is closed
    with io.TextIOWrapper(open(writing, "wb", buffering=0), write_through=True) as gone, monkeypatch.context() as here:
        here.setattr(sys, "stderr", gone)
        with pytest.raises(BrokenPipeError):
            print("x", file=sys.stderr, flush=True)
        box.put(tag("a"))
        waiting = threading.Thread(target=box.flush, daemon=True)
        waiting.start()
        waiting.join(30)
        assert not waiting.is_alive()
        (kept,) = tmp_path.glob("mlflow_unsent_*.jsonl")
        assert json.loads(kept.read_text())["key"] == "a"
        client.answer = staticmethod(lambda what: None)
        assert no_files_soon(tmp_path), "it is still at work when the server is back"
    assert client.sent == ["a=1"]
