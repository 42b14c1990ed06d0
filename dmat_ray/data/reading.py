"""The images of a listing (`dmat_ray.data.sources`): their encoded bytes, or their pixels.

Decoding is a step of its own (`dmat_ray.data.decoding`), so that a cluster can spread it and set unreadable images aside.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data import packed, parquet_rows, set_format
from dmat_ray.data.decoding import decode
from dmat_ray.data.sources import NAMED
from dmat_ray.storage import READERS, Location, at

BYTES_A_PIXEL = 8  # of the largest file that is read: 16-bit RGBA, not compressed


def read(rows: pa.Table, config: DataConfig) -> list[bytes | str]:
    """The encoded image of each row of (a part of) `Listing.table`, or the text of the reason why it cannot be read.

    Raises StorageError for an object store that cannot be reached, and UserError for a file of many images that has changed since
    it was listed: neither says anything of the images.
    """
    names: list[Any] = rows["file"].to_pylist()
    if config.source in NAMED:
        return names
    root, max_bytes = at(config.source), BYTES_A_PIXEL * config.max_pixels
    with ThreadPoolExecutor(READERS) as pool:
        if not rows["row"].null_count:
            inside = list(zip(rows["row"].to_pylist(), rows["file_digest"].to_pylist(), strict=True))
            return _read_parts(root, names, inside, config.image_column, max_bytes, pool)
        return list(pool.map(lambda name: parquet_rows.read_file(root / os.fsdecode(name), max_bytes), names))


def _read_parts(
    root: Location, names: list[bytes], rows: list[tuple[int, int]], column: str, max_bytes: int, pool: ThreadPoolExecutor
) -> list[bytes | str]:
    places: dict[bytes, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    kept = parquet_rows.readers()

    def load(name: bytes) -> list[bytes | str]:
        place, inside = root / os.fsdecode(name), [rows[i][0] for i in places[name]]
        digest = rows[places[name][0]][1]
        if packed.is_packed(os.fsdecode(name)):
            return packed.read_images(place, digest, inside, max_bytes)
        return parquet_rows.read_rows(place, digest, inside, column, root if name else root.parent, max_bytes, kept)

    contents: list[bytes | str] = [b""] * len(rows)
    for name, found in zip(places, pool.map(load, places), strict=True):
        for place, content in zip(places[name], found, strict=True):
            contents[place] = content
    for other in kept.keys() - [root / os.fsdecode(name) for name in names[-1:]]:
        del kept[other]  # what is read in order does not come back to it
    return contents


def decoded(content: bytes | str, config: DataConfig) -> np.ndarray:
    """What `read` gives of an image, decoded, uint8 (C, H, W). Raises ValueError with the reason if there is none."""
    if isinstance(content, str):
        raise ValueError(content)
    return decode(content, config.resolution, config.channels, config.max_pixels, config.resize, config.grey_levels)


def read_pixels(rows: pa.Table, config: DataConfig) -> list[np.ndarray | str]:
    """The decoded image of each row, uint8 (C, H, W), or the text of the reason why there is none. Raises like `read`."""
    found: list[np.ndarray | str] = []
    for content in read(rows, config):
        try:
            found.append(decoded(content, config))
        except ValueError as error:
            found.append(str(error))
    return found


def read_good(rows: pa.Table, config: DataConfig) -> tuple[list[int], np.ndarray, dict[str, str]]:
    """Which of the rows have images that can be read, their pixels, uint8 (N, C, H, W), and {id: reason} of the others.

    Raises like `read`.
    """
    return _good(rows, read(rows, config), config)


def _good(rows: pa.Table, contents: list[bytes | str], config: DataConfig) -> tuple[list[int], np.ndarray, dict[str, str]]:
    keep, pixels, rejected = [], [], {}
    for i, (id, content) in enumerate(zip(rows["id"].to_pylist(), contents, strict=True)):
        try:
            pixels.append(decoded(content, config))
        except ValueError as error:
            rejected[id] = str(error)
            continue
        keep.append(i)
    shape = (config.channels, config.resolution, config.resolution)
    return keep, np.stack(pixels) if pixels else np.empty((0, *shape), np.uint8), rejected


def read_images(rows: pa.Table, config: DataConfig) -> tuple[pa.Table, dict[str, str]]:
    """The images of (a part of) `Listing.table`, and {id: reason} of those that cannot be read. Raises like `read`.

    The table has the columns id, split, label, image (as encoded) and pixels (uint8, C x H x W as one list).
    """
    contents = read(rows, config)
    keep, images, rejected = _good(rows, contents, config)
    chosen = rows.select(["id", "split", "label"]).take(pa.array(keep, pa.int64()))
    chosen = chosen.append_column("image", pa.array([contents[i] for i in keep], pa.large_binary()))
    return chosen.append_column("pixels", set_format.fixed_list(images, pa.uint8())), rejected


def versions_of_images(rows: pa.Table, config: DataConfig) -> list[str]:
    """A text for each row that changes when its image does: of a `NAMED` source a digest, else size and time of its file."""
    names = rows["file"].to_pylist()
    if config.source in NAMED:
        return [hashlib.sha256(content.hex().encode()).hexdigest() for content in names]
    root = at(config.source)
    keys = [(root / os.fsdecode(name)).key for name in names]
    known = root.versions() if root.scheme else {key: _version(key) for key in dict.fromkeys(keys)}
    numbers = rows["row"].to_pylist()
    return [known.get(key, "gone") + (f" {row}" if row is not None else "") for key, row in zip(keys, numbers, strict=True)]


def _version(path: str) -> str:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return "gone"
    return f"{stat.st_size} {stat.st_mtime_ns}"
