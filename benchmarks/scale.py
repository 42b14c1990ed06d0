"""How projection and training scale with nodes, what Ray adds to projection, and whether memory grows with the set.

    python benchmarks/scale.py nodes --nodes 1 2 4 8
    python benchmarks/scale.py overhead --shards 16 --steps 100
    python benchmarks/scale.py memory --shards 40 400

`nodes` and `memory` put stand-ins in place of what computes, so that one machine can play many GPUs: a projector that sleeps
so many seconds a shard and returns random codes, a training step that trains on its images as they are and sleeps until it
has taken so many seconds an example. What is measured is everything around them: reading, decoding, moving, writing,
gradients, reports, the driver. A node is a raylet of its own with two CPUs, beside a head that computes nothing. `overhead`
runs the real projector, once bare in a loop over images that are in memory, and once as an actor that is given them by Ray,
both with one CPU thread, after what each needs to start.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from generator import ALLOCATOR, restart_with

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.cluster.session import connected
from dmat_ray.config import Config
from dmat_ray.data import set_format, set_writer
from dmat_ray.data.sources import Listing, list_examples
from dmat_ray.storage import at

EXAMPLES = 1600  # that the step's stand-in is trained on


def settings(output: Path, *options: object) -> Config:
    """The demo's settings with these on top."""
    config, _ = cli.parse("", ["--preset", "demo", "--output", str(output), *map(str, options)])
    return config


def repeated(listing: Listing, count: int) -> Listing:
    """A listing of `count` images: the same ones, under new ids."""
    rows = listing.table.take(pa.array(np.arange(count) % listing.table.num_rows))
    ids = pa.array([f"image-{i:08d}" for i in range(count)])
    return Listing(rows.set_column(rows.schema.get_field_index("id"), "id", ids), listing.class_names)


def stand_in(seconds: float) -> type:
    """A projector's place, held by one that takes `seconds` a shard."""

    class StandIn:
        def __init__(self, config: dict[str, Any], class_names: list[str]) -> None:
            self.config, self.class_names = Config.model_validate(config), class_names

        def __call__(self, row: pa.Table) -> pa.Table:
            from dmat_ray.cluster.shard_tasks import pack, unpack

            name, images, rejected, _ = unpack(row)
            began, count, size = time.monotonic(), images.num_rows, self.config.data.resolution
            pixels = set_format.from_lists(images["pixels"], (1, size, size))
            zeros = np.zeros(count, np.float32)
            columns = {
                "id": images["id"],
                "split": images["split"].cast(pa.string()),
                "label": images["label"].cast(pa.int64()),
                "image": [{"bytes": content, "path": None} for content in images["image"].to_pylist()],
                "on_manifold": set_format.to_netpbm(pixels),
                "w": set_format.fixed_list(np.random.default_rng(0).standard_normal((count, 8, 64), np.float32), pa.float32()),
                **dict.fromkeys(set_format.ERRORS, zeros),
                "steps": zeros.astype(np.int32),
                "status": ["ok"] * count,
            }
            table = pa.table(columns, schema=set_format.schema(1, size, 8, 64, self.class_names))
            time.sleep(max(0.0, seconds - (time.monotonic() - began)))
            return pack(name, table, rejected, seconds)

    return StandIn


def timed() -> type:
    """The projector's actor, which leaves the moments at which it began and ended each shard in OUTPUT/moments."""
    from dmat_ray.cluster.shard_projector import ShardProjector

    class Timed(ShardProjector):
        def __call__(self, row: pa.Table) -> pa.Table:
            began = time.monotonic()
            done = super().__call__(row)
            Path(self.config.output).mkdir(parents=True, exist_ok=True)
            with (Path(self.config.output) / "moments").open("a") as file:
                file.write(f"{began} {time.monotonic()}\n")
            return done

    return Timed


def run(config: Config, listing: Listing, projector: type) -> list[float]:
    """Project all shards of `listing`; returns the moments at which they were finished."""
    from dmat_ray.cluster import project

    folder = at(config.output)
    shards = set_writer.plan(listing, config.projection.shard_size)
    moments = []
    for _ in project.run_shards(config, folder, listing.class_names, shards, projector):
        moments.append(time.monotonic())
    return moments


def nodes(args: argparse.Namespace, root: Path) -> None:
    """Node-seconds an image, and an example of an epoch, beside the stand-ins' own; for clusters of several sizes."""
    from ray.cluster_utils import Cluster

    small = ("--data.train_limit", EXAMPLES, "--data.test_limit", 20, "--projection.lpips", 0, "--projection.steps", 1)
    prepared = settings(root / "set", *small)
    from dmat_ray.cluster import jobs

    jobs.project(prepared, lambda line: None)
    print(f"a shard of 50 images takes {args.shard_seconds} s, an example of training {args.example_seconds} s")
    for count in args.nodes:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(count):
            cluster.add_node(num_cpus=2)
        where = ("--cluster.address", cluster.address)
        try:
            config = settings(root / f"{count}", *where, "--cluster.train_workers", count)
            with connected(config.cluster):
                projecting = projected(config, args, count)
                training = trained(config, args, count, str(root / "set" / "on_manifold_set"))
        finally:
            cluster.shutdown()
        print(
            f"{count} node{'s' if count > 1 else ''}: "
            f"{1000 * projecting:.1f} ms an image, {args.shard_seconds / 50 / projecting:.1%} of the ideal rate; "
            f"{1000 * training:.1f} ms an example of an epoch, {args.example_seconds / training:.1%}",
            flush=True,
        )


def projected(config: Config, args: argparse.Namespace, actors: int) -> float:
    """Actor-seconds an image, from when every actor has finished two shards to the last shard but one round."""
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"projection_actors": actors, "projection_actors_min": actors})}
    )
    config = config.model_copy(update={"projection": config.projection.model_copy(update={"shard_size": 50})})
    shards = args.shards * actors
    moments = run(config, repeated(list_examples(config.data), 50 * shards), stand_in(args.shard_seconds))
    first, last = 2 * actors, len(moments) - actors
    return float(actors * (moments[last - 1] - moments[first - 1]) / (50 * (last - first)))


def trained(config: Config, args: argparse.Namespace, workers: int, place: str) -> float:
    """Worker-seconds an example of an epoch that is not the first, checkpoint and report included; batches of 20 a worker."""
    from dmat_ray.cluster import workers as ray_train
    from dmat_ray.cluster.events import listen

    options = ("--preset", "demo", "standard", "--training.batch_size", 20 * workers, "--training.epochs", 3)
    plain = ("--training.val_examples", 0, "--cluster.train_workers", workers, "--output", config.output)
    given, _ = cli.parse("", [str(o) for o in (*options, *plain)])
    moments: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if "metrics" in event:
            moments.append(time.monotonic())

    with listen(note) as mailbox:
        told = {"configs": [given.to_json()], "set": place, "mailbox": mailbox, "example_seconds": args.example_seconds}
        cluster = given.cluster.model_copy(update={"address": config.cluster.address})
        ray_train.fit(sleepy_worker, told, cluster, Path(config.output).resolve() / "train" / "scale", keep=1)
    return (moments[2] - moments[0]) / 2 * workers / EXAMPLES


def sleepy_worker(told: dict[str, Any]) -> None:
    """What every worker runs: the real loop, whose steps sleep first."""
    from dmat_ray.cluster import train
    from dmat_ray.training.step import TrainingStep

    plain = TrainingStep.__call__

    def sleepy(self: TrainingStep, batch: Any, *rest: Any) -> Any:
        began = time.monotonic()
        found = plain(self, batch, *rest)
        time.sleep(max(0.0, told["example_seconds"] * len(batch) - (time.monotonic() - began)))
        return found

    TrainingStep.__call__ = sleepy  # type: ignore[method-assign]
    train.worker(told)


def overhead(args: argparse.Namespace, root: Path) -> None:
    """Time from shard to shard in one actor, over that of the bare projector and over what the actor spends inside its calls."""
    import torch

    from dmat_ray.data.reading import read_pixels
    from dmat_ray.manifold.set_maker import build_projector

    options = ("--projection.steps", args.steps, "--projection.shard_size", 50, "--cluster.projection_actors", 1)
    torch.set_num_threads(1)
    config = settings(root / "plain", *options)
    listing = repeated(list_examples(config.data), 50 * args.shards)
    projector = build_projector(config, torch.device("cpu"))
    shards = [shard.rows for shard in set_writer.plan(listing, 50)]
    images = [torch.from_numpy(np.stack(read_pixels(rows, config.data))) for rows in shards]
    for repeat in range(args.rounds):
        moments = []
        for rows, x in zip(shards, images, strict=True):
            projector.project(x, rows["id"].to_pylist())
            moments.append(time.monotonic())
        plain = (moments[-1] - moments[0]) / (len(moments) - 1)
        ray_config = settings(root / f"ray{repeat}", *options)
        with connected(ray_config.cluster):
            run(ray_config, listing, timed())
        began, ended = np.loadtxt(Path(ray_config.output) / "moments").T
        on_ray, inside = (ended[-1] - ended[0]) / (len(ended) - 1), (ended - began)[1:].mean()
        print(
            f"a shard of 50 images: {plain:.2f} s bare; {on_ray:.2f} s on Ray, {inside:.2f} s of them in the actor: "
            f"{on_ray / plain - 1:+.1%} and {on_ray / inside - 1:+.1%}"
        )


def memory(args: argparse.Namespace, root: Path) -> None:
    """Peak memory of the driver, of the largest of Ray's workers and of the object store, for sets of several sizes."""
    for shards in args.shard_counts:
        config = settings(root / f"{shards}", "--projection.shard_size", 50)
        peak = {"driver": 0, "worker": 0, "store": 0}
        stop = threading.Event()

        def watch(peak: dict[str, int] = peak, stop: threading.Event = stop) -> None:
            own = psutil.Process()
            while not stop.wait(0.2):
                peak["store"] = max(peak["store"], in_object_store())
                peak["driver"] = max(peak["driver"], own.memory_full_info().uss)
                for child in own.children(recursive=True):
                    try:
                        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::"):
                            peak["worker"] = max(peak["worker"], child.memory_full_info().uss)
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue

        with connected(config.cluster):
            listing = repeated(list_examples(config.data), 50 * shards)
            thread = threading.Thread(target=watch, daemon=True)
            thread.start()
            run(config, listing, stand_in(0.0))
            stop.set()
            thread.join()
        mib = {name: f"{value / 2**20:.0f} MiB" for name, value in peak.items()}
        print(f"{50 * shards} images: driver {mib['driver']}, largest worker {mib['worker']}, object store {mib['store']}")


def in_object_store() -> int:
    """Bytes that Ray's object store holds on this machine."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    return int(get_memory_info_reply(get_state_from_address(address)).store_stats.object_store_bytes_used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = parser.add_subparsers(required=True)
    part = sections.add_parser("nodes")
    part.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    part.add_argument("--shards", type=int, default=12, help="shards a node")
    part.add_argument("--shard-seconds", type=float, default=4.0, help="time that the projector's stand-in takes a shard")
    part.add_argument("--example-seconds", type=float, default=0.02, help="time that the step's stand-in takes an example")
    part.set_defaults(section=nodes)
    part = sections.add_parser("overhead")
    part.add_argument("--shards", type=int, default=16)
    part.add_argument("--steps", type=int, default=100)
    part.add_argument("--rounds", type=int, default=2)
    part.set_defaults(section=overhead)
    part = sections.add_parser("memory")
    part.add_argument("--shards", type=int, nargs="+", default=[40, 400], dest="shard_counts")
    part.set_defaults(section=memory)
    args = parser.parse_args()
    # the bare process and Ray's get their memory in the same way, which the times depend on
    restart_with({**ALLOCATOR, "OMP_NUM_THREADS": "1"})
    prepare_environment()
    with tempfile.TemporaryDirectory() as root:
        args.section(args, Path(root))


if __name__ == "__main__":
    main()
