"""MLflow: one experiment, every stage a run, found again by its key when work is resumed."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmat_ray.checkpoint import flatten_config
from dmat_ray.config import Config

KEY = "dmat_ray.key"
PARENT = "mlflow.parentRunId"


def tracking_uri(config: Config) -> str:
    """The configured server, or sqlite in the output folder."""
    return config.tracking.uri or f"sqlite:///{Path(config.output).resolve() / 'mlflow.db'}"


class Run:
    """An MLflow run that is open."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.id = client, run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at `step`."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self.id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts."""
        if path.is_dir():
            self._client.log_artifacts(self.id, str(path), folder)
        else:
            self._client.log_artifact(self.id, str(path), folder)

    def text(self, name: str, content: str) -> None:
        """Keep a text as an artifact of this name."""
        self._client.log_text(self.id, content, name)

    def tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._client.set_tag(self.id, key, value)

    def finish(self, status: str) -> None:
        """End the run as FINISHED or FAILED."""
        self._client.set_terminated(self.id, status)


def open_run(config: Config, name: str, stage: str, parent: str | None = None) -> Run:
    """The run of a stage: a new one with the config as params, or, if one with the same key is unfinished, that one."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from mlflow import MlflowClient
    from mlflow.entities import Param

    Path(config.output).mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri(config))
    artifacts = None if config.tracking.uri else (Path(config.output).resolve() / "mlartifacts").as_uri()
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(config.tracking.experiment, artifact_location=artifacts)
    )
    key = f"{stage}/{name}/{config.fingerprint()}"
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`{KEY}` = '{key}' and attributes.status != 'FINISHED'", max_results=1
    )
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return Run(client, run_id)
    tags = {KEY: key, "dmat_ray.stage": stage, **({PARENT: parent} if parent else {})}
    # tags with the run itself: a kill right after it must not leave one that is never found again
    run = client.create_run(experiment_id, tags=tags, run_name=f"{stage}: {name}" if name else stage)
    params = [Param(k, str(v)[:6000]) for k, v in flatten_config(config).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    return Run(client, run.info.run_id)


@contextmanager
def tracked(config: Config, name: str, stage: str, parent: str | None = None) -> Iterator[Run]:
    """A run that ends as FINISHED, or as FAILED when the body raises."""
    run = open_run(config, name, stage, parent)
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")
