"""A search: Ray Tune over Ray Train runs, tracked in a real MLflow server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small import MlflowServer, settings

from dmat_ray.cluster import tune
from dmat_ray.errors import UserError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
SPACE = """
from ray import tune

PRESET = "dmat"


def space():
    return {"alpha": tune.grid_search([0.3, 0.7])}


def settings(sample):
    return {"objective.image.weight": sample["alpha"], "objective.latent.weight": 1 - sample["alpha"]}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """An MLflow server on loopback."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server.url


def test_search_leaves_a_tree_of_runs(tmp_path, server, finished, say):
    """Its trials read a stream of the set."""
    space = tmp_path / "space.py"
    space.write_text(SPACE)
    options = ("--tune.space", space, "--tune.epochs", 1, "--cluster.train_workers", 1, "--training.loader", "stream")
    config = settings(tmp_path, *options, "--tracking.uri", server)
    finished.copy_set(tmp_path)
    found = tune.search(config, say)
    assert sorted(r["sample"]["alpha"] for r in found) == [0.3, 0.7]
    assert found[0]["metrics"]["val_robust"] >= found[1]["metrics"]["val_robust"]

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["dmat_ray.stage"] == "tune"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2
    assert {r.info.status for r in (parent, *children)} == {"FINISHED"}
    for child in children:
        alpha = float(child.data.tags["sample.alpha"])
        assert float(child.data.params["objective.image.weight"]) == alpha
        assert float(child.data.params["objective.latent.weight"]) == pytest.approx(1 - alpha)
        (result,) = [r for r in found if r["sample"]["alpha"] == alpha]
        assert child.data.metrics["val_robust"] == pytest.approx(result["metrics"]["val_robust"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"does not define space\(\)"),
        (SPACE.replace("objective.image.weight", "objective.image.wait"), "objective.image.wait: there is no such setting"),
        (SPACE.replace("0.3, 0.7", "-0.3"), "objective.image.weight"),
    ],
)
def test_space_that_does_not_fit_is_refused(tmp_path, say, text, message):
    space = tmp_path / "space.py"
    space.write_text(text)
    with pytest.raises(UserError, match=message):
        tune.search(settings(tmp_path, "--tune.space", space), say)
    assert not (Path(tmp_path) / "mlflow.db").exists()


def test_shipped_space_gives_four_trials(say):
    root = Path(__file__).parents[2]
    space = tune.load_space(str(root / "tune_spaces" / "mixing_ratio.py"))
    assert len(space.space()["alpha"]["grid_search"]) == 4
