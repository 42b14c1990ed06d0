"""What a local Ray opens and where output may go."""

import os

import psutil
import pytest
from small import settings

from dmat_ray.cluster.session import prepare_environment
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster


@pytest.mark.usefixtures("ray_session")
def test_ray_listens_on_loopback_only():
    listening = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            listening += [c.laddr.ip for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:  # Ray's pool of idle workers comes and goes
            continue
    assert len(listening) >= 4
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_no_usage_is_told_to_the_makers_of_packages(monkeypatch):
    """Nor anything fetched from them; who wants it says so."""
    from mlflow.telemetry import utils

    names = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert [os.environ[name] for name in names] == ["0", "true"]
    assert utils.is_telemetry_disabled()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    prepare_environment()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_relative_output_of_a_submitted_job_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    prepare_environment(settings(tmp_path))
    with pytest.raises(UserError, match="output 'runs/demo' is relative"):
        prepare_environment(settings("runs/demo"))
    prepare_environment(settings(tmp_path, "--manifold_set", "s3://bucket/set"))
    with pytest.raises(UserError, match=r"manifold_set 'sets/mine' is relative.*--manifold_set an absolute path"):
        prepare_environment(settings(tmp_path, "--manifold_set", "sets/mine"))


def test_an_output_in_an_object_store_needs_an_mlflow_server():
    with pytest.raises(UserError, match=r"'s3://bucket/x' is in an object store, .* MLflow server as --tracking\.uri"):
        prepare_environment(settings("s3://bucket/x"))
    prepare_environment(settings("s3://bucket/x"), tracked=False)
    prepare_environment(settings("s3://bucket/x", "--tracking.uri", "http://127.0.0.1:5000"))
