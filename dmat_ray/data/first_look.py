"""A look at images before the work that depends on them begins."""

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data.decoding import highest_level
from dmat_ray.data.sources import read
from dmat_ray.wording import number_of

SAMPLE = 64  # images, spread over a listing, that are looked at for their range
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
