"""What a worker of Ray Train knows of its machines and its storage, without Ray."""

import pytest
import ray.train
import torch
from ray.train import PreemptionInfo

from dmat_ray.cluster import context
from dmat_ray.cluster.context import RayContext

pytestmark = pytest.mark.slow  # imports Ray


@pytest.fixture
def worker() -> RayContext:
    """Rank 0 of one worker, as its constructor leaves it that asks Ray."""
    made = object.__new__(RayContext)
    made.rank, made.world_size, made.device = 0, 1, torch.device("cpu")
    made._name, made._mailbox, made._wait, made._stopping, made._newest = "dmat", "mailbox", False, False, ""
    made._leaving = set()
    return made


def test_each_machine_that_is_to_go_is_noticed_once(worker, monkeypatch):
    """Ray tells of all of them, again and again."""
    one, both = PreemptionInfo(None, {"a": [0]}), PreemptionInfo(None, {"a": [0], "b": [2, 3]})
    told = iter([None, one, one, both, both, one, None, one])
    monkeypatch.setattr(context, "is_stopping", lambda mailbox: False)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    assert [worker.preempted() for _ in range(8)] == [False, True, False, True, False, False, False, True]
