"""Trainings on machines that come and go: a node is added, another is announced to go and goes, within epochs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from small import SMALL, history, processes_below, wait_for
from spot_metadata import metadata_server

from dmat_ray.cluster.environment import LOCAL_ENVIRONMENT

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive]
ROOT = Path(__file__).parents[2]
# statistics that do not depend on how a batch is dealt to workers, and steps slow enough that what happens comes within one
OPTIONS = [
    *("--preset", "demo", "dmat", "--name", "dmat", "--objective.batch_norm", "frozen", "--objective.latent.steps", "30"),
    *("--training.epochs", "7", "--training.val_examples", "0"),
    *("--training.checkpoint_minutes", "0.05"),
]
ELASTIC = [
    *("--cluster.train_workers", "2", "--cluster.train_workers_min", "1", "--cluster.threads_per_worker", "2"),
    *("--cluster.resize_seconds", "2"),
]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing, and one machine; nothing is set that only a Ray of this machine alone has."""
    for name in LOCAL_ENVIRONMENT.keys() - {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME"}:
        monkeypatch.delenv(name, raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def start(output: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--output", str(output), *SMALL, *OPTIONS, *options]
    # Ray Train counts on the machine that went for as long as workers may take to start
    given = {"PREEMPTION_POLL_INTERVAL_S": "0.5", "WORKER_GROUP_START_TIMEOUT_S": "60"}
    environment = {**os.environ, **{f"RAY_TRAIN_{name}": value for name, value in given.items()}}
    with (output / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_machine_comes_and_another_is_taken_away(machines, tmp_path, finished):
    finished.copy_set(tmp_path)
    (tmp_path / "calm").mkdir()
    alone = [sys.executable, str(ROOT / "jobs" / "train_local.py"), "--output", str(tmp_path / "calm"), *SMALL, *OPTIONS]
    alone += ["--manifold_set", str(tmp_path / "on_manifold_set"), "--cluster.threads_per_worker", "2"]
    subprocess.run(alone, check=True, capture_output=True, timeout=400)

    process = start(tmp_path, *ELASTIC, "--cluster.address", machines.address)

    def said() -> str:
        return (tmp_path / "log").read_text()

    def workers(node: Any) -> list[Any]:
        return processes_below(node.all_processes["raylet"][0].process.pid, "RayTrainWorker")

    (first,) = machines.worker_nodes
    wait_for(lambda: "epoch 1/7" in said(), process)
    second = machines.add_node(num_cpus=2)
    wait_for(lambda: "with 2 workers" in said(), process)
    assert workers(first)
    assert workers(second)
    with metadata_server() as metadata:
        watch = [sys.executable, str(ROOT / "deploy" / "spot_watch.py"), "aws", "--metadata", metadata.url, "--every", "0.5"]
        watching = subprocess.Popen([*watch, "--address", machines.address, "--node-id", first.node_id])
        wait_for(lambda: metadata.asked > 2, watching)
        metadata.announce(300)
        assert watching.wait(timeout=400) == 0
    wait_for(lambda: "a machine will be taken away; checkpoint written after" in said(), process)
    machines.remove_node(first)
    wait_for(lambda: "with 1 worker\n" in said(), process)
    assert process.wait(timeout=400) == 0, said()
    assert "warning" not in said()
    found = history(tmp_path)
    assert [epoch["epoch"] for epoch in found] == [1, 2, 3, 4, 5, 6, 7]
    for epoch, expected in zip(found, history(tmp_path / "calm"), strict=True):
        losses = {k: v for k, v in epoch.items() if not k.endswith("accuracy")}
        assert losses == pytest.approx({k: expected[k] for k in losses}, rel=5e-4), "no example is left out, none comes twice"
        # rounding decides for examples whose two likeliest classes are equally likely
        assert epoch == pytest.approx(expected, rel=5e-4, abs=0.06)
