"""How many workers are said to have room: by who waits for machines and by who counts trials, on nodes as Ray tells them."""

import importlib
from typing import Any

import pytest
import ray

from dmat_ray.cluster import searchers, session
from dmat_ray.config import ClusterConfig, TuneConfig
from dmat_ray.errors import UserError

pytestmark = pytest.mark.slow
CPUS = [{"CPU": 4.0}, {"CPU": 3.0}]
GPUS = [{"CPU": 64.0, "GPU": 1.0}, {"CPU": 64.0}]


def ray_with(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]]) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": there} for there in nodes)])
    monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: None)


@pytest.mark.parametrize(
    ("nodes", "each", "streamed", "expected"),
    [
        (CPUS, {"threads_per_worker": 1}, False, 7),
        (CPUS, {"threads_per_worker": 1}, True, 6),
        (CPUS, {"threads_per_worker": 2}, False, 3),
        (CPUS, {"threads_per_worker": 2}, True, 3),
        (GPUS, {"gpus_per_worker": 0.1}, False, 10),
        ([{"CPU": 9.0, "GPU": 0.3}], {"gpus_per_worker": 0.1}, False, 3),
        # as Ray has it, which counts in steps of 0.0001
        (GPUS, {"gpus_per_worker": 0.33333335}, False, 3),
        (GPUS, {"gpus_per_worker": 0.3334}, False, 2),
    ],
)
def test_a_search_counts_as_many_workers_as_are_not_waited_for(monkeypatch, nodes, each, streamed, expected):
    ray_with(monkeypatch, nodes)
    cluster = ClusterConfig(address="auto", train_workers=1, wait_minutes=0.001, **each)
    assert searchers.trials_at_once(TuneConfig(), cluster, alone=True, streamed=streamed) == expected
    said: list[Any] = []
    session.await_machines(cluster, said.append, expected, streamed=expected * streamed)
    assert said == [], "they are there"

    def placed(*_: Any) -> None:
        raise UserError("others are asked for")

    monkeypatch.setattr(importlib.import_module("ray.util.placement_group"), "placement_group", placed)
    with pytest.raises(UserError, match="others are asked for"):
        session.await_machines(cluster, said.append, expected + 1, streamed=(expected + 1) * streamed)
