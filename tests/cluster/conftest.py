"""One real Ray for all tests of this folder."""

from collections.abc import Callable, Iterator

import pytest

from dmat_ray.cluster.session import connected, prepare_environment
from dmat_ray.config import ClusterConfig

# before any test module imports ray, which reads some of these once and for all
prepare_environment()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray on this machine, with more logical CPUs than cores, as the jobs start it."""
    with connected(ClusterConfig()):
        yield


@pytest.fixture
def lines() -> list[str]:
    """What a stage said."""
    return []


@pytest.fixture
def say(lines: list[str]) -> Callable[[str], None]:
    """A stage's voice, which writes to `lines`."""
    return lines.append
