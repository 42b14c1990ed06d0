"""A CPU for what reads and shuffles a streamed set, beside those of the workers, without Ray."""

import pytest

from dmat_ray.cluster import ingest
from dmat_ray.config import ClusterConfig
from dmat_ray.errors import UserError
from dmat_ray.storage import files

pytestmark = pytest.mark.slow  # imports Ray


def node(cpus: float, *, alive: bool = True) -> dict:
    return {"NodeID": "0" * 56, "Alive": alive, "Resources": {"memory": 1e9, **({"CPU": cpus} if cpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "taken"),
    [
        ([node(4)], 1, 4, True),
        ([node(4)], 1, 3, False),
        ([node(4.5)], 2, 2, True),  # half a CPU, where a task asks for one
        ([node(2), node(2)], 2, 2, True),
        ([node(2), node(2)], 1, 2, False),
        ([node(2), node(2, alive=False)], 1, 2, True),
        ([node(0), node(2)], 1, 2, True),  # a head that computes nothing
    ],
)
def test_a_task_needs_a_cpu_that_no_worker_has(nodes, workers, threads, taken):
    assert ingest.take_all_cpus(nodes, workers, ClusterConfig(threads_per_worker=threads)) == taken


@pytest.mark.parametrize(("looks", "said"), [(0, 0), (3, 1), (None, 1)], ids=["free", "a node comes", "no node comes"])
def test_what_is_streamed_waits_for_a_cpu_no_longer_than_it_is_told(monkeypatch, looks, said):
    """As after a machine was lost: Ray Train takes what is left, and Ray Data would wait for ever."""
    cluster, lines, now, seen = ClusterConfig(threads_per_worker=2, wait_minutes=5), [], [0.0], []

    def nodes():
        seen.append(1)
        return [node(2), *([node(2)] if looks is not None and len(seen) > looks else [])]

    monkeypatch.setattr(ingest.ray, "nodes", nodes)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    if looks is None:
        with pytest.raises(UserError, match=r"did not come within 5 minutes; start another node, lower cluster\.threads_per_w"):
            ingest.await_a_cpu(1, cluster, lines.append)
        assert now[0] == pytest.approx(300, abs=2)
    else:
        ingest.await_a_cpu(1, cluster, lines.append)
        assert len(seen) == looks + 1
    assert len(lines) == said


def test_an_epoch_begins_with_that_look(monkeypatch):
    def stop(workers, cluster, say):
        raise UserError(f"{workers} of {cluster.threads_per_worker}")

    monkeypatch.setattr(ingest, "await_a_cpu", stop)
    streamed = object.__new__(ingest.Streamed)
    streamed._cluster, streamed._say = ClusterConfig(threads_per_worker=3), print
    with pytest.raises(UserError, match="2 of 3"):
        streamed._splits(0, 2, 0, None)
