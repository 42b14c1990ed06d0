"""Searches small enough for two cores: their space, their yardstick, and what is read of them afterwards."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from small import settings

from dmat_ray.config import Config
from dmat_ray.reports.trials import Trial

SPACE = """
from ray import tune
from dmat_ray.cluster.spaces import simplex, times

SPACE = {
    "objective.image.eps": times(0.5, 2),
    ("objective.image.weight", "objective.latent.weight"): simplex(),
    "objective.latent.steps": 1,
    "objective.image.step_size": None,
    "objective.latent.step_size": None,
}
"""
SUITE = """
attacks:
  - {threat: clean, name: clean}
  - {threat: image, name: linf, eps: 0.02, steps: 2}
summaries:
  - {name: worst, how: worst, of: [linf]}
"""
# one trial at a time, so that what is drawn does not depend on which ends first
ONE_BY_ONE = ["--tune.searcher", "tpe", "--tune.num_samples", "4", "--tune.epochs", "3", "--tune.max_concurrent", "1"]
ONE_BY_ONE += ["--cluster.train_workers", "1", "--tune.objective", "0.7*clean + 0.3*linf", "--tune.evaluate", "false"]


def options(folder: Path) -> list[str]:
    """The space and the yardstick of these tests, as files in `folder`."""
    (folder / "little.py").write_text(SPACE)
    (folder / "little.yaml").write_text(SUITE)
    return ["--tune.space", str(folder / "little.py"), "--tune.suites", str(folder / "little.yaml")]


def tuned(output: Path, *more: Any) -> Config:
    output.mkdir(exist_ok=True)
    return settings(output, *options(output), *more, preset=("demo", "dmat"))


def told(every: list[Trial]) -> list[dict[str, Any]]:
    """What must not depend on kills and on time."""
    return [{k: v for k, v in trial.to_json().items() if k != "seconds"} for trial in sorted(every, key=lambda t: t.name)]


def runs_of(uri: str, config: Config) -> tuple[Run, dict[str, Run]]:
    """The search's run, and those of its trials by name."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    every = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in every if r.data.tags["dmat_ray.stage"] == "tune"]
    children = [r for r in every if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(every) == len(children) + 1, "none is there twice, and none is anybody else's"
    return parent, {r.info.run_name.removeprefix("trial: "): r for r in children}
