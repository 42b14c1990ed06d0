"""Projection on Ray Data: images are read and decoded by tasks, projected by a pool of actors, written by tasks.

One row is one shard (see `dmat_ray.data.set_writer`), so that Ray moves, repeats and loses whole shards and never has to know
what is in them. Only names and numbers come back to the driver.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from dmat_ray.checkpoint import versions
from dmat_ray.cluster import session
from dmat_ray.cluster.context import device_of_actor
from dmat_ray.config import Config, DataConfig, ProjectionConfig
from dmat_ray.data import manifold_set, set_writer
from dmat_ray.data.decoding import decode
from dmat_ray.data.manifold_set import MANIFEST
from dmat_ray.data.set_writer import Shard
from dmat_ray.data.sources import Listing, list_examples, read
from dmat_ray.errors import UserError
from dmat_ray.lease import Lease
from dmat_ray.manifold import encoder, generators
from dmat_ray.manifold.projection import Projector
from dmat_ray.storage import Location, at

# what may change over a half-finished set: results depend on it by rounding only
HARMLESS = {"batch_size", "compile", "encoder"}
SAY_EVERY_S = 5.0
# what a moment later may be gone: a refused connection, a storage that answers too slowly
PASSING = ["OSError", "cannot be written", "cannot be read"]


def _as_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def pack(name: str, table: pa.Table, rejected: dict[str, str], seconds: float) -> pa.Table:
    """A shard as one row. Its table travels as bytes, which are not copied when they are opened again."""
    content = _as_bytes(table)
    ends = pa.py_buffer(np.array([0, content.size], np.int64))
    payload = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content])
    return pa.table({"name": [name], "payload": payload, "rejected": [json.dumps(rejected)], "seconds": [seconds]})


def unpack(row: pa.Table) -> tuple[str, pa.Table, dict[str, str], float]:
    """What `pack` was given."""
    table = pa.ipc.open_stream(row["payload"][0].as_buffer()).read_all()
    return row["name"][0].as_py(), table, json.loads(row["rejected"][0].as_py()), row["seconds"][0].as_py()


def read_shard(row: pa.Table, *, data: dict[str, Any]) -> pa.Table:
    """A task: the images of a shard, encoded and decoded; those that cannot be read are set aside with the reason."""
    name, wanted, _, _ = unpack(row)
    config = DataConfig.model_validate(data)
    keep, contents, pixels, rejected = [], [], [], {}
    for i, (id, content) in enumerate(zip(wanted["id"].to_pylist(), read(wanted, config), strict=True)):
        try:
            if isinstance(content, str):
                raise ValueError(content)
            pixels.append(decode(content, config.resolution, config.channels, config.max_pixels))
        except ValueError as error:
            rejected[id] = str(error)
            continue
        keep.append(i)
        contents.append(content)
    shape = (config.channels, config.resolution, config.resolution)
    chosen = wanted.select(["id", "split", "label"]).take(pa.array(keep, pa.int64()))
    images = np.stack(pixels) if pixels else np.empty((0, *shape), np.uint8)
    chosen = chosen.append_column("image", pa.array(contents, pa.large_binary()))
    chosen = chosen.append_column("pixels", manifold_set.fixed_list(images, pa.uint8()))
    return pack(name, chosen, rejected, 0.0)


class ShardProjector:
    """An actor: projects the images of a shard."""

    def __init__(self, config: dict[str, Any], class_names: list[str]) -> None:
        self.config, self.class_names = Config.model_validate(config), class_names
        device = device_of_actor()
        torch.set_num_threads(self.config.cluster.threads_per_worker)
        self.projector = build_projector(self.config, device)

    def __call__(self, row: pa.Table) -> pa.Table:
        return project_shard(self.projector, row, self.config.projection, self.class_names)


def project_shard(projector: Projector, row: pa.Table, settings: ProjectionConfig, class_names: list[str]) -> pa.Table:
    """The rows of the set for the images of one shard, with what could not be read passed on."""
    name, images, rejected, _ = unpack(row)
    began, generator = time.monotonic(), projector.generator
    shape = (generator.channels, generator.resolution, generator.resolution)
    schema = manifold_set.schema(generator.channels, generator.resolution, generator.num_ws, generator.w_dim, class_names)
    if images.num_rows == 0:
        return pack(name, schema.empty_table(), rejected, 0.0)
    ids = images["id"].to_pylist()
    found = projector.project(torch.from_numpy(manifold_set.from_lists(images["pixels"], shape)), ids)
    l1, lpips = found.l1_B.numpy(), found.lpips_B.numpy()
    poor = ~(l1 <= settings.poor_l1)  # what is not a number is poor as well
    if settings.poor_lpips is not None:
        poor |= ~(lpips <= settings.poor_lpips)
    columns = {
        "id": ids,
        "split": images["split"].cast(pa.string()),
        "label": images["label"].cast(pa.int64()),
        "image": [{"bytes": content, "path": id} for content, id in zip(images["image"].to_pylist(), ids, strict=True)],
        "on_manifold": manifold_set.to_netpbm(manifold_set.quantise(found.x_BCHW)),
        "w": manifold_set.fixed_list(found.w_BLD.numpy(), pa.float32()),
        "lpips": lpips,
        "l1": l1,
        "l2": found.l2_B.numpy(),
        "steps": found.steps_B.numpy(),
        "status": np.where(poor, "poor", "ok"),
    }
    return pack(name, pa.table(columns, schema=schema), rejected, time.monotonic() - began)


def write_shard(row: pa.Table, *, folder: str) -> pa.Table:
    """A task: writes a shard into the set, and returns what the driver wants to know of it."""
    name, table, rejected, seconds = unpack(row)
    try:
        set_writer.write_shard(at(folder), name, table, rejected)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror or error}") from None
    return pa.table({"name": [name], "rows": [table.num_rows], "rejected": [len(rejected)], "seconds": [seconds]})


def build_projector(config: Config, device: torch.device) -> Projector:
    """The projector that the settings describe, with its generator and encoder. Raises UserError for what does not fit."""
    generator = generators.load_configured(config.generator, device)
    generators.require_images(generator, config.generator.path, config.data.channels, config.data.resolution)
    start = None
    if config.projection.start == "encoder":
        folder = encoder_folder(config)
        start = encoder.load_encoder(folder, generators.fingerprint(config.generator.path), device)
    return Projector(generator, config.projection, device, start)


def encoder_folder(config: Config) -> Any:
    """The folder of the encoder that projection starts from."""
    return encoder.locate_encoder(config.projection.encoder, at(config.output).local, config.generator.path)


def settings_of(config: Config, listing: Listing) -> dict[str, Any]:
    """What a set depends on: two runs with equal settings make the same set."""
    settings = {
        "data": config.data.model_dump(mode="json", exclude={"max_rejected"}),
        "projection": config.projection.model_dump(mode="json", exclude=HARMLESS),
        "generator_sha256": generators.fingerprint(config.generator.path),
        "generator_precision": config.generator.precision,
        "class_names": list(listing.class_names),
        "examples": listing.table.num_rows,
        "listing_sha256": _digest(listing),
    }
    if config.projection.start == "encoder":
        settings["encoder_sha256"] = encoder.fingerprint_encoder(encoder_folder(config))
    return settings


def _digest(listing: Listing) -> str:
    """Changes when an image is added, removed, renamed or relabelled.

    Not when a file's content changes: a repaired image must not undo a half-finished set.
    """
    columns = (listing.table[name].to_pylist() for name in ("id", "split", "label"))
    return manifold_set.text_digest("\n".join(f"{id}\t{split}\t{label}" for id, split, label in zip(*columns, strict=True)))


def prepare(config: Config) -> Listing:
    """Check everything a projection needs; returns the images. Needs no Ray, and writes nothing.

    Raises UserError for data, a generator, an encoder or LPIPS weights that do not fit.
    """
    listing = list_examples(config.data)
    probe = config.model_copy(update={"projection": config.projection.model_copy(update={"candidates": 1})})
    build_projector(probe, torch.device("cpu"))
    return listing


def project(config: Config, folder: Location, listing: Listing, lease: Lease, say: Callable[[str], None]) -> dict[str, Any]:
    """Make (or finish) the on-manifold set in `folder`, which `lease` holds, and return its manifest. Ray must be connected.

    Raises UserError when the folder cannot be written, or more than `data.max_rejected` of the images is unreadable.
    """
    (folder / MANIFEST).unlink()
    shards = set_writer.plan(listing, config.projection.shard_size)
    records = set_writer.read_records(folder)
    todo = set_writer.unfinished(shards, records)
    if records:
        say(f"going on: {len(shards) - sum(s in shards for s in todo)} of {len(shards)} shards are there")
    if todo:
        _announce(config, len(todo), say)
        for _ in _progress(run_shards(config, folder, listing.class_names, todo), todo, say):
            lease.check()
    shares = set_writer.rejected_of(shards, set_writer.read_records(folder))
    total = listing.table.num_rows
    if len(shares) > config.data.max_rejected * total or len(shares) == total:
        first, reason = next(iter(shares.items()))
        raise UserError(
            f"{len(shares)} of {total} images were rejected, more than data.max_rejected = {config.data.max_rejected}; "
            f"the first: '{first}' {reason}. Repair or replace the files, or raise data.max_rejected, and run again"
        )
    lease.check()
    generator = generators.load_configured(config.generator)
    size = generator.resolution
    described = {
        "shapes": {"on_manifold": [generator.channels, size, size], "w": [generator.num_ws, generator.w_dim]},
        "lpips_is_perceptual": config.projection.lpips_weights != "random",
        "versions": {**versions(), "ray": ray.__version__},
    }
    return set_writer.finish(folder, settings_of(config, listing), shards, described)


def _announce(config: Config, count: int, say: Callable[[str], None]) -> None:
    cluster = config.cluster
    actors = min(cluster.projection_actors, count)
    least = min(cluster.projection_actors_min, actors)
    say(f"starting {actors if least == actors else f'{least} to {actors}'} actors for {count} shards")
    if cluster.gpus_per_worker > 0 and ray.cluster_resources().get("GPU", 0) < cluster.gpus_per_worker:
        say(
            f"no node has {cluster.gpus_per_worker:g} GPU yet: waiting for the autoscaler to bring one "
            "(cluster.gpus_per_worker 0 would do without)"
        )


def _progress(summaries: Iterator[dict[str, Any]], todo: list[Shard], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Passes the summaries through, and says how far they are."""
    total = sum(shard.rows.num_rows for shard in todo)
    began = time.monotonic()
    done, rejected, spoke = 0, 0, began
    for summary in summaries:
        done += summary["rows"] + summary["rejected"]
        rejected += summary["rejected"]
        now = time.monotonic()
        if now - spoke > SAY_EVERY_S or done == total:
            rate, spoke = done / (now - began), now
            left = f", {(total - done) / rate:.0f} s to go" if done < total else ""
            aside = f", {rejected} rejected" if rejected else ""
            say(f"projected {done}/{total} images, {rate:.1f} images/s{aside}{left}")
        yield summary


def run_shards(
    config: Config, folder: Location, class_names: tuple[str, ...], todo: list[Shard], projector: type = ShardProjector
) -> Iterator[dict[str, Any]]:
    """Read, project and write these shards; yields a summary of each as it is finished. Ray must be connected."""
    cluster = config.cluster
    actors = min(cluster.projection_actors, len(todo))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # spot machines may be hours away
    context.retried_map_errors, context.max_map_retries = PASSING, 2
    context.max_consecutive_actor_init_deaths = 3
    if config.projection.start == "encoder":
        place = config.projection.model_copy(update={"encoder": str(encoder_folder(config))})
        config = config.model_copy(update={"projection": place})
    # alone on a machine, more readers than cores would only be more processes to start
    tasks = ray.data.TaskPoolStrategy(size=max(1, (os.cpu_count() or 1) // 2)) if session.is_own(cluster) else None
    # one block a shard: Ray then hands out whole shards
    rows = [
        {"name": shard.name, "payload": _as_bytes(shard.rows).to_pybytes(), "rejected": "{}", "seconds": 0.0} for shard in todo
    ]
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
    written = projected.map_batches(
        write_shard, batch_size=1, batch_format="pyarrow", fn_kwargs={"folder": str(folder)}, compute=tasks
    )
    yield from written.iter_rows()
