"""What is secret: it stays in the environment, and opens what is closed without it."""

import os
import secrets
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from small import MlflowServer, settings, start_job

from dmat_ray.cluster import tracking
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster


def test_secrets_of_the_environment_are_written_nowhere(finished, tmp_path):
    """Neither by a pipeline nor by a job that fails on a store: not to files, not to MLflow, not to Ray's logs."""
    job = start_job("project.py", tmp_path, "--data.source", "s3://absent/photos")
    (tmp_path / "said").write_text(job.communicate(timeout=400)[0])
    assert job.returncode == 2
    planted = [os.environ[name].encode() for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")]
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    for folder, known in ((finished.output, b"mnist5k"), (tmp_path, b"s3://absent/photos"), (logs, b"ray")):
        files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert any(known in content for content in files.values()), "what is no secret is found in this way"
        assert [file for file, content in files.items() if any(secret in content for secret in planted)] == []


@pytest.fixture(scope="module")
def closed(tmp_path_factory) -> tuple[MlflowServer, str]:
    password = secrets.token_hex(16)
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), password=password) as server:
        yield server, password


def test_an_mlflow_server_with_users_asks_for_the_password(closed, tmp_path, monkeypatch):
    """Started as docs/guide.md says."""
    server, password = closed
    config = settings(tmp_path, "--tracking.uri", server.url)
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
