"""Projection on a Ray Data actor pool.

The examples, sorted by id, are cut into shards of one batch; shard k is always the same examples and always the same
file, written to a temporary name and renamed. So a rerun does the missing shards only, the set does not depend on
the number of actors, and the manifest, written last, says that all are there.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch

from dmat_ray.checkpoint import versions
from dmat_ray.cluster.context import device_of_actor
from dmat_ray.config import Config
from dmat_ray.data import manifold_set
from dmat_ray.data.sources import Example, Listing, decode, list_examples, to_unit
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.manifold.projection import Projector

SETTINGS = "settings.json"


class ShardProjector:
    """An actor: reads the examples of a shard, projects the readable ones, writes the shard, returns its summary."""

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self.config = Config.model_validate(config)
        self.folder, self.device = Path(folder), device_of_actor()
        torch.set_num_threads(self.config.cluster.threads_per_worker)
        generator = generators.load_configured(self.config.generator, self.device)
        self.projector = Projector(generator, self.config.projection, self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        summaries = [json.dumps(self._shard(json.loads(row))) for row in batch["shard"]]
        return {"summary": np.array(summaries, dtype=object)}

    def _shard(self, shard: dict[str, Any]) -> dict[str, Any]:
        data, began = self.config.data, time.monotonic()
        examples, contents, pixels, rejected = [], [], [], {}
        for item in shard["examples"]:
            try:
                content = bytes.fromhex(item["hex"]) if "hex" in item else Path(item["path"]).read_bytes()
                pixels.append(decode(content, data.resolution, data.channels))
            except OSError as error:
                rejected[item["id"]] = f"cannot be opened: {error.strerror}"
                continue
            except ValueError as error:
                rejected[item["id"]] = str(error)
                continue
            examples.append(item)
            contents.append(content)
        path = self.folder / manifold_set.SHARDS / shard["name"]
        if not examples:
            path.unlink(missing_ok=True)  # one of an earlier run, when some of these could still be read
            return {"name": shard["name"], "rows": 0, "rejected": rejected, "seconds": 0.0}
        found = self.projector.project(to_unit(np.stack(pixels)), [e["id"] for e in examples])
        generator, poor = self.projector.generator, self.config.projection.poor_l1
        columns = {
            "id": [e["id"] for e in examples],
            "split": [e["split"] for e in examples],
            "label": [e["label"] for e in examples],
            "image": [{"bytes": c, "path": e["id"]} for c, e in zip(contents, examples, strict=True)],
            "on_manifold": manifold_set.fixed_list(manifold_set.quantise(found.x_BCHW), pa.uint8()),
            "w": manifold_set.fixed_list(found.w_BLD.cpu().numpy(), pa.float32()),
            "lpips": found.lpips_B.cpu().numpy(),
            "l1": found.l1_B.cpu().numpy(),
            "l2": found.l2_B.cpu().numpy(),
            "steps": [self.config.projection.steps] * len(examples),
            "status": ["ok" if e <= poor else "poor" for e in found.l1_B.tolist()],
        }
        schema = manifold_set.schema(generator.channels, generator.resolution, generator.num_ws, generator.w_dim)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        pq.write_table(pa.table(columns, schema=schema), partial, compression="zstd")
        reasons = path.with_suffix(".rejected.json")
        if rejected:
            # beside the shard and before it, so that a rerun which finds the shard knows that it is not whole
            manifold_set.write_json(reasons, rejected)
        else:
            reasons.unlink(missing_ok=True)
        partial.replace(path)
        return {"name": path.name, "rows": len(examples), "rejected": rejected, "seconds": time.monotonic() - began}


def _item(example: Example) -> dict[str, Any]:
    item: dict[str, Any] = {"id": example.id, "split": example.split, "label": example.label}
    if isinstance(example.content, bytes):
        return {**item, "hex": example.content.hex()}
    return {**item, "path": str(example.content.resolve())}


def plan(listing: Listing, batch_size: int) -> list[dict[str, Any]]:
    """The shards: name and examples of each."""
    examples = listing.examples
    return [
        {"name": f"part-{k:06d}.parquet", "examples": [_item(e) for e in examples[i : i + batch_size]]}
        for k, i in enumerate(range(0, len(examples), batch_size))
    ]


def _digest(listing: Listing) -> str:
    """Changes when an image is added, removed, renamed or relabelled.

    Not when a file's content changes: a repaired image must not undo a half-finished set.
    """
    return manifold_set.text_digest("\n".join(f"{e.id}\t{e.split}\t{e.label}" for e in listing.examples))


def settings_of(config: Config, listing: Listing) -> dict[str, Any]:
    """What a set depends on: two runs with equal settings make the same set."""
    return {
        "data": config.data.model_dump(mode="json", exclude={"max_rejected"}),
        "projection": config.projection.model_dump(mode="json"),
        "generator_sha256": generators.fingerprint(config.generator.path),
        "generator_precision": config.generator.precision,
        "class_names": list(listing.class_names),
        "examples": len(listing.examples),
        "listing_sha256": _digest(listing),
    }


def _prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder, or check that what is in it was begun with the same settings."""
    path = folder / SETTINGS
    if path.is_file():
        old = json.loads(path.read_text())
        for section in settings:
            if old.get(section) != settings[section]:
                before, now = old.get(section), settings[section]
                if isinstance(now, dict):
                    key = next(k for k in now if before.get(k) != now[k])
                    section, before, now = f"{section}.{key}", before.get(key), now[key]
                raise UserError(
                    f"the on-manifold set '{folder}' was begun with {section} = {before}, now it is {now}; give the old value, "
                    "another --output, or remove the folder"
                )
    (folder / manifold_set.SHARDS).mkdir(parents=True, exist_ok=True)
    for partial in folder.rglob(".*.partial"):
        partial.unlink()
    manifold_set.write_json(path, settings)


def prepare(config: Config, folder: Path) -> Listing:
    """Check everything a projection needs, and create its folder; returns the examples. Needs no Ray.

    Raises UserError for data, a generator, LPIPS weights or a half-finished set that do not fit.
    """
    listing = list_examples(config.data)
    generator = generators.load_configured(config.generator)
    generators.require_images(generator, config.generator.path, config.data.channels, config.data.resolution)
    Projector(generator, config.projection.model_copy(update={"candidates": 1}), torch.device("cpu"))
    _prepare_folder(folder, settings_of(config, listing))
    return listing


def is_projected(config: Config, folder: Path, listing: Listing) -> bool:
    """True if `folder` holds the finished set of exactly these settings."""
    if not (folder / manifold_set.MANIFEST).is_file():
        return False
    manifest = manifold_set.read_manifest(folder)
    whole = all(_rows(folder / manifold_set.SHARDS / name) == rows for name, rows in manifest["shards"].items())
    return whole and all(manifest.get(k) == v for k, v in settings_of(config, listing).items())


def project(config: Config, folder: Path, listing: Listing, say: Callable[[str], None]) -> dict[str, Any]:
    """Make (or finish) the on-manifold set in `folder`, after `prepare`, and return its manifest. Ray must be connected.

    Raises UserError when more than `data.max_rejected` of the images is unreadable.
    """
    settings = settings_of(config, listing)
    (folder / manifold_set.MANIFEST).unlink(missing_ok=True)
    shards = plan(listing, config.projection.batch_size)
    done = _finished(folder, shards)
    rejected: dict[str, str] = {}
    todo = [s for s in shards if s["name"] not in done]
    if len(todo) < len(shards):
        say(f"going on: {len(shards) - len(todo)} of {len(shards)} shards are there")
    if todo:
        say(f"starting {min(config.cluster.projection_actors, len(todo))} actors for {len(todo)} shards")
    total, count, began = len(listing.examples), sum(done.values()), time.monotonic()
    fresh = 0
    for summary in _run(config, folder, todo) if todo else ():
        done[summary["name"]] = summary["rows"]
        rejected |= summary["rejected"]
        count += summary["rows"]
        fresh += summary["rows"]
        rate = fresh / (time.monotonic() - began)
        say(f"projected {count}/{total} images, {rate:.1f} images/s")
    if len(rejected) > config.data.max_rejected * total or not any(done.values()):
        first = next(iter(rejected.items()))
        raise UserError(
            f"{len(rejected)} of {total} images were rejected, more than data.max_rejected = {config.data.max_rejected}; "
            f"the first: '{first[0]}' {first[1]}. Repair or replace the files, or raise data.max_rejected, and run again"
        )
    manifest = _manifest(config, folder, settings, done, rejected)
    manifold_set.write_json(folder / manifold_set.MANIFEST, manifest)
    return manifest


def _finished(folder: Path, shards: list[dict[str, Any]]) -> dict[str, int]:
    done: dict[str, int] = {}
    for shard in shards:
        path = folder / manifold_set.SHARDS / shard["name"]
        # a shard with rejects is done again, in case they have been repaired
        if (rows := _rows(path)) is not None and not path.with_suffix(".rejected.json").is_file():
            done[shard["name"]] = rows
    return done


def _rows(shard: Path) -> int | None:
    """Rows of a shard; None if it is missing or damaged."""
    try:
        return int(pq.read_metadata(shard).num_rows)
    except (pa.ArrowException, OSError):
        return None


def _run(config: Config, folder: Path, todo: list[dict[str, Any]]) -> Any:
    """Summaries of the shards as they are finished."""
    actors = min(config.cluster.projection_actors, len(todo))
    # one block a shard: Ray then hands whole shards to actors
    items = ray.data.from_items([{"shard": json.dumps(s)} for s in todo], override_num_blocks=len(todo))
    results = items.map_batches(
        ShardProjector,
        fn_constructor_kwargs={"config": config.to_json(), "folder": str(folder.resolve())},
        batch_size=1,
        num_cpus=config.cluster.threads_per_worker,
        num_gpus=config.cluster.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors, initial_size=actors),
    )
    for row in results.iter_rows():
        yield json.loads(row["summary"])


def _manifest(
    config: Config, folder: Path, settings: dict[str, Any], done: dict[str, int], rejected: dict[str, str]
) -> dict[str, Any]:
    shards = {name: rows for name, rows in sorted(done.items()) if rows}
    columns = ["split", "label", "status", "lpips", "l1", "l2"]
    table = pa.concat_tables(pq.read_table(folder / manifold_set.SHARDS / n, columns=columns) for n in shards)
    generator = generators.load_configured(config.generator)
    size = generator.resolution
    return {
        "version": manifold_set.VERSION,
        **settings,
        "shards": shards,
        "shapes": {"on_manifold": [generator.channels, size, size], "w": [generator.num_ws, generator.w_dim]},
        "count": table.num_rows,
        "splits": _counts(table, "split"),
        "status": _counts(table, "status"),
        "usable": _counts(table.filter(pc.equal(table["status"], "ok")), "split"),
        "means": {name: round(float(np.mean(table[name].to_numpy())), 6) for name in ("lpips", "l1", "l2")},
        "lpips_is_perceptual": config.projection.lpips_weights != "random",
        "rejected": dict(sorted(rejected.items())),
        "versions": {**versions(), "ray": ray.__version__},
    }


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    return {r["values"]: r["counts"] for r in sorted(table[column].value_counts().to_pylist(), key=lambda r: r["values"])}
