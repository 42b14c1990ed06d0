"""One real Ray for all tests of this folder, and what several of them start from."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3
from small import settings

from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.cluster.session import connected
from dmat_ray.config import ClusterConfig, Config

# before any test module imports ray, which reads some of these once and for all
os.environ.setdefault("RAY_worker_niceness", "0")  # other tests run at the same time, and must not have all of the machine
prepare_environment()


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Iterator[s3.Server]:
    """An S3 server on loopback. It is there before Ray, whose processes then find it in their environment."""
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_session(store) -> Iterator[None]:
    """Ray on this machine, with more logical CPUs than cores, as the jobs start it."""
    with connected(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def impatient() -> Iterator[None]:
    """Ray Data ends what has shown nothing for a second, which is less than an actor takes to start.

    By default it ends what has shown nothing for half an hour: AutoAttack on a large model shows nothing for longer.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_no_progress_timeout_s = 1
    with DataContext.current(context):
        yield


@pytest.fixture(autouse=True)
def no_address_in_the_environment() -> Iterator[None]:
    """MLflow leaves one there when a test names a server; jobs would take it."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@dataclass(frozen=True)
class Finished:
    """A whole pipeline: its settings, its models, and what was said."""

    config: Config
    models: dict[str, Path]
    lines: list[str]

    @property
    def output(self) -> Path:
        """The folder of everything."""
        return Path(self.config.output)

    def copy_set(self, output: Path) -> Path:
        """The finished set in another output folder, where it is as good as made there."""
        return Path(shutil.copytree(self.output / "on_manifold_set", output / "on_manifold_set"))


@pytest.fixture(scope="session")
def finished(ray_session, tmp_path_factory) -> Finished:
    """Projection, two methods trained by two workers each, evaluation; nothing disturbed them."""
    from small import DMAT

    from dmat_ray.cluster import jobs, tracking

    config, lines = settings(tmp_path_factory.mktemp("pipeline")), []
    with tracking.tracked(config, "", "pipeline") as run:
        jobs.project(config, lines.append, run)
        configs = [
            settings(Path(config.output), "--name", "standard", preset=("demo", "standard")),
            settings(Path(config.output), "--name", "dmat", *DMAT, preset=("demo", "dmat")),
        ]
        models = {place.name: Path(str(place)) for place in jobs.train(configs, lines.append, run)}
        jobs.evaluate(config, models, lines.append, run)
    return Finished(config, models, lines)


@pytest.fixture
def lines() -> list[str]:
    """What a stage said."""
    return []


@pytest.fixture
def say(lines: list[str]) -> Callable[[str], None]:
    """A stage's voice, which writes to `lines`."""
    return lines.append
