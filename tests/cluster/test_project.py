"""Projection on clusters that lose drivers, actors, nodes and memory: the set is that of a calm run, row for row."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import ray.data
from PIL import Image
from ray.cluster_utils import Cluster
from small import finish, processes_below, settings, start_job, wait_for

from dmat_ray.cli import user_error_behind
from dmat_ray.cluster import jobs, pools
from dmat_ray.cluster.session import await_machines
from dmat_ray.config import ClusterConfig
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster
# twenty shards, slow enough that what happens to them happens in the middle
OPTIONS = ("--projection.steps", "16", "--projection.shard_size", "4")
TWO = ("--cluster.projection_actors", "2")
ACTOR = "ShardProjector"


def rows(output: Path) -> dict[str, list[object]]:
    """The whole set, sorted by id, by plain pyarrow."""
    tables = [pq.read_table(path) for path in (output / "on_manifold_set" / "shards").glob("*.parquet")]
    return pa.concat_tables(tables).sort_by("id").to_pydict()


def written(output: Path) -> list[Path]:
    return sorted((output / "on_manifold_set" / "shards").glob("part-*.parquet"))


@pytest.fixture(scope="module")
def calm(ray_session, impatient, tmp_path_factory) -> Path:
    """The output folder of a projection that nothing disturbed, with one actor; the others have two."""
    output = tmp_path_factory.mktemp("calm")
    jobs.project(settings(output, *OPTIONS), print)
    return output


@pytest.mark.exhaustive
def test_killed_driver_goes_on_and_a_second_one_is_refused(tmp_path, calm):
    process = start_job("project.py", tmp_path, *OPTIONS, *TWO)
    wait_for(lambda: len(written(tmp_path)) >= 2, process)
    with pytest.raises(UserError, match=f"is being written by process {process.pid} on "):
        jobs.project(settings(tmp_path, *OPTIONS), print)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "on_manifold_set" / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in written(tmp_path)}
    assert 2 <= len(before) < 20
    (tmp_path / "on_manifold_set" / "shards" / ".0123456789abcdef.partial").write_bytes(b"what a write in a kill leaves")
    assert f"going on: {len(before)} of 20" in finish(start_job("project.py", tmp_path, *OPTIONS, *TWO))
    assert before == {path.name: path.stat().st_mtime_ns for path in written(tmp_path) if path.name in before}
    assert rows(tmp_path) == rows(calm)
    assert {path.name for path in (tmp_path / "on_manifold_set").iterdir()} == {"manifest.json", "settings.json", "shards"}
    assert len(list((tmp_path / "on_manifold_set" / "shards").iterdir())) == 20, "nothing of what was cut short is left"
    assert inspect_set(tmp_path / "on_manifold_set").sound


def test_a_projection_that_is_asked_to_stop_ends_in_a_line(tmp_path):
    """As Ray's own handler would not end it: in an abort and a trace of all threads."""
    process = start_job("project.py", tmp_path, *OPTIONS)
    wait_for(lambda: len(written(tmp_path)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said.splitlines()[-1]) == (128 + signal.SIGTERM, "interrupted; give the same command again")
    assert "Traceback" not in said


def test_other_settings_are_refused_over_what_is_there(calm, tmp_path):
    for options, words in (
        (("--projection.lr", "0.5"), "projection.lr = 0.1, now it is 0.5"),
        (("--projection.shard_size", "7"), "projection.shard_size = 4, now it is 7"),
        (("--generator.precision", "fast"), "generator_precision = reference, now it is fast"),
        (("--data.train_limit", "61"), "data.train_limit = 60, now it is 61"),
    ):
        with pytest.raises(UserError, match=words):
            jobs.project(settings(calm, *OPTIONS, *options), print)
    lines: list[str] = []
    jobs.project(settings(calm, *OPTIONS, "--projection.batch_size", "3", "--data.max_rejected", "1"), lines.append)
    assert "the on-manifold set is whole and unchanged, nothing to do" in lines


class Nodes:
    """A Ray cluster of several nodes on this machine: a head that computes nothing, and nodes with one logical GPU each."""

    def __init__(self) -> None:
        # less memory for objects than the images of one run take
        self._store = 80 * 1024 * 1024
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": self._store, "include_dashboard": False}
        )
        for _ in range(2):
            self.add()

    def add(self) -> Any:
        """A node whose GPU is not there, and whose processes know it."""
        return self.cluster.add_node(
            num_cpus=2,
            num_gpus=1,
            resources={"place": 1},
            object_store_memory=self._store,
            env_vars={"DMAT_RAY_LOGICAL_GPUS": "1"},
        )

    def actors(self) -> list[psutil.Process]:
        """The actors' processes on all nodes."""
        return processes_below(os.getpid(), ACTOR)

    def actors_on(self, node: Any) -> list[psutil.Process]:
        """The actors' processes on one node."""
        return processes_below(node.all_processes["raylet"][0].process.pid, ACTOR)

    def remove_one_with_an_actor(self) -> None:
        """Kill a node and all of its processes, as when a machine is taken away."""
        node = next(node for node in self.cluster.worker_nodes if self.actors_on(node))
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.cluster.shutdown()


@pytest.fixture
def start_on(nodes: Nodes) -> Callable[..., "subprocess.Popen[str]"]:
    """start_on(output, options): a projection job on the nodes, an actor on each GPU."""

    def start(output: Path, *options: object) -> "subprocess.Popen[str]":
        cluster = ("--cluster.address", nodes.cluster.address, "--cluster.gpus_per_worker", "1")
        return start_job("project.py", output, *TWO, *cluster, *map(str, options))

    return start


def busy(process: psutil.Process) -> bool:
    """Whether an actor is in the middle of a shard: nothing else keeps it computing."""
    return process.cpu_percent(interval=0.2) > 30


def test_killed_actor_lost_machine_and_one_that_comes_later(nodes, start_on, tmp_path, calm):
    process = start_on(tmp_path, *OPTIONS)
    wait_for(lambda: len(written(tmp_path)) >= 2 and len(nodes.actors()) == 2, process)
    victim, other = nodes.actors()
    wait_for(lambda: busy(victim), process)
    other.suspend()  # so that there is work left for those that come
    victim.kill()
    wait_for(lambda: len(nodes.actors()) == 2 and victim.pid not in [actor.pid for actor in nodes.actors()], process)
    other.resume()
    nodes.remove_one_with_an_actor()
    wait_for(lambda: len(nodes.actors()) == 1, process)
    (alone,) = nodes.actors()
    alone.suspend()
    new = nodes.add()
    before = len(written(tmp_path))
    assert before < 18
    wait_for(lambda: bool(nodes.actors_on(new)) and len(written(tmp_path)) > before + 1, process)
    alone.resume()
    finish(process)
    assert len(written(tmp_path)) == 20
    assert rows(tmp_path) == rows(calm)


HOLDER = """
import sys, numpy, ray
from ray._private.internal_api import memory_summary

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, resources={"place": 1})
class Holder:
    def __init__(self):
        self.held = [ray.put(numpy.ones(20_000_000, numpy.uint8)) for _ in range(3)]

    def ready(self):
        return len(self.held)

holders = [Holder.remote() for _ in range(2)]
print(ray.get([holder.ready.remote() for holder in holders]), flush=True)
sys.stdin.read()
print(memory_summary(sys.argv[1], stats_only=True))
"""


@pytest.mark.exhaustive
def test_full_object_store_corrupt_images_and_their_repair(nodes, start_on, tmp_path):
    """Images of more than the nodes' memory for objects, most of which somebody else holds; one is corrupt, then repaired."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (820, 820, 3), dtype=np.uint8)).save(tmp_path / "photos" / label / f"{i:02}.png")
    bad = tmp_path / "photos" / "a" / "07.png"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    assert sum(p.stat().st_size for p in (tmp_path / "photos").rglob("*.png")) > 150e6
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, nodes.cluster.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "[3, 3]\n"
    options = (
        *("--data.source", tmp_path / "photos", "--data.train_limit", "null", "--data.test_limit", "null"),
        *("--projection.steps", 1, "--projection.shard_size", 8),
    )
    output = tmp_path / "out"
    process = start_on(output, *options)
    refused, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "1 of 80 images were rejected, more than data.max_rejected = 0.01; the first: 'a/07.png' " in refused
    before = {path.name: path.stat().st_mtime_ns for path in written(output)}
    assert "part-000000.parquet" in before

    bad.write_bytes(good)
    finish(start_on(output, *options))
    told, _ = holder.communicate()
    spilled = re.search(r"Spilled (\d+) MiB", told)
    assert spilled is not None, told
    assert int(spilled[1]) > 50
    after = {path.name: path.stat().st_mtime_ns for path in written(output)}
    assert after.keys() == {*(f"part-{k:06d}.parquet" for k in range(10)), "part-000000-1.parquet"}
    assert {name: after[name] for name in before} == before, "what was finished is not projected again"
    manifest = json.loads((output / "on_manifold_set" / "manifest.json").read_text())
    assert (manifest["count"], manifest["rejected"]) == (80, {})
    found = rows(output)
    assert len(set(found["id"])) == 80
    assert found["image"][found["id"].index("a/07.png")]["bytes"] == good


def test_machines_that_do_not_come_are_not_waited_for_for_ever(ray_session, say, lines, monkeypatch):
    await_machines(ClusterConfig(), say)
    assert lines == []
    asked = ClusterConfig(threads_per_worker=64, gpus_per_worker=1, wait_minutes=0.02)
    with pytest.raises(UserError, match=r"no node with 64 CPU and 1 GPU came within 0\.02 minutes; start one, lower"):
        await_machines(asked, say)
    assert lines.pop() == "no node has 64 CPU and 1 GPU: asking the autoscaler, and waiting 0.02 minutes for one"
    # a training has all of its workers or does not begin
    room = int(sum(node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"]))
    await_machines(ClusterConfig(), say, room)
    assert lines == []
    # what is streamed needs a CPU that no worker has; of elastic trainings as many are counted as there may be
    await_machines(ClusterConfig(), say, 1, streamed=room - 1)
    assert lines == []
    soon, asked_for = ClusterConfig(wait_minutes=0.02), []
    groups = importlib.import_module("ray.util.placement_group")  # ray.util has a function of that name
    make = groups.placement_group
    monkeypatch.setattr(groups, "placement_group", lambda bundles: asked_for.append(bundles) or make(bundles))
    with pytest.raises(
        UserError, match=r"no CPU beside the workers' came within 0\.02 minutes, and training\.loader stream reads"
    ):
        await_machines(soon, say, 1, streamed=room + 3)
    assert sum(bundle["CPU"] for (bundle,) in asked_for) == room + 1, "what an autoscaler sees is more than there is"
    assert lines.pop().startswith("the workers take all CPUs, and training.loader stream needs another: asking the autoscaler, ")
    with pytest.raises(
        UserError, match=rf"room for only {room} of {room + 1} workers with 1 CPU each came within .* lower cluster.train_w"
    ):
        await_machines(asked.model_copy(update={"threads_per_worker": 1, "gpus_per_worker": 0}), say, room + 1)
    assert lines[0].startswith(f"the nodes have room for {room} of {room + 1} workers with 1 CPU each: asking the autoscaler, ")


ASKER = """
import sys, ray
from dmat_ray.cluster.session import device_of_actor
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
try:
    print(ray.get(ray.remote(device_of_actor).options(num_gpus=1, resources={"unaware": 1}).remote()))
except ray.exceptions.RayTaskError as error:
    print(error.cause)
"""


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_compute_on_the_cpu(nodes):
    node = nodes.cluster.add_node(num_cpus=1, num_gpus=1, resources={"unaware": 1})
    command = [sys.executable, "-c", ASKER, nodes.cluster.address]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True).stdout
    nodes.cluster.remove_node(node)
    assert "a GPU, but torch" in answer
    assert "finds none there" in answer


WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dmat_ray":
            raise ModuleNotFoundError("No module named 'dmat_ray'")

sys.meta_path.insert(0, Without())
"""


@pytest.mark.exhaustive
def test_nodes_without_the_drivers_packages_are_refused_before_anything_runs(nodes, start_on, tmp_path):
    metadata = tmp_path / "site" / "torch-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sitecustomize.py").write_text(WITHOUT)
    added = [nodes.cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path / name)}) for name in ("site", "none")]
    process = start_on(tmp_path / "out", *OPTIONS)
    told, _ = process.communicate(timeout=400)
    for node in added:
        nodes.cluster.remove_node(node)
    assert process.returncode == 2, told
    assert "has torch 9.9.9 (the driver has 2." in told
    assert re.search(r"node \S+ cannot run what the driver sends: .*No module named 'dmat_ray'", told), told
    assert not written(tmp_path / "out")


class Unbuildable:
    """An actor that fails of what only a user can mend."""

    def __init__(self) -> None:
        raise UserError("there is no 'vgg.pth' on this node; copy it")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


# actors do not have this file
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_what_an_actor_cannot_be_built_for_reaches_the_user(ray_session):
    pool = ray.data.ActorPoolStrategy(size=1)
    with pools.patient(), pytest.raises(ray.exceptions.RayError) as failed:
        ray.data.range(1).map_batches(Unbuildable, batch_size=1, compute=pool).take_all()
    assert str(user_error_behind(failed.value)) == "there is no 'vgg.pth' on this node; copy it"


@pytest.mark.exhaustive
def test_images_and_set_in_an_object_store(store, ray_session, tmp_path, lines, say):
    """A real S3 server on loopback: everything by URL, a lost shard made again, the set sound and readable."""
    rng = np.random.default_rng(0)
    photos = {}
    for label in ("a", "b"):
        for i in range(12):
            path = tmp_path / f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(path)
            photos[f"photos/{label}/ü {i}#.png"] = path.read_bytes()
    store.put("images", photos)
    store.put("sets", {})
    output, place = tmp_path / "out", "s3://sets/mine/set"
    options = (
        *("--data.source", "s3://images/photos", "--manifold_set", place, "--data.train_limit", "null"),
        *("--data.test_limit", "null", "--projection.steps", "1", "--projection.shard_size", "5"),
    )
    jobs.project(settings(output, *options), say)
    objects = {o["Key"] for o in store.client().list_objects_v2(Bucket="sets")["Contents"] if o["Size"]}
    shards = {f"mine/set/shards/part-{k:06d}.parquet" for k in range(5)}
    assert objects == {"mine/set/manifest.json", "mine/set/settings.json", *shards}
    train = open_set(place, "train")
    assert len(train) + len(open_set(place, "test")) == 24
    assert not (output / "on_manifold_set").exists()

    lost = "mine/set/shards/part-000003.parquet"
    store.client().delete_object(Bucket="sets", Key=lost)
    before = len(store.requests())
    jobs.project(settings(output, *options), say)
    assert "going on: 4 of 5 shards are there" in lines
    puts = [r.split("?")[0] for r in store.requests()[before:] if r.startswith("PUT") and "/shards/" in r]
    assert puts == [f"PUT /sets/{lost}"]
    again = open_set(place, "train")
    assert again.id == train.id
    np.testing.assert_array_equal(again.w, train.w)
    inspected = start_job("inspect_set.py", output, "--manifold_set", place)
    assert "the set is sound" in finish(inspected)
