"""A CPU for what reads and shuffles a streamed set, beside those of the workers, without Ray."""

import pytest
import ray

from dmat_ray.cluster import ingest, room
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
def test_a_task_needs_a_cpu_that_no_worker_has(monkeypatch, nodes, workers, threads, taken):
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert room.takes_all(room.of_nodes(), workers, {"CPU": threads}) == taken


@pytest.mark.parametrize(
    ("looks", "stop_s", "said"),
    [(0, 1e9, 0), (3, 1e9, 1), (None, 1e9, 1), (None, 7.0, 1)],
    ids=["free", "a node comes", "no node comes", "asked to stop"],
)
def test_what_is_streamed_waits_for_a_cpu_no_longer_than_it_is_told(monkeypatch, looks, stop_s, said):
    """As after a machine was lost: Ray Train takes what is left, and Ray Data would wait for ever. An autoscaler is asked."""
    cluster, lines, now, seen, asked = ClusterConfig(threads_per_worker=2, wait_minutes=5), [], [0.0], [], []

    def nodes():
        seen.append(1)
        return [node(2), *([node(2)] if looks is not None and len(seen) > looks else [])]

    def is_stopping():
        return now[0] > stop_s

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ingest, "placement_group", lambda bundles: asked.append(bundles) or bundles)
    monkeypatch.setattr(ingest, "remove_placement_group", asked.remove)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    if stop_s < 300:
        with pytest.raises(UserError, match="asked to stop while it waited, the same command goes on"):
            ingest.await_a_cpu(1, cluster, lines.append, is_stopping)
        assert now[0] == pytest.approx(stop_s, abs=2)
    elif looks is None:
        with pytest.raises(UserError, match=r"did not come within 5 minutes; start another node, lower cluster\.threads_per_w"):
            ingest.await_a_cpu(1, cluster, lines.append, is_stopping)
        assert now[0] == pytest.approx(300, abs=2)
    else:
        ingest.await_a_cpu(1, cluster, lines.append, is_stopping)
        assert looks < len(seen) <= looks + 2, "no longer than it takes"
    assert asked == [], "what was asked for is given back"
    assert len(lines) == said


def test_an_epoch_begins_with_that_look(monkeypatch):
    def stop(workers, cluster, say, is_stopping):
        raise UserError(f"{workers} of {cluster.threads_per_worker}")

    monkeypatch.setattr(ingest, "await_a_cpu", stop)
    streamed = object.__new__(ingest.Streamed)
    streamed._cluster, streamed._say, streamed._is_stopping = ClusterConfig(threads_per_worker=3), print, lambda: False
    with pytest.raises(UserError, match="2 of 3"):
        streamed._splits(0, 2, 0, None)
