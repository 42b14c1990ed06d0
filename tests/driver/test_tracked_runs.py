"""Runs in MLflow's database, without Ray: names of the user's own, what is refused of them, and databases elsewhere."""

import re
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run
from mlflow_databases import with_database

from dmat_ray import settings
from dmat_ray.cluster import environment, jobs, tracking
from dmat_ray.config import Config
from dmat_ray.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database."""
    folder = tmp_path_factory.mktemp("tracked")
    with_database(folder)
    return folder


def with_term(output: Path, name: str) -> Config:
    term = {"threat": "snow", "weight": 0.2, "steps": 2}
    return settings("demo", "dmat", output=str(output), objective={"more": {name: term}})


def run_of(output: Path, run_id: str) -> Run:
    return mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}").get_run(run_id)


NAMES = ["l2, strong", "l2=1.5", "a//b", "..", "../../x", "a/../b", "a/./b", "/a/", "snow: é", "%", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_term_may_have_any_name(output, name, capfd):
    with tracking.tracked(with_term(output, name), name, "train") as run:
        run.metrics({name: 0.5, f"train_loss_{name}": 1.0}, step=1)
        run.tag(name, "a tag")
    found = run_of(output, run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params["objective.more.joint.threat"] == "joint"
    assert [key for key, value in found.data.params.items() if key.endswith(".threat") and value == "snow"]
    assert sorted(found.data.metrics.values()) == [0.5, 1.0]
    assert "a tag" in found.data.tags.values()
    assert "refuses" not in capfd.readouterr().err


def test_settings_that_are_refused_do_not_cost_the_run(output, capfd):
    name = "longer than MLflow's names may be" * 10
    with tracking.tracked(with_term(output, name), "long", "train") as run:
        run.metrics({"loss": 0.5}, step=1)
    found = run_of(output, run.id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert found.data.params["training.seed"] == "0"
    said = capfd.readouterr().err
    assert said.count("warning: ") == 1
    assert re.search(r"MLflow refuses \d+ settings of the run 'train: long', left out of its params: .* length", said)


def test_the_files_of_a_database_elsewhere_go_to_the_output(output, tmp_path, monkeypatch):
    """Not to where the job happens to run, which of one that is submitted is Ray's."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(output / "mlflow.db", tmp_path / "shared.db")
    config = settings("demo", output=str(tmp_path / "out"), tracking={"uri": "sqlite:///../shared.db", "experiment": "elsewhere"})
    with tracking.tracked(config, "", "train") as run:
        run.text("note.txt", "a note")
    assert [path.read_text() for path in (tmp_path / "out" / "mlartifacts").rglob("note.txt")] == ["a note"]
    assert not list((tmp_path / "here").iterdir())
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path}/shared.db").get_run(run.id)
    assert found.info.artifact_uri.startswith((tmp_path / "out" / "mlartifacts").as_uri())
    assert jobs.ui_command(config).endswith(f" -m mlflow ui --backend-store-uri sqlite:///{tmp_path}/shared.db")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"tracking\.uri 'sqlite:///\.\./shared\.db' is relative, but a submitted job runs in"):
        environment.prepare_environment(config)


@pytest.mark.parametrize(
    ("uri", "artifacts", "command"),
    [
        ("http://127.0.0.1:5000", None, "open http://127.0.0.1:5000"),
        ("databricks", None, "open databricks"),
        ("postgresql+psycopg://me@h/db?a=1&b=2", "s3://bucket/x/mlartifacts", "'postgresql+psycopg://me@h/db?a=1&b=2'"),
        ("sqlite:////shared/m.db", "s3://bucket/x/mlartifacts", "-m mlflow ui --backend-store-uri sqlite:////shared/m.db"),
    ],
)
def test_where_the_files_of_an_output_in_a_bucket_go(uri, artifacts, command):
    config = settings("demo", output="s3://bucket/x", tracking={"uri": uri})
    assert tracking._artifacts(config) == artifacts
    assert jobs.ui_command(config).endswith(command)


@pytest.mark.parametrize("uri", ["mlflow:5000", "runs/mlruns", "file:///runs/mlruns", "htp://127.0.0.1:5000"])
def test_what_is_no_address_is_told_in_a_line(tmp_path, uri):
    config = settings("demo", output=str(tmp_path), tracking={"uri": uri})
    with pytest.raises(UserError, match=rf"^tracking\.uri '{uri}' is no address of an MLflow; write http://HOST:PORT .*$"):
        tracking.open_run(config, "", "train")


@pytest.mark.parametrize("own", [True, False])
def test_a_database_of_another_mlflow_is_told_in_a_line(output, tmp_path, own):
    path = tmp_path / "mlflow.db" if own else tmp_path / "other.db"
    shutil.copy(output / "mlflow.db", path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = 'cbc13b556ace'")
    config = settings("demo", output=str(tmp_path), tracking={} if own else {"uri": f"sqlite:///{path}"})
    with pytest.raises(
        UserError, match=rf"^.*'.*{path}' has the tables of another .*: python -m mlflow db upgrade sqlite:///{path}$"
    ):
        tracking.open_run(config, "", "train")
