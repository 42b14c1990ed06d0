"""The training and test parts that a source has of its own, told by the names of folders and Parquet files.

ImageNet's are the folders `train` and `val`; Hugging Face's are files such as `data/train-00000-of-00294.parquet`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = "(train|training|test|testing|val|valid|validation|dev|eval|evaluation)(?:[-_ ]?set)?"
FOLDER = re.compile(NAMES + r"(\.parquet)?", re.IGNORECASE)  # Spark writes a folder of this name
FILE = re.compile(NAMES + r"([-_.].*)?", re.IGNORECASE)
OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # all others are the validation part


@dataclass(frozen=True)
class Parts:
    """Names by the part that they belong to, in their order; `rest` is what belongs to none."""

    train: list[str]
    test: list[str]
    validation: list[str]
    rest: list[str]


def part_of(path: str, *, exactly: bool) -> str:
    """'train', 'test' or 'validation', as the last name in a path that tells says; '' if none does.

    Folders are called `exactly` so; a file's name may go on after it, unless that is asked of it, too.
    """
    *folders, name = path.split("/")
    for match in (FOLDER.fullmatch(name) if exactly else FILE.fullmatch(name), *map(FOLDER.fullmatch, reversed(folders))):
        if match:
            return OF.get(match[1].lower(), "validation")
    return ""


def by_part(paths: Sequence[str], *, exactly: bool = False) -> Parts | None:
    """The parts of these paths, or None if no two parts are there and none is for training."""
    found: dict[str, list[str]] = {"train": [], "test": [], "validation": [], "": []}
    for path in paths:
        found[part_of(path, exactly=exactly)].append(path)
    known = found["train"] or (found["test"] and found["validation"])
    return Parts(found["train"], found["test"], found["validation"], found[""]) if known else None
