"""What a source of natural images holds, before it is split and limited."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Items:
    """Everything that a source holds, in its order: columns of `sources.Listing.table`, and the names of the classes.

    `ignored` says which files are no images ('' = none). `in_test` is the source's own split, if it has one.
    """

    ids: Any
    labels: np.ndarray
    files: Any
    rows: Any
    class_names: tuple[str, ...]
    ignored: str = ""
    in_test: np.ndarray | None = None
