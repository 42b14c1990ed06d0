"""What a source of natural images holds, before it is split and limited."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Items:
    """Everything that a source holds, in its order: columns of `sources.Listing.table`, and the names of the classes.

    `ignored` says what is not taken ('' = nothing). `in_test` is the source's own split, if it has one that is to be taken.
    `also` are second names of the classes (numbers, where the first are names), '' for one that has none. `groups` are what a
    split is stratified by besides the classes: an image's class in the source, where several of these are one here.
    `file_digests` is None where every image is a file of its own.
    """

    ids: Any
    labels: np.ndarray
    files: Any
    rows: Any
    class_names: tuple[str, ...]
    ignored: str = ""
    in_test: np.ndarray | None = None
    also: tuple[str, ...] | None = None
    groups: np.ndarray | None = None
    file_digests: np.ndarray | None = None

    def without(self, told: str) -> "Items":
        """The same where `told` is not taken, either, besides what `ignored` says."""
        return replace(self, ignored="; ".join(filter(None, (self.ignored, told))))
