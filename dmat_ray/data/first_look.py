"""A look at images before the work that depends on them begins."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data import packed, parquet_rows
from dmat_ray.data.decoding import highest_level
from dmat_ray.data.reading import decoded, read
from dmat_ray.data.sources import NAMED
from dmat_ray.storage import at
from dmat_ray.wording import number_of

SAMPLE = 64  # images, spread over a listing, that are looked at for their range
STRETCHES = 8  # of neighbouring rows of Parquet, that such a sample is made of
MOST, CHUNK = 2000, 64  # images of which all are decoded beforehand, and how many of them a thread does at a time
SOME, MOST_SECONDS = 300, 10.0  # images that this is said of, and for how long it is done
DARK = 1 / 8  # share of the levels that images which fill their range do not all stay below


def warning_of_dark(rows: pa.Table, config: DataConfig) -> str:
    """What is to be said where all grey images of 16 bits among some of `Listing.table` are nearly black, as values of 12 bits
    or fewer in 16 are; empty if they are not, or there are none, as in CIFAR and MNIST.
    """
    if _is_packed(rows, config):
        return ""
    contents = read(early(rows, config, SAMPLE), config)
    found = [highest_level(content, config.max_pixels) for content in contents if isinstance(content, bytes)]
    levels = [level for level in found if level is not None]
    if not levels or max(levels) >= DARK * config.grey_levels:
        return ""
    return (
        f"warning: grey images of 16 bits a pixel are nearly black: the highest level of {number_of(len(levels), 'image')} is "
        f"{max(levels)} of {config.grey_levels - 1}; give data.grey_levels, which is 4096 for values of 12 bits"
    )


def early(rows: pa.Table, config: DataConfig, count: int) -> pa.Table:
    """About `count` of some rows of `Listing.table`, spread over them; of Parquet the first of a few row groups or files: all
    that lies before a row in its group is read with it.
    """
    if rows.num_rows <= count or rows["row"].null_count or _is_packed(rows, config):
        return rows.take(pa.array(_spread(rows.num_rows, count)))
    files = rows["file"].combine_chunks().dictionary_encode()
    number, row = files.indices.to_numpy(), rows["row"].to_numpy()
    group = np.zeros(len(row), np.int64)
    if len(files.dictionary) < STRETCHES:
        for k, name in enumerate(files.dictionary.to_pylist()):
            starts = parquet_rows.group_starts(at(config.source) / os.fsdecode(name))
            group[number == k] = np.searchsorted(starts, row[number == k], "right")
    _, firsts, counts = np.unique(np.stack([number, group]), axis=1, return_index=True, return_counts=True)
    taken = _spread(len(firsts), STRETCHES)
    each = -(-count // len(taken))
    return rows.take(pa.array(np.concatenate([firsts[k] + np.arange(min(each, counts[k])) for k in taken])))


def _is_packed(rows: pa.Table, config: DataConfig) -> bool:
    return bool(rows.num_rows) and config.source not in NAMED and packed.is_packed(os.fsdecode(rows["file"][0].as_py()))


def _spread(length: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))


def warning_of_unreadable(rows: pa.Table, config: DataConfig, total: int, say: Callable[[str], None]) -> str:
    """What is to be said where more of some of `Listing.table`, of which a set has `total`, cannot be read than may be left out;
    empty if no more, as far as MOST_SECONDS tell, and of more than MOST, which are not looked at.
    """
    if rows.num_rows > MOST:
        return ""
    if rows.num_rows > SOME:
        say(f"looking at {rows.num_rows} images")
    end = time.monotonic() + MOST_SECONDS

    def look(start: int) -> list[tuple[str, str]]:
        part, bad = rows.slice(start, CHUNK), []
        contents = read(part, config) if time.monotonic() < end else []
        for id, content in zip(part["id"].to_pylist(), contents, strict=False):
            if time.monotonic() > end:
                break
            try:
                decoded(content, config)
            except ValueError as error:
                bad.append((id, str(error)))
        return bad

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = [one for part in pool.map(look, range(0, rows.num_rows, CHUNK)) for one in part]
    if len(bad) <= config.max_rejected * total:
        return ""
    known = f"{'at least ' if time.monotonic() > end else ''}{len(bad)} of {total} images"
    return (
        f"warning: {known} cannot be read, more than data.max_rejected = {config.max_rejected}, so that the set will "
        f"not be finished; the first: '{bad[0][0]}' {bad[0][1]}. Repair the files, or raise data.max_rejected, "
        "and run again: what has been projected by then is kept"
    )
