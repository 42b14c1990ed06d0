"""The address of the tracking server: where it may come from, and that none with a password is taken, or repeated."""

from pathlib import Path

import pytest
from command_lines import parsed

from dmat_ray.errors import UserError


@pytest.mark.parametrize(
    "uri",
    [
        *("http://me:hunter/2@127.0.0.1:5000", "postgresql+psycopg://me:hunter/2@db/mlflow"),
        *("https://hunter2@127.0.0.1:5000", "HTTP://hunter2@127.0.0.1", "http://127.0.0.1:5000/?token=hunter2"),
        *("postgresql+psycopg:///mlflow?host=db&user=me&password=hunter2", "postgresql://me@db/mlflow?SSLpassword=hunter2"),
        *(
            "mysql://me@db/mlflow?passwd=hunter2#x",
            "mssql+pyodbc://me@db/mlflow?driver=x&PWD=hunter2",
            "mysql://db/x?%70asswd=hunter2",
            "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dsa%3BPWD%3Dhunter2",
            "postgresql+psycopg2://me:hunter/2@db/mlflow",
        ),
    ],
)
def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking: uri holds a .*MLFLOW_TRACKING_PASSWORD") as told:
        parsed("--tracking.uri", uri)
    assert "hunter" not in str(told.value)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "postgresql+psycopg://me@db/mlflow?sslmode=require", "sqlite:////a@b:c@d/m.db", "databricks"]
)
def test_a_tracking_uri_without_a_password_is_taken(uri: str) -> None:
    assert parsed("--tracking.uri", uri).tracking.uri == uri


def test_the_tracking_uri_of_the_environment_is_below_every_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5001")
    assert parsed().tracking.uri == "http://127.0.0.1:5001"
    assert parsed("--tracking.uri", "http://127.0.0.1:5002").tracking.uri == "http://127.0.0.1:5002"
    (tmp_path / "server.yaml").write_text("tracking: {uri: 'http://127.0.0.1:5003', experiment: mine}")
    found = parsed("--preset", str(tmp_path / "server.yaml")).tracking
    assert (found.uri, found.experiment) == ("http://127.0.0.1:5003", "mine")
    (tmp_path / "none.yaml").write_text("tracking: {uri: null}")
    assert parsed("--preset", str(tmp_path / "none.yaml")).tracking.uri is None
    (tmp_path / "odd.yaml").write_text("tracking: x")
    with pytest.raises(UserError, match="tracking: must be a table"):
        parsed("--preset", str(tmp_path / "odd.yaml"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:5001")
    refusal = r"MLFLOW_TRACKING_URI: .*uri holds a password.*MLFLOW_TRACKING_PASSWORD.*; or do without it by --tracking\.uri null"
    with pytest.raises(UserError, match=refusal) as told:
        parsed()
    assert "hunter" not in str(told.value)
    assert parsed("--tracking.uri", "null").tracking.uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert parsed().tracking.uri is None
