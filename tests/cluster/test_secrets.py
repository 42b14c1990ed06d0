"""What is secret: it stays in the environment, and opens what is closed without it."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small import ROOT, SMALL, MlflowServer, settings

from dmat_ray.cluster import tracking
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords are slow to check, on purpose, and a busy machine takes longer than clients wait."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "240")


@pytest.fixture(scope="module")
def closed(tmp_path_factory) -> Iterator[tuple[MlflowServer, str]]:
    password = secrets.token_hex(16)
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), password=password) as server:
        yield server, password


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_secrets_of_the_environment_are_written_nowhere(closed, store, finished, tmp_path):
    """In no file, line or log of Ray: not by a job that uses them, for its images and MLflow, nor by one whose own are wrong."""
    server, password = closed
    place = finished.output / "on_manifold_set"
    shared = {f"set/{file.relative_to(place)}": file.read_bytes() for file in files(place)}
    store.put("planted", shared)
    logs = Path(tempfile.mkdtemp(prefix="dmat_", dir="/tmp"))  # a short path, for Ray's sockets
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
        "RAY_TMPDIR": str(logs),
    }
    options = ["--preset", "demo", "standard", "--output", str(tmp_path), "--manifold_set", "s3://planted/set", *SMALL]
    options += ["--tracking.uri", server.url, "--training.epochs", "1", "--cluster.train_workers", "1"]
    options += ["--tracking.patience_s", "240"]
    wrong = {"MLFLOW_TRACKING_PASSWORD": password[:-1] + "x", "AWS_SECRET_ACCESS_KEY": secret[:-1] + "x"}
    said = []
    for changed, code in (({}, 0), (wrong, 2)):
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), *options, "--name", f"with_{len(changed)}_wrong"]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, **changed}, capture_output=True, text=True, timeout=1000, check=False
        )
        said.append(done.stdout + done.stderr)
        assert done.returncode == code, said[-1]
    planted = [password.encode()[:-1], secret.encode()[:-1]]
    (tmp_path / "said").write_text("".join(said))
    for folder, known in ((tmp_path, b"with_0_wrong"), (logs, b"with_0_wrong"), (server.folder, b"with_0_wrong")):
        content = {file: file.read_bytes() for file in files(folder)}
        assert any(known in text for text in content.values()), "what is no secret is found in this way"
        assert [file for file, text in content.items() if any(one in text for one in planted)] == []
    shutil.rmtree(logs, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [file for file in folder.rglob("*") if file.is_file()]


def test_an_mlflow_server_with_users_asks_for_the_password(closed, tmp_path, monkeypatch):
    """Started as docs/guide.md says."""
    server, password = closed
    config = settings(tmp_path, "--tracking.uri", server.url, "--tracking.experiment", "closed")
    for wrong in (None, "guessed"):
        for name, value in (("USERNAME", "admin"), ("PASSWORD", wrong)):
            if wrong is None:
                monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
            else:
                monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        with pytest.raises(UserError, match=r"does not let us in: .*MLFLOW_TRACKING_USERNAME.*MLFLOW_TRACKING_PASSWORD") as told:
            tracking.open_run(config, "", "train")
        assert "guessed" not in str(told.value)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with tracking.tracked(config, "", "train") as run:
        run.metrics({"loss": 1.0}, step=1)
    client = MlflowClient(server.url)
    (found,) = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    assert found.data.metrics == {"loss": 1.0}
    assert password not in str(found.to_dictionary())


def test_what_a_server_does_not_let_in_is_kept(closed, tmp_path, monkeypatch, capfd):
    """A password that is changed while a job runs: nothing is lost."""
    server, password = closed
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    options = ["--tracking.uri", server.url, "--tracking.experiment", "kept", "--tracking.patience_s", "2"]
    with tracking.tracked(settings(tmp_path, *options), "", "train") as run:
        assert run.id
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
        run.metrics({"loss": 1.0}, step=1)
    assert "2 entries for MLflow are kept in" in capfd.readouterr().err
    (kept,) = tmp_path.glob("mlflow_unsent_*.jsonl")
    assert '"loss": 1.0' in kept.read_text()
    assert password not in kept.read_text()
