"""The images of a generator's training, decoded once into a folder that all its workers map."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dmat_ray.config import Config, DataConfig
from dmat_ray.data.sources import list_examples, read_pixels, versions_of_images
from dmat_ray.errors import UserError
from dmat_ray.files import read_json, text_digest, write_json
from dmat_ray.manifold import quality
from dmat_ray.manifold.gan_trainer import check_images, check_workers
from dmat_ray.manifold.generators import CARD, WEIGHTS

PARTIAL = ".images-*.partial"  # of the decoded images, until they are whole
PIXELS, LABELS, REJECTED = "images.npy", "labels.npy", "rejected.json"
CHUNK = 64  # images that a thread reads and decodes at a time


@dataclass(frozen=True)
class ImageCache:
    """The decoded training split in a folder that all workers map, and what was left out of it."""

    folder: Path
    digest: str
    rejected: dict[str, str]

    def open(self) -> tuple[Tensor, Tensor]:
        """uint8 images (N, C, H, W), of which only those asked for are ever read, and labels (N)."""
        labels = np.load(self.folder / LABELS)
        # a private map: what is shared with all processes of a node is never written
        pixels = np.load(self.folder / PIXELS, mmap_mode="c")
        return torch.from_numpy(pixels[: len(labels)]), torch.from_numpy(labels)


def _listing(config: Config) -> tuple[pa.Table, str]:
    """The training split, and a digest that changes with its images, their labels, and how they are decoded."""
    labelled = config.gan.architecture.num_classes > 0
    rows = list_examples(config.data, labelled=labelled).rows("train")
    columns = rows["id"].to_pylist(), rows["label"].to_pylist(), versions_of_images(rows, config.data)
    lines = [f"{id}\t{label}\t{version}" for id, label, version in zip(*columns, strict=True)]
    # without a word for what is as it was before it could be set
    resize = "" if config.data.resize == "crop" else f" {config.data.resize}"
    decoded = {name: getattr(config.data, name) for name in ("image_column", "max_pixels")}
    others = "".join(f" {name}={value}" for name, value in decoded.items() if value != DataConfig.model_fields[name].default)
    return rows, text_digest("\n".join([f"{config.data.resolution} {config.data.channels}{resize}{others}", *lines]))


def prepare_images(config: Config, storage: Path) -> ImageCache:
    """Decode the training split into a folder below `storage`, unless it is there.

    Raises UserError for settings that do not fit the images, before one is decoded, and if more than `data.max_rejected` of them
    cannot be read.
    """
    rows, digest = _listing(config)
    blank = torch.zeros(1, config.data.channels, config.data.resolution, config.data.resolution)
    _require_fit(config, blank, torch.tensor(rows["label"].to_pylist()))
    cache = storage / f"images-{digest[:16]}"
    if all((cache / name).is_file() for name in (PIXELS, LABELS, REJECTED)):
        return ImageCache(cache, digest, read_json(cache / REJECTED))
    shutil.rmtree(cache, ignore_errors=True)
    partial = storage / PARTIAL.replace("*", f"{digest[:16]}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        rejected = _decode_all(rows, config.data, partial)
        write_json(partial / REJECTED, rejected)
        partial.rename(cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ImageCache(cache, digest, rejected)


def _decode_all(rows: pa.Table, config: DataConfig, folder: Path) -> dict[str, str]:
    shape = (rows.num_rows, config.channels, config.resolution, config.resolution)
    pixels = np.lib.format.open_memmap(folder / PIXELS, mode="w+", dtype=np.uint8, shape=shape)

    def load(start: int) -> list[str | None]:
        """Decodes some; the reason for each that cannot be read."""
        found = read_pixels(rows.slice(start, CHUNK), config)
        for place, image in enumerate(found, start):
            if not isinstance(image, str):
                pixels[place] = image
        return [image if isinstance(image, str) else None for image in found]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of the interpreter's lock
        reasons = [reason for chunk in pool.map(load, range(0, rows.num_rows, CHUNK)) for reason in chunk]
    rejected = {id: reason for id, reason in zip(rows["id"].to_pylist(), reasons, strict=True) if reason is not None}
    good = [i for i, reason in enumerate(reasons) if reason is None]
    if not good or len(rejected) > config.max_rejected * rows.num_rows:
        name, first = next(iter(rejected.items()), ("", "there are none"))
        raise UserError(f"{len(rejected)} of {rows.num_rows} images were rejected; the first: '{name}' {first}")
    for place, i in enumerate(good):  # the places of those that could not be read are closed up
        if place != i:
            pixels[place] = pixels[i]
    pixels.flush()
    np.save(folder / LABELS, rows["label"].to_numpy()[good])
    return rejected


def is_trained(config: Config, folder: Path) -> bool:
    """True if `folder` holds the generator that these settings and this data make.

    Raises UserError if it holds another one, which training would replace.
    """
    if not folder.exists():
        return False
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    same = card.get("training") == config.gan.model_dump(mode="json") and card.get("images_sha256") == _listing(config)[1]
    if same and (folder / WEIGHTS).is_file():
        return True
    raise UserError(
        f"'{folder}' holds another generator, or one of other settings or images; give another --output, or --overwrite"
    )


def _require_fit(config: Config, images: Tensor, labels: Tensor) -> None:
    check_images(config.gan, images, labels)
    quality.check(config.gan.quality, images.shape[1], images.shape[2], labels)


def check(config: Config, storage: Path) -> ImageCache:
    """Raise UserError for settings that do not fit the images; returns the decoded images. Needs no Ray."""
    check_workers(config.gan, config.cluster.train_workers)
    cache = prepare_images(config, storage)
    _require_fit(config, *cache.open())  # a class may have been of images that cannot be read
    return cache
