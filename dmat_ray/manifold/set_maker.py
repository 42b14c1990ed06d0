"""How the images of a source become an on-manifold set: what Ray's actors and a single process share, and the latter.

Files and manifest are `dmat_ray.data.set_writer`'s, the search `projection`'s.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmat_ray.config import Config, ProjectionConfig
from dmat_ray.data import first_look, reading, set_format, set_settings, set_writer, sources
from dmat_ray.data.apart import require_apart
from dmat_ray.data.pixels import quantise
from dmat_ray.data.same_files import are_unchanged, require_same_files
from dmat_ray.data.set_format import MANIFEST, SHARDS
from dmat_ray.data.set_reader import read_manifest, warning_of_copies, warning_of_given_up, warnings_of_lost
from dmat_ray.data.set_writer import Record, Shard
from dmat_ray.data.sources import Listing
from dmat_ray.errors import UserError
from dmat_ray.manifold import encoder, generators, trained_on
from dmat_ray.manifold.projection import Projector
from dmat_ray.models.checkpoint import versions
from dmat_ray.networks.weights import locate_lpips
from dmat_ray.storage import Location, set_folder
from dmat_ray.storage.files import sha256, text_digest
from dmat_ray.storage.lease import Lease, exclusive

# What may change over a half-finished set: the quality of results does not depend on it. (w itself may, where rounding decides
# into which of two valleys a search goes. The encoder counts by its weights, not by its folder.)
HARMLESS = {"batch_size", "compile", "encoder"}
REJECTED_SAID = 20  # the others are in the manifest


def settings_of(config: Config, listing: Listing) -> dict[str, Any]:
    """What a set depends on: two runs with equal settings make the same set."""
    settings = {
        "data": {k: v for k, v in config.data.settled().items() if k != "max_rejected"},
        "projection": config.projection.model_dump(mode="json", exclude=HARMLESS),
        "generator_sha256": generators.fingerprint(config.generator.path),
        "generator_precision": config.generator.precision,
        "class_names": list(listing.class_names),
        "examples": listing.table.num_rows,
        "listing_sha256": _digest(listing),
    }
    if config.projection.lpips > 0 and config.projection.lpips_weights != "random":
        settings["lpips_sha256"] = sha256(locate_lpips(config.projection.lpips_net, config.projection.lpips_weights))
    if config.projection.start == "encoder":
        settings["encoder_sha256"] = encoder.fingerprint_encoder(encoder_folder(config))
    return settings


def _digest(listing: Listing) -> str:
    """Changes when an image is added, removed, renamed or relabelled.

    Not when a file's content changes: a repaired image must not undo a half-finished set.
    """
    columns = (listing.table[name].to_pylist() for name in ("id", "split", "label"))
    return text_digest("\n".join(f"{id}\t{split}\t{label}" for id, split, label in zip(*columns, strict=True)))


def prepare(config: Config, say: Callable[[str], None]) -> Listing:
    """Check everything a projection needs; returns the images. Needs no Ray, and writes nothing.

    Raises UserError for data, a generator, an encoder or LPIPS weights that do not fit, and for an output among the images.
    """
    require_apart(config, makes_set=True)
    if config.projection.lpips_weights == "random" and config.projection.lpips > 0:
        say("LPIPS runs on a random backbone (projection.lpips_weights=random): it guides the search, it is not perceptual")
    if (limit := config.projection.poor_lpips) is not None and config.projection.lpips == 0:
        say(
            f"note: projection.poor_lpips {limit:g} marks no image poor: LPIPS is not measured where projection.lpips is 0; "
            "raise that, or lower projection.poor_l1 instead"
        )
    listing = sources.list_examples(config.data)
    # without what an actor computes at its start, or looks for on its machine
    cheap = config.projection.model_copy(update={"candidates": 1, "axes": "w", "compile": False})
    build_projector(config.model_copy(update={"projection": cheap}), torch.device("cpu"))
    _require_room(config, listing)
    names = listing.class_names
    say(f"{len(names)} classes: {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}")
    taken = listing.table.num_rows
    if taken < listing.found:
        why = [name for name in ("balanced", "train_limit", "test_limit") if getattr(config.data, name)]
        say(f"taking {taken} of {listing.found} images ({', '.join(f'data.{name}' for name in why)})")
    if listing.ignored:
        say(f"not taken: {listing.ignored}")
    return listing


def warnings_before(config: Config, listing: Listing) -> list[str]:
    """What is to be said of the images before they are projected. Some are read and decoded for it."""
    found = (first_look.warning_of_dark(listing.table, config.data), trained_on.warning_of_seen(config, listing))
    return [warning for warning in found if warning]


def _require_room(config: Config, listing: Listing) -> None:
    """Raise UserError for shards of more images than their files can hold."""
    size = config.data.resolution
    (one,) = set_format.to_netpbm(np.zeros((1, config.data.channels, size, size), np.uint8)).field("bytes")
    most = set_format.MOST_BYTES // len(one.as_py())
    if min(config.projection.shard_size, listing.table.num_rows) > most:
        raise UserError(
            f"projection.shard_size {config.projection.shard_size}: so many images of {size}x{size} pixels are more than the 2 "
            f"GiB that a shard may hold of them; set it to {most} or less"
        )


def encoder_folder(config: Config) -> Location:
    """The folder of the encoder that projection starts from."""
    return encoder.locate_encoder(config.projection.encoder, config.output, config.generator.path)


def build_projector(config: Config, device: torch.device) -> Projector:
    """The projector that the settings describe, with its generator and encoder. Raises UserError for what does not fit."""
    generator = generators.load_configured(config.generator, device)
    generators.require_images(generator, config.generator.path, config.data.channels, config.data.resolution)
    start = None
    if config.projection.start == "encoder":
        start = encoder.load_encoder(encoder_folder(config), generators.fingerprint(config.generator.path), device)
    return Projector(generator, config.projection, device, start)


def rows_of(projector: Projector, images: pa.Table, settings: ProjectionConfig, class_names: list[str]) -> pa.Table:
    """The rows of the set for images as `reading.read_images` gives them; the ids of those that the search gave up, if there are
    any, stand in the schema's metadata.
    """
    generator = projector.generator
    shape = (generator.channels, generator.resolution, generator.resolution)
    schema = set_format.schema(generator.channels, generator.resolution, generator.num_ws, generator.w_dim, class_names)
    if images.num_rows == 0:
        return schema.empty_table()
    ids = images["id"].to_pylist()
    pixels = set_format.from_lists(images["pixels"], shape).copy()  # Arrow's memory is read-only, of which torch would warn
    found = projector.project(torch.from_numpy(pixels), ids)
    l1, lpips = found.l1_B.numpy(), found.lpips_B.numpy()
    given_up = found.given_up_B.numpy()
    # whatever its errors: a start may be near by luck, and is no result
    poor = given_up | set_format.is_poor(l1, lpips, settings.poor_l1, settings.poor_lpips)
    columns = {
        "id": ids,
        "split": images["split"].cast(pa.string()),
        "label": images["label"].cast(pa.int64()),
        "image": [{"bytes": content, "path": id} for content, id in zip(images["image"].to_pylist(), ids, strict=True)],
        "on_manifold": set_format.to_netpbm(quantise(found.x_BCHW)),
        "w": set_format.fixed_list(found.w_BLD.numpy(), pa.float32()),
        "lpips": lpips,
        "l1": l1,
        "l2": found.l2_B.numpy(),
        "steps": found.steps_B.numpy(),
        "status": np.where(poor, "poor", "ok"),
    }
    schema = set_format.with_pixel_keys(schema, pixels)
    if given_up.any():
        schema = set_format.with_given_up(schema, [ids[i] for i in np.flatnonzero(given_up)])
    return pa.table(columns, schema=schema)


def _require_few(rejected: dict[str, str], total: int, share: float, say: Callable[[str], None]) -> None:
    """Name the images that were rejected; raise UserError if they are too many."""
    for id, reason in list(rejected.items())[:REJECTED_SAID]:
        say(f"rejected: '{id}' {reason}")
    if len(rejected) > REJECTED_SAID:
        left = len(rejected) - REJECTED_SAID
        say(f"rejected: and {left} image{'' if left == 1 else 's'} more")
    if len(rejected) > share * total or len(rejected) == total:
        first, reason = next(iter(rejected.items()))
        raise UserError(
            f"{len(rejected)} of {total} images were rejected, more than data.max_rejected = {share}; "
            f"the first: '{first}' {reason}. Repair or replace the files, or raise data.max_rejected, and run again"
        )


@dataclass(frozen=True)
class Begun:
    """A set that this process alone writes: its settings, the images, all shards, those that are there, and those to be made."""

    folder: Location
    settings: dict[str, Any]
    listing: Listing
    lease: Lease
    shards: list[Shard]
    records: dict[str, Record]
    todo: list[Shard]


@contextmanager
def begun(config: Config, say: Callable[[str], None], listing: Listing | None = None) -> Iterator[Begun | None]:
    """Inside, the set that the settings describe is this process's to make or to finish; None if it is whole and of these
    images, as far as `are_unchanged` tells.

    `listing` is what `prepare` has returned, if it was called. Raises UserError like `prepare`, and for a folder that cannot be
    written, that another process writes, or that was begun with other settings or another file of many images.
    """
    folder, listing = set_folder(config), listing or prepare(config, say)
    settings = settings_of(config, listing)
    if set_writer.is_finished(folder, settings):
        if config.data.source in sources.NAMED or are_unchanged(folder, listing.table, config.data):
            say("the on-manifold set is whole and unchanged, nothing to do")
        else:
            say(
                "the on-manifold set is whole, of images of the same names (their content is not compared, or of a few only), "
                "nothing to do"
            )
        yield None
        return
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(exclusive(folder))
            set_settings.begin(folder, settings)
            require_same_files(folder, listing.table, config.data)
            (folder / MANIFEST).unlink()
            (folder / SHARDS).sweep()
        except OSError as error:
            raise UserError(
                f"'{folder}' cannot be written: {error.strerror or error}; give another --output or --manifold_set"
            ) from None
        shards, records = set_writer.plan(listing, config.projection.shard_size), set_writer.read_records(folder)
        todo = set_writer.unfinished(shards, records)
        rest = pa.concat_tables([shard.rows for shard in todo] or [listing.table.slice(0, 0)])
        if todo:
            for warning in warnings_before(config, listing):
                say(warning)
        if warning := first_look.warning_of_unreadable(rest, config.data, listing.table.num_rows, say):
            say(warning)
        yield Begun(folder, settings, listing, lease, shards, records, todo)


def finish(config: Config, work: Begun, made_by: dict[str, str], say: Callable[[str], None]) -> dict[str, Any]:
    """Write the manifest of a set whose shards are there, and return it; `made_by` are versions.

    Raises UserError if more than `data.max_rejected` of the images is unreadable.
    """
    work.lease.check()
    records = set_writer.read_records(work.folder)
    rejected = set_writer.rejected_of(work.shards, records)
    _require_few(rejected, work.listing.table.num_rows, config.data.max_rejected, say)
    described = _of_generator(config) | {
        "lpips_is_perceptual": config.projection.lpips_weights != "random",
        "versions": made_by,
    }
    if (seen := trained_on.seen_in_training(config, work.listing)[0]) != 0:
        described["test_images_seen_by_generator"] = "unknown" if seen is None else seen
    return set_writer.finish(work.folder, work.settings, work.shards, records, described)


def _of_generator(config: Config) -> dict[str, Any]:
    generator = generators.load_configured(config.generator)
    size = generator.resolution
    return {
        "generator": config.generator.path,
        "shapes": {"on_manifold": [generator.channels, size, size], "w": [generator.num_ws, generator.w_dim]},
    }


def promised(config: Config, listing: Listing) -> dict[str, Any]:
    """What the manifest will say of a set that is still to be made, as far as trainings ask and if all images will be usable."""
    usable = {split: listing.rows(split).num_rows for split in ("train", "test")}
    return {**_of_generator(config), **settings_of(config, listing), "usable": usable}


def tell(manifest: dict[str, Any], folder: Location, say: Callable[[str], None]) -> None:
    """Say what a set holds, and warn of searches that broke off, of test images that are training images, of a set that is mostly
    poor, or in which a class has no usable image.
    """
    counts = ", ".join(f"{n} {split}" for split, n in sorted(manifest["splits"].items()))
    poor = manifest["status"].get("poor", 0)
    rejected = len(manifest["rejected"])
    l1 = manifest["means"]["l1"]
    say(f"on-manifold set: {counts} images, mean |g(w) - x| {l1:.4f}, {poor} poor, {rejected} rejected, in '{folder}'")
    copies = warning_of_copies(manifest, set_writer.first_copies(folder) if manifest.get(set_format.COPIES) else ())
    for warning in (warning_of_given_up(manifest), copies, warning_of_poor(poor, manifest["count"])):
        if warning:
            say(warning)
    for warning in warnings_of_lost(manifest, "train", "test"):
        say(warning)


def warning_of_poor(poor: int, count: int) -> str:
    """What is to be said of a set of which so many of `count` images are poor; empty if that is not most of them."""
    if 2 * poor <= count:
        return ""
    return (
        f"warning: {poor} of {count} images are poor (projection.poor_l1, projection.poor_lpips) and left out of training; can "
        "this generator make such images?"
    )


def make(config: Config, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Make (or finish) the on-manifold set that the settings describe in this process, and return its manifest.

    The same set as jobs/project.py makes: either takes the other's for its own. Raises UserError like `begun` and `finish`.
    """
    with begun(config, say) as work:
        if work is None:
            return read_manifest(set_folder(config))
        if work.todo:
            _project(config, work, build_projector(config, device), say)
        manifest = finish(config, work, versions(), say)
    tell(manifest, work.folder, say)
    return manifest


def _project(config: Config, work: Begun, projector: Projector, say: Callable[[str], None]) -> None:
    """Write the shards that are still to be made, up to the one with which too many images are unreadable."""
    bad = 0
    for number, shard in enumerate(work.todo, 1):
        images, rejected = reading.read_images(shard.rows, config.data)
        table = rows_of(projector, images, config.projection, list(work.listing.class_names))
        work.lease.check()
        set_writer.write_shard(work.folder, shard.name, table, rejected)
        say(f"projected shard {number} of {len(work.todo)}")
        if (bad := bad + len(rejected)) > config.data.max_rejected * work.listing.table.num_rows:
            break  # more work would not change that
