"""Natural images as files in a folder with one sub-folder a class."""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data import parts
from dmat_ray.data.class_lists import composed
from dmat_ray.data.items import Items
from dmat_ray.errors import UserError
from dmat_ray.storage import Location

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def is_image(path: str) -> bool:
    """True for a name that ends as those of images do."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def folder_items(root: Location, files: list[str], folders: list[str], config: DataConfig, labelled: bool) -> Items:
    """The images of a tree of these files and folders, in their order. Raises UserError for one without classes or images."""
    images = [path for path in files if is_image(path)]
    above, test, unused = _parts(root, folders, images, config, labelled)
    inside = [folder[len(part) :] for part in above for folder in folders if folder.startswith(part)]
    called = _as_in_training(above, {path for path in inside if path and "/" not in path}, folders)
    classes = sorted(set(called.values()))
    if not classes and not labelled and images:
        images = [path for path in images if path.startswith(above)]
        labels, names = [0] * len(images), [root.name]
    elif not classes:
        raise UserError(f"data.source '{root}' holds no sub-folders; put the images of each class into one of its own")
    else:
        place = {name: label for label, name in enumerate(classes)}
        number = {name: place[own] for name, own in called.items()}
        depth = above[0].count("/")
        images = [path for path in images if path.startswith(above) and path.count("/") > depth]
        labels, names = [number[path.split("/", depth + 1)[depth]] for path in images], classes
    others = sorted(path for path in set(files) - set(images) if not path.startswith(unused))
    ignored = [f"the folder '{text(part.rstrip('/'))}' (data.official_split)" for part in unused]
    if others:
        why = "of no extension of images, or beside the class folders"
        ignored.append(f"{len(others)} file{'s' if len(others) > 1 else ''} {why}, the first: '{text(others[0])}'")
    empty = sorted(set(range(len(names))) - set(labels))
    if empty and not config.classes:
        raise UserError(
            f"class folder '{root / above[0] / names[empty[0]]}' holds no images ({', '.join(sorted(EXTENSIONS))}); remove it, "
            "or name the folders that are classes in data.classes"
        )
    return Items(
        pa.array([text(path) for path in images], pa.string()),
        np.array(labels, np.int64),
        pa.array([os.fsencode(path) for path in images], pa.binary()),
        pa.nulls(len(images), pa.int64()),
        tuple(text(name) for name in names),
        "; ".join(ignored),
        in_test=np.array([path.startswith(test) for path in images]) if test else None,
    )


def _parts(
    root: Location, folders: list[str], images: list[str], config: DataConfig, labelled: bool
) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """Where class folders lie ('' = in the source itself, else 'train/', 'val/'), which of these is the test part, and what of
    the source is left aside. Raises UserError for a test part that is asked for and not there, and where it is not clear.
    """
    top = sorted(folder for folder in folders if "/" not in folder)
    named = {composed(name) for one in config.classes for names in one.members for name in names}
    found = None if named.intersection(map(composed, top)) else parts.by_part(top, exactly=True)
    called = [part for part in top if part not in found.rest] if found else []
    alike = [] if named or config.official_split is not None else _alike(images)
    flat = not labelled and not any(_has_folders(part, folders) for part in called)  # they hold images, and need no classes
    offered = [part for part in (*found.test, *found.validation) if flat or _has_folders(part, folders)] if found else []
    own = _classes_in(found.train[0], folders, config) if found and found.train else set()
    # not a folder of unlabelled images, as test/unknown is and test/images
    tested = [part for part in offered if not own or own & _classes_in(part, folders, config)]
    if found and not found.train:
        all_of_it = not labelled and config.official_split is False
        if not named and not all_of_it and (flat or not found.rest or any(_has_folders(part, folders) for part in called)):
            ways = "one of them as data.source, or name them in data.classes if they are classes"
            if not labelled:
                ways = "--data.official_split false to take all of them, or one of them as data.source"
            raise UserError(
                f"'{root}' has the folders {', '.join(map(repr, called))}, which look like parts of a data set, not like "
                f"classes, and none is for training; give {ways}"
            )
        found = None
    if found and config.official_split is None and not named:
        if found.train[0] in alike:
            called = sorted({*called, *alike})
        of_classes = _has_folders(found.train[0], folders) and (len(called) > 1 or not found.rest)
        if of_classes or (flat and len(called) > 1):
            ways = "true to take its own test part, or false" if tested else "false"
            raise UserError(
                f"'{root}' has the folders {', '.join(map(repr, called))}, which look like parts of a data set, not like "
                f"classes; give --data.official_split {ways} to split '{found.train[0]}' alone, or name them in data.classes if "
                "they are classes"
            )
        if labelled and not found.rest and len(called) > 1 and not any(_has_folders(part, folders) for part in called):
            raise UserError(
                f"'{root}' has the folders {', '.join(map(repr, called))}, which look like parts of a data set and hold no "
                f"sub-folders; put the images of each class into one of its own, such as '{found.train[0]}/cat', or name them in "
                "data.classes if they are classes"
            )
        found = None
    if found is None:
        if alike:
            raise UserError(
                f"'{root}' has the folders {', '.join(map(repr, alike[:5]))}{', ...' if len(alike) > 5 else ''}, which hold no "
                "images but sub-folders of the same names, as parts of a data set do; give one of them as data.source, or "
                "--data.official_split false if they are classes"
            )
        if config.official_split:
            raise UserError(f"data.official_split is true, but '{root}' has no folders 'train' and 'test' or 'val'")
        return ("",), "", ()
    train = f"{found.train[0]}/"
    if config.official_split is False or not tested:
        if config.official_split and offered:
            raise UserError(
                f"data.official_split is true, but {' and '.join(map(repr, offered))} of '{root}' "
                f"{'has' if len(offered) == 1 else 'have'} no sub-folder that is called as one of '{found.train[0]}'"
            )
        if config.official_split:
            raise UserError(
                f"data.official_split is true, but '{root}' has no folder 'test' or 'val' with one sub-folder a class"
            )
        return (train,), "", tuple(f"{part}/" for part in top if f"{part}/" != train)
    test = f"{tested[0]}/"
    return (train, test), test, tuple(f"{part}/" for part in top if f"{part}/" not in (train, test))


def _alike(images: list[str]) -> list[str]:
    """The top folders that hold images in folders alone, two or more of them under names that others of these have as well."""
    inside: dict[str, set[str]] = {}
    for top, *rest in (path.split("/", 2) for path in images):
        inside.setdefault(top, set()).add(rest[0] if len(rest) > 1 else "")
    inside = {top: names for top, names in inside.items() if "" not in names}
    count = Counter(name for names in inside.values() for name in names)
    return sorted(top for top, names in inside.items() if sum(count[name] > 1 for name in names) > 1)


def folder_with_more(paths: Sequence[str]) -> str:
    """The folder that all these images lie in, if they do so in several sub-folders of it; empty if they do not."""
    folders = {os.path.dirname(path) for path in paths}
    common = os.path.commonpath(folders) if folders else ""
    return "" if common in folders else common


def _as_in_training(above: tuple[str, ...], names: set[str], folders: list[str]) -> dict[str, str]:
    """Each name of a class folder as the first part writes it: macOS writes accents apart from their letters."""
    there = names.intersection(folder[len(above[0]) :] for folder in folders if folder.startswith(above[0]))
    alike = {composed(name): name for name in there}
    return {name: name if name in there else alike.get(composed(name), name) for name in names}


def _classes_in(part: str, folders: list[str], config: DataConfig) -> set[str]:
    """What the folders directly in this one are: names as they are compared, or those of `data.classes` that have them.

    A class may be called otherwise in each part: n02085620 in one, Chihuahua in the other.
    """
    inside = [folder[len(part) + 1 :] for folder in folders if folder.startswith(f"{part}/") and folder.count("/") == 1]
    called = {composed(name) for name in inside}
    if not config.classes:
        return called
    return {one.name for one in config.classes if any(composed(name) in called for names in one.members for name in names)}


def _has_folders(part: str, folders: list[str]) -> bool:
    return any(folder.startswith(f"{part}/") for folder in folders)


def text(path: str) -> str:
    """A path as it is; of a name that is not UTF-8, the bytes that are not as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
