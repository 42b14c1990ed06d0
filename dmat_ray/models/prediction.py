"""What a classifier says of images that have no labels: the list of a folder's images, and rows of predictions."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dmat_ray.config import DataConfig
from dmat_ray.config.data import LATER
from dmat_ray.data.decoding import MAX_PIXELS
from dmat_ray.data.digits import CLASSES
from dmat_ray.data.folder_source import EXTENSIONS, is_image, text
from dmat_ray.data.pixels import to_unit
from dmat_ray.data.set_reader import named_classes
from dmat_ray.data.sources import NAMED, resize_like
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.models.checkpoint import UNSEEN
from dmat_ray.storage import at
from dmat_ray.wording import number_of

DECODING = ("resize", "grey_levels")  # settings of the data that a model is used with as it was trained
MOST = 5  # classes in the column `top5`; fewer if the model knows fewer
GUESS = pa.struct([("prediction", pa.int64()), ("class_name", pa.string()), ("probability", pa.float32())])
# one row an image; of one that cannot be read, `reason` says why, and all else but its path is null
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("prediction", pa.int64()),
        ("class_name", pa.string()),
        ("probability", pa.float32()),
        ("top5", pa.list_(GUESS)),
        ("reason", pa.string()),
    ]
)


def list_images(place: str) -> tuple[pa.Table, str]:
    """All images below a folder or URL, and which files are none ('' = all are).

    The table has the columns that `data.reading.read_pixels` wants: id, the path relative to the folder, file, and row (null).
    Raises UserError for a folder that is not there, cannot be listed, or holds no image.
    """
    root = at(place)
    try:
        if root.is_file():
            raise UserError(f"'{root}' is a file; give the folder of images that it lies in")
        files, folders = root.tree()
        if not files and not folders and not root.is_dir():
            raise UserError(f"'{root}' is no folder that exists; give a folder of images")
    except OSError as error:
        raise UserError(f"the images in '{root}' cannot be listed: {error.strerror} ('{error.filename}')") from None
    files.sort(key=lambda path: path.replace("/", "\0"))
    images = [path for path in files if is_image(path)]
    if not images:
        raise UserError(f"'{root}' holds no images ({', '.join(sorted(EXTENSIONS))})")
    others = sorted(set(files) - set(images))
    ignored = f"{number_of(len(others), 'file')} of no extension of images, the first: '{text(others[0])}'" if others else ""
    table = pa.table(
        {
            "id": pa.array([text(path) for path in images], pa.string()),
            "file": pa.array([os.fsencode(path) for path in images], pa.binary()),
            "row": pa.nulls(len(images), pa.int64()),
        }
    )
    return table, ignored


def decoding(run: dict[str, Any]) -> dict[str, Any]:
    """How images become those of the kind that a model, of which `run` is run.json, has learned from: settings of the data."""
    said = run["config"]["data"]
    how = {name: said.get(name, LATER[name]) for name in DECODING}
    if said.get("source") not in NAMED or "source" in run:  # of an imported model the settings say all of it
        return how
    # trainings on a set of other images have once recorded the source of their command line, by default the digits
    if run["class_names"] == ([one["name"] for one in said.get("classes", ())] or list(CLASSES)):
        how["resize"] = resize_like(said["source"], how["resize"])
    return how


def _read_with(run: dict[str, Any]) -> dict[str, Any]:
    """`decoding`, and the shape that images are brought to."""
    return {"channels": run["channels"], "resolution": run["resolution"], **decoding(run)}


def read_as(run: dict[str, Any], data: DataConfig, images: str) -> DataConfig:
    """How the images of a place are read for a model, of which `run` is run.json: as those that it has learned from, and, unless
    `data` has another limit than the default, up to as many pixels.
    """
    how = {**_read_with(run), "max_pixels": _most_pixels(run, data)}
    return data.model_copy(update={"source": images, "id_column": None, **how})


def _most_pixels(run: dict[str, Any], data: DataConfig) -> int:
    """Pixels that an image may have: a limit at its default, though somebody gave it, holds back none that a training took."""
    return max(MAX_PIXELS, run["config"]["data"].get("max_pixels", 0)) if data.max_pixels == MAX_PIXELS else data.max_pixels


def notes_of_decoding(run: dict[str, Any], data: DataConfig, given: Collection[str]) -> list[str]:
    """What is to be said of settings of `data` in whose place `read_as` takes the model's; `given` names those that somebody
    gave, though they may be at their defaults.
    """
    notes, usual = [], DataConfig()
    for name, own in _read_with(run).items():
        here = getattr(data, name)
        if here != own and (name in given or here != getattr(usual, name)):
            notes.append(f"note: data.{name} {here} is not taken: the model has learned from images that were read with {own}")
    if (most := _most_pixels(run, data)) != data.max_pixels:
        notes.append(f"note: images of up to {most} pixels are read, as for the model's training (data.max_pixels)")
    return notes


def warning_of_unseen(run: dict[str, Any]) -> str:
    """What is to be said of a model, of which `run` is run.json, that has seen no image of some class; '' if it has of all."""
    names = run.get(UNSEEN, [])
    return f"warning: the model was trained without an image of {named_classes(names)}, which it cannot know" if names else ""


@torch.no_grad()
@tf32(False)
def predict(
    network: nn.Module, class_names: Sequence[str], paths: Sequence[str], pixels_NCHW: np.ndarray, device: torch.device
) -> pa.Table:
    """Rows of SCHEMA for uint8 images. Raises UserError if the network's output is not finite."""
    if not len(paths):
        return SCHEMA.empty_table()
    logits = network(to_unit(pixels_NCHW).to(device)).float()
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model puts out values that are not finite")
    best = logits.softmax(dim=1).topk(min(MOST, len(class_names)), dim=1)
    rows = []
    for path, probabilities, labels in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        top = [
            {"prediction": label, "class_name": class_names[label], "probability": probability}
            for label, probability in zip(labels, probabilities, strict=True)
        ]
        rows.append({"path": path, **top[0], "top5": top})
    return pa.Table.from_pylist(rows, SCHEMA)


def unreadable(reasons: dict[str, str]) -> pa.Table:
    """Rows of SCHEMA for images that cannot be read, by path."""
    return pa.Table.from_pylist([{"path": path, "reason": reason} for path, reason in reasons.items()], SCHEMA)
