"""The columns of the on-manifold set: plain Arrow types that any reader opens, and what our own readers make of them.

`image` (as the source had it) and `on_manifold` (g(w), netpbm) are struct{bytes, path}, the Hugging Face Image layout; `w` is a
fixed-size list whose shape stands in the manifest and in the schema's metadata.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dmat_ray.errors import UserError
from dmat_ray.storage import Location

VERSION = 2
MANIFEST = "manifest.json"
SHARDS = "shards"
NAME = re.compile(r"part-(\d{6,})(?:-(\d+))?\.parquet")  # of a shard, and of a supplement of one
OURS = b"dmat_ray"  # key of a shard's metadata: its version, shapes and class names, as JSON
REJECTED = b"dmat_ray_rejected"  # key of a shard's metadata: {id: reason} of the images that it lacks, as JSON
GIVEN_UP = "given_up"  # key of the manifest, if there are any: the number of images whose search broke off
GIVEN_UP_IDS = b"dmat_ray_given_up"  # key of a shard's metadata, if there are any: their ids, as a JSON list
PIXEL_KEYS = b"dmat_ray_pixel_keys"  # key of a shard's metadata: each row's `pixel_key`, as Base64 of little-endian uint64
COPIES = "test_images_in_training"  # key of the manifest, if there are any: how many test images are training images, too
LOST = "classes_without_usable"  # key of the manifest, if there are any: {split: names of classes without a usable image}
ERRORS = ("lpips", "l1", "l2")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the layout that Hugging Face datasets call Image
MOST_BYTES = 2**31 - 1  # of one Arrow array of binaries, and of what Parquet's readers take of a struct in one piece


def shard_names(folder: Location) -> list[str]:
    """The files of shards and supplements in a set's folder."""
    return [found.name for found in (folder / SHARDS).files() if NAME.fullmatch(found.name)]


def schema(channels: int, resolution: int, num_ws: int, w_dim: int, class_names: Sequence[str]) -> pa.Schema:
    """Arrow schema of a shard. Its metadata tell our readers the shapes, and Hugging Face datasets what is an image or class."""
    fields: list[tuple[str, pa.DataType, dict[str, Any]]] = [
        ("id", pa.string(), {"dtype": "string", "_type": "Value"}),
        ("split", pa.string(), {"dtype": "string", "_type": "Value"}),
        ("label", pa.int64(), {"names": list(class_names), "_type": "ClassLabel"}),
        ("image", IMAGE, {"_type": "Image"}),
        ("on_manifold", IMAGE, {"_type": "Image"}),
        (
            "w",
            pa.list_(pa.float32(), num_ws * w_dim),
            {"feature": {"dtype": "float32", "_type": "Value"}, "length": num_ws * w_dim, "_type": "List"},
        ),
        *((name, pa.float32(), {"dtype": "float32", "_type": "Value"}) for name in ERRORS),
        ("steps", pa.int32(), {"dtype": "int32", "_type": "Value"}),
        ("status", pa.string(), {"dtype": "string", "_type": "Value"}),
    ]
    shapes = {"on_manifold": [channels, resolution, resolution], "w": [num_ws, w_dim]}
    ours = {"version": VERSION, "shapes": shapes, "class_names": list(class_names)}
    theirs = {"info": {"features": {name: feature for name, _, feature in fields}}}
    return pa.schema(
        [(name, kind) for name, kind, _ in fields],
        metadata={OURS: json.dumps(ours), "huggingface": json.dumps(theirs)},
    )


def with_given_up(schema: pa.Schema, ids: Sequence[str]) -> pa.Schema:
    """The schema of a shard in which the searches of these images broke off."""
    return schema.with_metadata({**schema.metadata, GIVEN_UP_IDS: json.dumps(list(ids))})


def pixel_key(pixels: np.ndarray) -> int:
    """A number that two images share only if all their pixels are equal, or by a chance of one in 2 ** 64."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


def with_pixel_keys(schema: pa.Schema, pixels: Iterable[np.ndarray]) -> pa.Schema:
    """The schema of a shard whose rows are of these images, uint8 (C, H, W) each."""
    keys = np.array([pixel_key(image) for image in pixels], "<u8")
    return schema.with_metadata({**schema.metadata, PIXEL_KEYS: base64.b64encode(keys.tobytes())})


def pixel_keys(metadata: Mapping[bytes, bytes], rows: int) -> np.ndarray | None:
    """The keys that a shard's metadata hold of its rows, (rows) uint64; None of a shard that has none, or none that fit."""
    try:
        keys = np.frombuffer(base64.b64decode(metadata.get(PIXEL_KEYS, b""), validate=True), "<u8")
    except ValueError:
        return None
    return keys if len(keys) == rows else None


def different_columns(found: pa.Schema, wanted: pa.Schema) -> str:
    """Names what differs between two schemas, metadata aside; empty if nothing does."""
    if found.equals(wanted):
        return ""
    if found.names != wanted.names:
        return f"{', '.join(found.names)} instead of {', '.join(wanted.names)}"
    return ", ".join(f"{a.name} is {a.type}, not {b.type}" for a, b in zip(found, wanted, strict=True) if not a.equals(b))


def fixed_list(array: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    """(N, ...) array -> Arrow fixed-size lists of its flattened rows."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), type=kind), math.prod(array.shape[1:]))


def from_lists(column: pa.ChunkedArray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `fixed_list`: (N, *shape)."""
    flat: np.ndarray = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), *shape)


def _header(channels: int, height: int, width: int) -> bytes:
    return f"P{5 if channels == 1 else 6}\n{width} {height}\n255\n".encode()


def to_netpbm(pixels_NCHW: np.ndarray) -> pa.StructArray:
    """uint8 images as PGM or PPM files: a short header and the raw pixels, which any program that shows images opens.

    Raw, because decoding PNG would cost training ten times what reading costs; Parquet's own compression is enough. Raises
    UserError for more than 2 GiB of them.
    """
    count, channels, height, width = pixels_NCHW.shape
    header = np.frombuffer(_header(channels, height, width), np.uint8)
    size = len(header) + channels * height * width
    if count * size > MOST_BYTES:
        raise UserError(
            f"{count} images of {width}x{height} pixels are more than the 2 GiB that a shard may hold of them; "
            f"set projection.shard_size to {MOST_BYTES // size} or less"
        )
    rows = np.empty((count, size), np.uint8)
    rows[:, : len(header)] = header
    rows[:, len(header) :].reshape(count, height, width, channels)[...] = pixels_NCHW.transpose(0, 2, 3, 1)
    ends = np.arange(count + 1, dtype=np.int32) * size
    content = pa.BinaryArray.from_buffers(pa.binary(), count, [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(rows)])
    return pa.StructArray.from_arrays([content, pa.nulls(count, pa.string())], fields=list(IMAGE))


def from_netpbm(column: pa.ChunkedArray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `to_netpbm`, for images of `shape` (C, H, W). Raises UserError for anything else."""
    channels, height, width = shape
    header = _header(channels, height, width)
    size = len(header) + channels * height * width
    wrong = UserError(f"a stored g(w) is no netpbm image of {width}x{height} pixels and {channels} channels")
    pixels = np.empty((len(column), channels, height, width), np.uint8)
    start = 0
    for chunk in column.chunks:
        content = chunk.field("bytes")  # follows the chunk's offset
        if not len(content):
            continue
        ends = np.frombuffer(content.buffers()[1], np.int32)[content.offset : content.offset + len(content) + 1]
        if chunk.null_count or content.null_count or (np.diff(ends) != size).any():
            raise wrong
        rows = np.frombuffer(content.buffers()[2], np.uint8)[ends[0] : ends[-1]].reshape(len(content), size)
        if (rows[:, : len(header)] != np.frombuffer(header, np.uint8)).any():
            raise wrong
        images = rows[:, len(header) :].reshape(len(content), height, width, channels)
        pixels[start : start + len(content)] = images.transpose(0, 3, 1, 2)
        start += len(content)
    return pixels


def is_poor(l1: np.ndarray, lpips: np.ndarray, most_l1: float, most_lpips: float | None) -> np.ndarray:
    """Mask of the images whose errors (float32) lie above the thresholds, or are no numbers."""
    poor = ~(l1 <= np.float32(most_l1))
    return np.asarray(poor if most_lpips is None else poor | ~(lpips <= np.float32(most_lpips)))
