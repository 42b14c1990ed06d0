"""The shipped cluster with Ray's own autoscaler: the pipeline is submitted to a head without machines, and those that come go.

Machines are processes of this one, with GPUs that are only said to be there.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from heads import Head, kill_all, shipped_cluster
from small import DMAT, SMALL, same_training, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive]


@contextmanager
def counted(head: Head) -> Iterator[list[int]]:
    """How many machines there were, whenever that changed."""
    counts, stop = [len(head.machines())], threading.Event()

    def look() -> None:
        while not stop.wait(1):
            there = len(head.machines())
            if there != counts[-1]:
                counts.append(there)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()


@pytest.mark.timeout(2400)
def test_a_pipeline_outlives_its_machines_and_its_head(finished, tmp_path):
    """A machine goes in every stage, at a random moment, and the head in the second; what comes out is what a calm run gives."""
    moments = random.Random(20)
    output, cluster = tmp_path / "output", shipped_cluster(cpus=2, idle_seconds=5, gpu_spot=2, gpu_on_demand=2)
    script = ["jobs/pipeline.py", "--preset", "demo", "--methods", "dmat", "--output", str(output), *SMALL, *DMAT]
    script += ["--cluster.gpus_per_worker", "1", "--cluster.train_workers", "2"]
    variables = {"DMAT_RAY_LOGICAL_GPUS": "1", "RAY_worker_niceness": "0"}

    def lose_one(title: str, condition: Callable[[], bool], within: float) -> None:
        """Of those that are at work, and have begun to give something."""
        wait_for(condition, job, seconds=1000)
        time.sleep(moments.uniform(0, within))
        kill_all([moments.choice(list(head.hosts(title).values())).pid])

    def files(place: str) -> int:
        return len(list((output / place).rglob("*.parquet")))

    with Head(tmp_path / "first", cluster=cluster, **variables) as head, counted(head) as machines:
        log = tmp_path / "first.log"
        said = log.read_text
        job = head.start(log, *script, name="first")
        lose_one("ShardProjector", lambda: files("on_manifold_set") > 0, within=0.2)
        assert files("on_manifold_set") < 4, "of 4 shards"
        lose_one("RayTrainWorker", lambda: "dmat: epoch 1/3" in said(), within=1)
        assert "dmat: epoch 3/3" not in said()
        wait_for(lambda: "dmat: epoch 2/3" in said(), job, seconds=1000)
        wait_for(lambda: any((output / "train").rglob("checkpoint_*/run.json")), job, seconds=1000)
        head.kill()
        assert job.wait(timeout=1000) != 0
    assert machines[0] == 0, "none before there is work"
    assert max(machines) >= 2, "one for each worker; a new one may come before one that is idle has gone"
    assert said().count("dmat: epoch 1/3") == 1

    with Head(tmp_path / "second", cluster=cluster, **variables) as head, counted(head) as machines:
        log = tmp_path / "second.log"
        said = log.read_text
        job = head.start(log, *script, name="second")
        lose_one("MapBatches", lambda: files("evaluation") > 0, within=5)
        assert not (output / "evaluation" / "rows.parquet").exists()
        assert job.wait(timeout=1000) == 0, said()
        wait_for_none(machines)
    assert "the on-manifold set is whole and unchanged, nothing to do" in said()
    assert "dmat: going on with epoch" in said()
    assert "dmat: epoch 1/3" not in said()
    assert machines[0] == 0
    assert max(machines) >= 2

    assert rows(output / "on_manifold_set" / "shards").equals(rows(finished.output / "on_manifold_set" / "shards"))
    same_training(output, finished.output)
    calm = pq.read_table(finished.output / "evaluation" / "rows.parquet").drop_columns(["seconds"])
    ours = pq.read_table(output / "evaluation" / "rows.parquet").drop_columns(["seconds"])
    assert ours.equals(calm.filter(pc.equal(calm["model"], "dmat")))


WAITS = """
import ray
from dmat_ray.cluster.session import await_machines
from dmat_ray.config import ClusterConfig
ray.init(log_to_driver=False)
await_machines(ClusterConfig(gpus_per_worker=1, wait_minutes=10), print, 3)
"""


@pytest.mark.timeout(900)
def test_what_a_job_waited_for_goes_when_it_is_killed(tmp_path):
    cluster = shipped_cluster(cpus=2, idle_seconds=5, gpu_spot=1, gpu_on_demand=1)
    with Head(tmp_path / "head", cluster=cluster, RAY_worker_niceness="0") as head, counted(head) as machines:
        job = head.start(tmp_path / "log", "-u", "-c", WAITS, name="waits")
        wait_for(lambda: machines[-1] == 2, job, seconds=300)  # all that there can be, and one too few
        time.sleep(10)
        assert machines[-1] == 2, "those that are there stay for as long as others are waited for"
        drivers = [p.pid for p in psutil.Process(head.process.pid).children(recursive=True) if p.cmdline()[-1:] == [WAITS]]
        assert drivers
        kill_all(drivers)
        wait_for_none(machines)


def rows(folder: Path) -> object:
    """A set by plain pyarrow, whatever its files are called."""
    return pq.read_table(folder).sort_by("id")


def wait_for_none(machines: list[int], seconds: float = 300) -> None:
    """Until the last machine has gone."""
    end = time.monotonic() + seconds
    while machines[-1] > 0:
        assert time.monotonic() < end, "machines without work stay"
        time.sleep(0.5)
