"""Natural images as files in a folder with one sub-folder a class."""

import os

import numpy as np
import pyarrow as pa

from dmat_ray.data.items import Items
from dmat_ray.errors import UserError
from dmat_ray.storage import Location

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


def is_image(path: str) -> bool:
    """True for a name that ends as those of images do."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def folder_items(root: Location, files: list[str], folders: list[str], labelled: bool) -> Items:
    """The images of a tree of these files and folders, in their order. Raises UserError for one without classes or images."""
    images = [path for path in files if is_image(path)]
    classes = sorted(path for path in folders if "/" not in path)
    if not classes and not labelled and images:
        labels, names = [0] * len(images), [root.name]
    elif not classes:
        raise UserError(f"data.source '{root}' holds no sub-folders; put the images of each class into one of its own")
    else:
        number = {name: label for label, name in enumerate(classes)}
        images = [path for path in images if "/" in path]
        labels, names = [number[path.split("/", 1)[0]] for path in images], classes
    others = sorted(set(files) - set(images))
    ignored = ""
    if others:
        why = "of no extension of images, or beside the class folders"
        ignored = f"{len(others)} file{'s' if len(others) > 1 else ''} {why}, the first: '{text(others[0])}'"
    empty = sorted(set(range(len(names))) - set(labels))
    if empty:
        raise UserError(f"class folder '{root / names[empty[0]]}' holds no images ({', '.join(sorted(EXTENSIONS))})")
    return Items(
        pa.array([text(path) for path in images], pa.string()),
        np.array(labels, np.int64),
        pa.array([os.fsencode(path) for path in images], pa.binary()),
        pa.nulls(len(images), pa.int64()),
        tuple(text(name) for name in names),
        ignored,
    )


def text(path: str) -> str:
    """A path as it is; of a name that is not UTF-8, the bytes that are not as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
