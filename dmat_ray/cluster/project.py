"""Projection on Ray Data: images are read and decoded by tasks, projected by a pool of actors, written by tasks.

One row is one shard (see `dmat_ray.data.set_writer`), so that Ray moves, repeats and loses whole shards and never has to know
what is in them. Only names and numbers come back to the driver.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from dmat_ray.cluster import environment, gauges, pools, session, shard_tasks
from dmat_ray.cluster.forecast import progress
from dmat_ray.cluster.shard_projector import ShardProjector
from dmat_ray.cluster.shard_tasks import read_shard, write_shard
from dmat_ray.config import Config
from dmat_ray.data import set_writer
from dmat_ray.data.set_writer import Shard
from dmat_ray.errors import UserError
from dmat_ray.manifold import set_maker
from dmat_ray.manifold.set_maker import Begun, encoder_folder
from dmat_ray.models.checkpoint import versions
from dmat_ray.storage import Location
from dmat_ray.storage.files import awaited
from dmat_ray.wording import be, duration, number_of


def project(config: Config, work: Begun, say: Callable[[str], None]) -> dict[str, Any]:
    """Make (or finish) an on-manifold set, and return its manifest. Ray must be connected.

    Raises UserError when the folder cannot be written, or more than `data.max_rejected` of the images is unreadable.
    """
    folder, listing, todo = work.folder, work.listing, work.todo
    total = listing.table.num_rows
    if work.records:
        there = sum(shard.name in work.records for shard in work.shards)
        say(f"going on: {there} of {number_of(len(work.shards), 'shard')} {be(there)} there")
    if again := sum(s.rows.num_rows for s in todo if s.is_supplement):
        say(f"trying again what could not be read: {number_of(again, 'image')}")
    if todo:
        session.await_machines(config.cluster, say)
        actors = min(config.cluster.projection_actors, len(todo))
        least = min(config.cluster.projection_actors_min, actors)
        size = number_of(max(shard.rows.num_rows for shard in todo), "image")
        say(f"starting {number_of(actors, 'actor', least)} for {number_of(len(todo), 'shard')} of {size} at most")
        rejected, seen = 0, False
        for summary in _progress(run_shards(config, folder, listing.class_names, todo), todo, actors, say):
            work.lease.check()
            if summary["written"] and not seen:
                _require_visible(folder, summary["name"])
                seen = True
            rejected += summary["rejected"]
            if rejected > config.data.max_rejected * total:
                break  # more work would not change that
    return set_maker.finish(config, work, {**versions(), "ray": ray.__version__}, say)


def _require_visible(folder: Location, name: str) -> None:
    """Raise UserError unless this machine sees what another has written."""
    if awaited(lambda: set_writer.read_record(folder, name)) is None:
        raise UserError(
            f"shard {name} was written on another machine, but is not to be seen in '{folder}' here: that folder is not "
            "shared by all nodes; give a shared one or an s3:// or gs:// URL as --manifold_set or --output"
        )


def _progress(
    summaries: Iterator[dict[str, Any]], todo: list[Shard], actors: int, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Passes the summaries through, and says how far they are."""
    total = sum(shard.rows.num_rows for shard in todo)
    done, rejected = 0, 0
    with progress(total, actors, "shard", say) as far:
        for summary in summaries:
            size = summary["rows"] + summary["rejected"]
            done += size
            rejected += summary["rejected"]
            gauges.projected(summary["rows"], summary["rejected"])
            if far.done(size):
                speed = f", {duration(far.seconds)}" if done == total else ""
                if done < total and (rate := far.rate()):
                    speed = f", {rate:.1f} images/s{far.to_go()}"
                say(f"projected {done}/{total} images{f', {rejected} rejected' if rejected else ''}{speed}")
            yield summary


def run_shards(
    config: Config, folder: Location, class_names: tuple[str, ...], todo: list[Shard], projector: type = ShardProjector
) -> Iterator[dict[str, Any]]:
    """Read, project and write these shards; yields a summary of each as it is finished. Ray must be connected."""
    if config.projection.start == "encoder":
        place = config.projection.model_copy(update={"encoder": str(encoder_folder(config))})
        config = config.model_copy(update={"projection": place})
    with pools.patient():
        written = _dataset(config, folder, class_names, todo, projector)
    yield from written.iter_rows()


def _dataset(
    config: Config, folder: Location, class_names: tuple[str, ...], todo: Sequence[Shard], projector: type
) -> ray.data.Dataset:
    cluster = config.cluster
    actors = min(cluster.projection_actors, len(todo))
    # alone on a machine, more readers than cores would only be more processes to start
    tasks = ray.data.TaskPoolStrategy(size=max(1, (os.cpu_count() or 1) // 2)) if environment.is_own(cluster) else None
    # one block a shard: Ray then hands out whole shards
    rows = [shard_tasks.work(shard.name, shard.rows) for shard in todo]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        read_shard,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"data": config.data.model_dump(mode="json")},
        compute=tasks,
    )
    projected = shards.map_batches(
        projector,
        fn_constructor_kwargs={"config": config.to_json(), "class_names": list(class_names)},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cluster.threads_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
        # it begins with all: pools have been seen not to grow (ray#59144), and those that find no machine just wait
        compute=ray.data.ActorPoolStrategy(
            min_size=min(cluster.projection_actors_min, actors), max_size=actors, initial_size=actors
        ),
    )
    return projected.map_batches(
        write_shard, batch_size=1, batch_format="pyarrow", fn_kwargs={"folder": str(folder)}, compute=tasks
    )
