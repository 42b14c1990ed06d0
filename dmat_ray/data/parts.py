"""The training and test parts that a source has of its own, told by the names of folders and Parquet files.

ImageNet's are the folders `train` and `val`; Hugging Face's are files such as `data/train-00000-of-00294.parquet`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

PART = re.compile(r"(train|training|test|val|valid|validation|dev)([-_.].*)?", re.IGNORECASE)
OF = {"train": "train", "training": "train", "test": "test"}  # all others are the validation part


@dataclass(frozen=True)
class Parts:
    """Names by the part that they belong to, in their order; `rest` is what belongs to none."""

    train: list[str]
    test: list[str]
    validation: list[str]
    rest: list[str]


def part_of(path: str, *, exactly: bool) -> str:
    """'train', 'test' or 'validation', as the first name in a path that tells says; '' if none does.

    `exactly` such a name, or also one that goes on after it, as files do.
    """
    for name in path.split("/"):
        match = PART.fullmatch(name)
        if match and not (exactly and match[2]):
            return OF.get(match[1].lower(), "validation")
    return ""


def by_part(paths: Sequence[str], *, exactly: bool = False) -> Parts | None:
    """The parts of these paths, or None if none of them is for training."""
    found: dict[str, list[str]] = {"train": [], "test": [], "validation": [], "": []}
    for path in paths:
        found[part_of(path, exactly=exactly)].append(path)
    return Parts(found["train"], found["test"], found["validation"], found[""]) if found["train"] else None
