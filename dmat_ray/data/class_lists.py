"""`data.classes`: classes that are made of a source's own, such as the ten of Mixed-10 of sixty of ImageNet's.

A source's class is known by the name of its folder, or by its label in Parquet: the number, and the name that metadata give it.
"""

import dataclasses
import difflib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from dmat_ray.config.data import ClassList
from dmat_ray.data.items import Items
from dmat_ray.errors import UserError


def select(items: Items, lists: Sequence[ClassList], source: str) -> Items:
    """The images of the classes in `lists`, labelled by these; `groups` tells which of a class's members an image is of.

    Groups are numbered in the order of the lists, so that a folder and Parquet files of the same images have the same ones.
    Raises UserError that names all members that the source lacks, one that is what two of its classes are called, or one of its
    classes that two lists claim by two names.
    """
    members = [(label, names) for label, one in enumerate(lists) for names in one.members]
    group_of = {composed(name): group for group, (_, names) in enumerate(members) for name in names}
    also = items.also or ("",) * len(items.class_names)
    called = [(composed(name), composed(other)) for name, other in zip(items.class_names, also, strict=True)]
    _require_one_class_each(group_of, called, source)
    groups = np.full(len(items.class_names), -1)
    for k, (name, other) in enumerate(called):
        claimed = sorted({group_of[n] for n in (name, other) if n in group_of})
        if len(claimed) > 1:
            first, second = (lists[members[group][0]].name for group in claimed)
            raise UserError(f"data.classes: class '{name}' ({other}) of '{source}' is named in '{first}' and in '{second}'")
        groups[k] = claimed[0] if claimed else -1
    group = groups[items.labels]
    counts = np.bincount(group[group >= 0], minlength=len(members))
    if missing := [place for place, count in enumerate(counts) if not count]:
        told = ", ".join(f"'{members[place][1][0]}' (of '{lists[members[place][0]].name}')" for place in missing)
        hint = _hint([name for place in missing for name in members[place][1]], [*items.class_names, *filter(None, also)])
        raise UserError(
            f"data.source '{source}' lacks {len(missing)} of the {len(members)} that data.classes names: {told}; {hint}"
        )
    keep = np.flatnonzero(group >= 0)
    place, kept = pa.array(keep), group[keep]
    others = len(group) - len(keep)
    told = f"{others} images of {int((groups < 0).sum())} classes that data.classes does not name" if others else ""
    return dataclasses.replace(
        items,
        ids=items.ids.take(place),
        files=items.files.take(place),
        rows=items.rows.take(place),
        labels=np.array([label for label, _ in members], np.int64)[kept],
        groups=kept,
        class_names=tuple(one.name for one in lists),
        also=None,
        in_test=None if items.in_test is None else items.in_test[keep],
        file_digests=None if items.file_digests is None else items.file_digests[keep],
        ignored="; ".join(filter(None, (told, items.ignored))),
    )


def composed(name: str) -> str:
    """A name as it is compared: macOS writes accents apart from their letters, a keyboard does not."""
    return unicodedata.normalize("NFC", name)


def _require_one_class_each(members: Iterable[str], called: Sequence[tuple[str, str]], source: str) -> None:
    """Raise UserError for a member that is what two classes of the source are called, each by a name and a number ('' = none)."""
    by_name: dict[str, list[str]] = {}
    by_number: dict[str, list[str]] = {}
    for name, number in called:
        by_name.setdefault(name, []).append(number or name)
        if number != name:
            by_number.setdefault(number, []).append(name)
    for member in members:
        named, others = by_name.get(member, []), by_number.get(member, [])
        if len(named) + len(others) > 1:
            told = [f"the name of class{'es' * (len(named) > 1)} {' and '.join(named)}"] if named else []
            told += [f"the number of class '{name}'" for name in others]
            raise UserError(
                f"data.classes: '{member}' is {' and '.join(told)} of '{source}'; give what one class alone is called there, its "
                "number or its name, or name the classes otherwise in the files"
            )


def _hint(missing: Sequence[str], known: Sequence[str]) -> str:
    for name in missing[:20]:
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            return f"'{name}' may be meant for '{close[0]}'"
    some = ", ".join(map(repr, known[:5]))
    return f"it has {some}{f' and {len(known) - 5} more' if len(known) > 5 else ''}"
