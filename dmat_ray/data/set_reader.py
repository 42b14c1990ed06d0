"""Reading an on-manifold set: its manifest, its shards, and what they say of each other. Needs no torch.

A set is a folder. `shards/*.parquet` hold one row per image, in the columns of `dmat_ray.data.set_format`; `manifest.json` is
written last, so that a set without one is unfinished by definition.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from dmat_ray.data.decoding import GREY_LEVELS, MAX_PIXELS, SIZED, decode
from dmat_ray.data.manifest import Described
from dmat_ray.data.set_format import COPIES, GIVEN_UP, LOST, MANIFEST, SHARDS, VERSION, different_columns, schema
from dmat_ray.errors import UserError, first_line
from dmat_ray.storage import READERS, Location, Place, at, require_not_of_storage
from dmat_ray.storage.files import parse_json, text_digest
from dmat_ray.validated import describe
from dmat_ray.wording import be


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a finished set; raises UserError for one that is missing, damaged or of another version."""
    manifest = manifest_as_it_is(place)
    try:
        Described.model_validate(manifest)
    except ValidationError as error:
        first, *more = describe(error).split("; ")
        told = f"{first}{f' (and {len(more)} more)' if more else ''}"
        raise UserError(f"'{at(place) / MANIFEST}' is damaged: {told}; run jobs/project.py again") from None
    return manifest


def manifest_as_it_is(place: Place) -> dict[str, Any]:
    """The same of one that may lack keys that readers look up."""
    folder = at(place)
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"there is no on-manifold set at '{folder}'; make it with jobs/project.py") from None
        raise UserError(
            f"the on-manifold set '{folder}' is unfinished: it has no {MANIFEST}; run jobs/project.py again"
        ) from None
    manifest = parse_json(content, folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise UserError(f"'{folder / MANIFEST}' is damaged: it holds a {type(manifest).__name__}, not an object")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"the set '{folder}' has format version {manifest.get('version')}, this program reads {VERSION}; project again into "
            "another folder"
        )
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """Names a set in checkpoints and evaluations, wherever its generator lies."""
    return text_digest(json.dumps({key: value for key, value in manifest.items() if key != "generator"}, sort_keys=True))


def read_shard(
    folder: Location, name: str, columns: Sequence[str] | None = None, manifest: dict[str, Any] | None = None
) -> pa.Table:
    """A shard's table, or some columns of it.

    Raises UserError if it is missing or damaged, or its name leads out of the set's folder; with a manifest also if it has other
    columns or another number of rows than that says.
    """
    if "/" in name or "\0" in name:
        raise UserError(f"the set '{folder}' names a shard {name!r}, which is no file of its own; run jobs/project.py again")
    try:
        with (folder / SHARDS / name).open() as file:
            shard = pq.ParquetFile(file, page_checksum_verification=True)
            if manifest is not None:
                _require_described(shard, folder, name, manifest)
            return _read(shard, None if columns is None else list(columns))
    except FileNotFoundError:
        raise UserError(f"the set '{folder}' lacks its shard {name}; run jobs/project.py again") from None
    except (pa.ArrowException, OSError) as error:
        require_not_of_storage(error, folder / SHARDS / name)
        reason = first_line(error)
        raise UserError(f"shard {name} of '{folder}' is damaged ({reason}); remove it and run jobs/project.py again") from None


def _read(shard: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    """These columns of an open shard: a row group at a time, for pyarrow reads no more than 2 GiB of images in one piece.

    So the table may hold more than one array of binaries can, and its columns cannot be brought into one piece, as `take` does.
    """
    groups = [shard.read_row_group(k, columns=columns) for k in range(shard.num_row_groups)]
    return pa.concat_tables(groups) if groups else shard.read(columns)


def _require_described(shard: pq.ParquetFile, folder: Location, name: str, manifest: dict[str, Any]) -> None:
    found, rows = shard.metadata.num_rows, manifest["shards"][name]
    if found != rows:
        raise UserError(f"shard {name} of '{folder}' has {found} rows, its manifest says {rows}")
    if odd := different_columns(shard.schema_arrow, schema_of(manifest)):
        raise UserError(f"shard {name} of '{folder}' has other columns than its manifest says: {odd}")


def read_columns(folder: Location, names: Iterable[str], columns: Sequence[str]) -> pa.Table:
    """Small columns of these shards, one after the other in one table; raises UserError like `read_shard`."""
    with ThreadPoolExecutor(READERS) as pool:
        return pa.concat_tables(pool.map(lambda name: read_shard(folder, name, columns), names))


def schema_of(manifest: dict[str, Any]) -> pa.Schema:
    """The schema of the shards that a manifest describes."""
    (channels, resolution, _), w = manifest["shapes"]["on_manifold"], manifest["shapes"]["w"]
    return schema(channels, resolution, w[0], w[1], manifest["class_names"])


def decoding_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """How `decode` makes of a natural image of this set what it was made of.

    Pixels that it may have are those that were allowed then, and those that are allowed by default. What a set does not say could
    not be set when it was made.
    """
    most, resize, levels = (manifest["data"].get(name) for name in ("max_pixels", "resize", "grey_levels"))
    return {
        "max_pixels": max(most, MAX_PIXELS) if isinstance(most, int) else MAX_PIXELS,
        "resize": resize if resize in SIZED else "crop",
        "grey_levels": levels if isinstance(levels, int) and 256 <= levels <= GREY_LEVELS else GREY_LEVELS,
    }


def decoded(table: pa.Table, manifest: dict[str, Any], where: str) -> np.ndarray:
    """The natural images (N, C, H, W) of a table of this set, uint8; raises UserError for one that cannot be read."""
    channels, resolution, _ = shape = manifest["shapes"]["on_manifold"]
    pixels = np.empty((table.num_rows, *shape), np.uint8)
    how = decoding_of(manifest)
    for i, content in enumerate(pc.struct_field(table["image"], "bytes")):
        try:
            pixels[i] = decode(content.as_py() or b"", resolution, channels, **how)
        except ValueError as error:
            raise UserError(f"{where}: the natural image of '{table['id'][i]}' {error}") from None
    return pixels


def named_generator(sha: str, path: str | None) -> str:
    """A set's generator as messages name it: by its digest, and by where it lay, if the set tells."""
    return sha[:12] if path is None else f"'{path}' ({sha[:12]})"


def lost_classes(manifest: Mapping[str, Any], split: str) -> list[str]:
    """Names of the classes of which a split of a set has no usable image."""
    return list(manifest.get(LOST, {}).get(split, []))


def named_classes(names: Sequence[str], most: int = 5) -> str:
    """Classes as messages name them, the first few of many."""
    more = f" and {len(names) - most} more classes" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def warnings_of_lost(manifest: Mapping[str, Any], *splits: str) -> list[str]:
    """What is to be said of the classes that have lost all their images in these splits of a set; nothing if none has."""
    return [
        f"warning: no usable {'training' if split == 'train' else split} image of {named_classes(lost)}: all were rejected, "
        "or are poor (projection.poor_l1, projection.poor_lpips); give more images, a generator that can make these, or higher "
        "limits"
        for split in splits
        if (lost := lost_classes(manifest, split))
    ]


def warning_of_given_up(manifest: Mapping[str, Any]) -> str:
    """What is to be said of the images of a set whose search broke off; empty if there are none."""
    if not (given_up := manifest.get(GIVEN_UP, 0)):
        return ""
    return (
        f"warning: the search of {given_up} of {manifest['count']} images broke off, because its loss or gradient was not "
        "finite; they are marked poor and left out of training; give a lower projection.lr, another projection.start, or a "
        "generator that is sound"
    )


def warning_of_copies(manifest: Mapping[str, Any], pairs: Sequence[tuple[str, str]] = ()) -> str:
    """What is to be said of test images of a set that are training images too; empty if there are none.

    `pairs` are ids of the first of them, each with that of a training image.
    """
    if not (copies := manifest.get(COPIES, 0)):
        return ""
    first = ", ".join(f"'{test}' is '{train}'" for test, train in pairs)
    return (
        f"warning: {copies} of {manifest['splits']['test']} test images {be(copies)} among the training images, too (the same "
        "pixels): what is measured on them tells nothing of new images; leave one of each out of the source"
        f"{f'; the first: {first}' if first else ''}"
    )


def none_usable(folder: Place, split: str) -> UserError:
    """The error of a set without a usable image in a split."""
    return UserError(
        f"the set '{folder}' has no usable image in its {split} split: all were rejected, or are poor; jobs/inspect_set.py "
        "shows them"
    )


def require_usable(manifest: Mapping[str, Any], folder: Place, split: str) -> None:
    """Raise UserError for a set without a usable image in a split."""
    if not manifest["usable"].get(split, 0):
        raise none_usable(folder, split)


def require_generator(manifest: Mapping[str, Any], sha: str, what: str) -> None:
    """Raise UserError unless the set was made with the generator of this sha256."""
    if (known := manifest["generator_sha256"]) != sha:
        raise UserError(
            f"{what} was made with generator {named_generator(known, manifest.get('generator'))}, but the one given is another "
            f"({sha[:12]}); give the same generator.path, or project again into another folder"
        )
