"""A look at images before the work that depends on them begins."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data.decoding import highest_level
from dmat_ray.data.sources import read, read_pixels
from dmat_ray.wording import number_of

SAMPLE = 64  # images, spread over a listing, that are looked at for their range
MOST, CHUNK = 2000, 64  # images of which all are decoded beforehand, and how many of them a thread does at a time
DARK = 1 / 8  # share of the levels that images which fill their range do not all stay below


def warning_of_dark(rows: pa.Table, config: DataConfig) -> str:
    """What is to be said where all grey images of 16 bits among some of `Listing.table` are nearly black, as values of 12 bits
    or fewer in 16 are; empty if they are not, or there are none.
    """
    places = np.unique(np.linspace(0, rows.num_rows - 1, min(SAMPLE, rows.num_rows)).astype(np.int64))
    contents = read(rows.take(pa.array(places)), config)
    found = [highest_level(content, config.max_pixels) for content in contents if isinstance(content, bytes)]
    levels = [level for level in found if level is not None]
    if not levels or max(levels) >= DARK * config.grey_levels:
        return ""
    return (
        f"warning: grey images of 16 bits a pixel are nearly black: the highest level of {number_of(len(levels), 'image')} is "
        f"{max(levels)} of {config.grey_levels - 1}; give data.grey_levels, which is 4096 for values of 12 bits"
    )


def warning_of_unreadable(rows: pa.Table, config: DataConfig, total: int) -> str:
    """What is to be said where more of some of `Listing.table`, of which a set has `total`, cannot be read than may be left out;
    empty if no more, and of more than MOST, which are not looked at.
    """
    if rows.num_rows > MOST:
        return ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda start: read_pixels(rows.slice(start, CHUNK), config), range(0, rows.num_rows, CHUNK))
        reasons = [image if isinstance(image, str) else None for part in parts for image in part]
    bad = [(id, reason) for id, reason in zip(rows["id"].to_pylist(), reasons, strict=True) if reason is not None]
    if len(bad) <= config.max_rejected * total:
        return ""
    return (
        f"warning: {len(bad)} of {total} images cannot be read, more than data.max_rejected = {config.max_rejected}, so that the "
        f"set will not be finished; the first: '{bad[0][0]}' {bad[0][1]}. Repair the files, or raise data.max_rejected, "
        "and run again: what has been projected by then is kept"
    )
