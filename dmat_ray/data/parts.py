"""The training and test parts that a source has of its own, told by the names of folders and Parquet files.

ImageNet's are the folders `train` and `val`; Hugging Face's are files such as `data/train-00000-of-00294.parquet`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = "(train|training|test|testing|val|valid|validation|dev|eval|evaluation)(?:[-_ ]?set)?"
FOLDER = re.compile(NAMES + r"(\.parquet)?", re.IGNORECASE)  # Spark writes a folder of this name
FILE = re.compile(NAMES + r"([-_.].*)?", re.IGNORECASE)
# the word last, before what only counts; of folders, too, where others are called so up to that word and are of another part
LAST = re.compile(r"(.*[-_. ])" + NAMES + r"(?:[-_.]?(?:of[-_.])?\d++)*(?:\.parquet)?", re.IGNORECASE)
NUMBERED = re.compile(
    r"(?<![^/._ -])\d++(?=[/._ -]|$)"
)  # of 0000.train.parquet and part-1-train.parquet: no data sets of their own
OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # all others are the validation part


@dataclass(frozen=True)
class Parts:
    """Names by the part that they belong to, in their order; `rest` is what belongs to none.

    `by_last_words` says that none of them tells its part by itself.
    """

    train: list[str]
    test: list[str]
    validation: list[str]
    rest: list[str]
    by_last_words: bool = False


def part_of(path: str, *, exactly: bool) -> str:
    """'train', 'test' or 'validation', as the last name in a path that tells says; '' if none does.

    Folders are called `exactly` so; a file's name may go on after it, unless that is asked of it, too.
    """
    *folders, name = path.split("/")
    for match in (FOLDER.fullmatch(name) if exactly else FILE.fullmatch(name), *map(FOLDER.fullmatch, reversed(folders))):
        if match:
            return _part(match[1])
    return ""


def _part(word: str) -> str:
    return OF.get(word.lower(), "validation")


def _by_last_words(paths: Sequence[str]) -> dict[str, str]:
    """The parts of the paths whose names differ in such a last word alone: `cifar10-train.parquet` and `cifar10-test.parquet`.

    One whose name has no like of another part is none: a steam-train is a vehicle. Nor is any where there are parts of several
    data sets, as `a_train`, `a_val`, `b_train` and `b_test` are.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        names = path.split("/")
        for depth in range(len(names), 0, -1):
            if match := LAST.fullmatch(names[depth - 1]):
                found[path] = NUMBERED.sub("", "/".join([*names[: depth - 1], match[1]])), _part(match[2])
                break
    parts_of: dict[str, set[str]] = {}
    for before, part in found.values():
        parts_of.setdefault(before, set()).add(part)
    known = {before for before, several in parts_of.items() if len(several) > 1}
    return {path: part for path, (before, part) in found.items() if before in known} if len(known) == 1 else {}


def by_part(paths: Sequence[str], *, exactly: bool = False) -> Parts | None:
    """The parts of these paths, or None if no two parts are there and none is for training."""
    found: dict[str, list[str]] = {"train": [], "test": [], "validation": [], "": []}
    first = {path: part_of(path, exactly=exactly) for path in paths}
    by_last_words = not any(first.values())
    if len({*first.values()} - {""}) < 2:
        first |= _by_last_words([path for path in paths if not first[path]])
    for path in paths:
        found[first[path]].append(path)
    known = found["train"] or (found["test"] and found["validation"])
    return Parts(found["train"], found["test"], found["validation"], found[""], by_last_words) if known else None
