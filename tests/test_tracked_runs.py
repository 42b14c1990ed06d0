"""Runs in MLflow's database, without Ray: names of the user's own, and what is refused of them."""

import re
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from dmat_ray import settings
from dmat_ray.cluster import tracking
from dmat_ray.config import Config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, whose database takes MLflow seconds to make."""
    return tmp_path_factory.mktemp("tracked")


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
