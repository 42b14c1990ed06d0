"""The images of a generator's training, decoded once into a folder that all its workers map."""

import math
import os
import shutil
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dmat_ray.config import Config, DataConfig
from dmat_ray.data import first_look
from dmat_ray.data.apart import require_apart
from dmat_ray.data.reading import read_pixels
from dmat_ray.errors import UserError
from dmat_ray.manifold import quality, trained_on
from dmat_ray.manifold.gan_trainer import check_images, check_workers
from dmat_ray.manifold.trained_on import CHUNK
from dmat_ray.storage.files import is_full, make_lasting, read_json, write_json
from dmat_ray.storage.folders import sweep_removed

PARTIAL = ".images-*.partial"  # of the decoded images, until they are whole
PIXELS, LABELS, REJECTED = "images.npy", "labels.npy", "rejected.json"
WHOLE = (PIXELS, LABELS, REJECTED, trained_on.IMAGES)


@dataclass(frozen=True)
class ImageCache:
    """The decoded training split in a folder that all workers map, and what was left out of it: images that cannot be read, by
    id with the reason, and what of the source is not taken ('' = nothing).
    """

    folder: Path
    digest: str
    rejected: dict[str, str]
    ignored: str = ""

    def open(self) -> tuple[Tensor, Tensor]:
        """uint8 images (N, C, H, W), of which only those asked for are ever read, and labels (N).

        Raises UserError on a machine that does not see the folder.
        """
        try:
            labels = np.load(self.folder / LABELS)
            # a private map: what is shared with all processes of a node is never written
            pixels = np.load(self.folder / PIXELS, mmap_mode="c")
        except FileNotFoundError:
            raise UserError(
                f"the decoded images in '{self.folder}' are not to be seen on {socket.gethostname()}: that folder is not shared "
                "by all nodes; give a shared one as --output"
            ) from None
        return torch.from_numpy(pixels[: len(labels)]), torch.from_numpy(labels)


def listed(config: Config) -> tuple[pa.Table, str, str]:
    """The training split of these settings, as `trained_on.listed`. Raises UserError unless it is apart from the output."""
    require_apart(config, makes_set=False)
    return trained_on.listed(config.data, labelled=config.gan.architecture.num_classes > 0)


def prepare_images(config: Config, storage: Path) -> ImageCache:
    """Decode the training split into a folder below `storage`, unless it is there: also of files that were other ones then, where
    an unfinished training of these settings goes on with it.

    Raises UserError for settings that do not fit the images, before one is decoded, and if more than `data.max_rejected` of them
    cannot be read.
    """
    rows, digest, ignored = listed(config)
    blank = torch.zeros(1, config.data.channels, config.data.resolution, config.data.resolution)
    _require_fit(config, blank, torch.tensor(rows["label"].to_pylist()))
    if not (storage / training_name(config, digest)).is_dir():
        digest = _gone_on_with(config, storage, rows) or digest
    cache = _cache_of(storage, digest)
    if _is_whole(cache):
        return ImageCache(cache, digest, read_json(cache / REJECTED), ignored)
    shutil.rmtree(cache, ignore_errors=True)
    if warning := first_look.warning_of_dark(rows, config.data):
        warnings.warn(warning.removeprefix("warning: "), stacklevel=2)
    partial = storage / PARTIAL.replace("*", f"{digest[:16]}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        rejected = _decode_all(rows, config.data, partial)
        write_json(partial / REJECTED, rejected)
        make_lasting(partial)  # what has its name passes for whole in every rerun
        partial.rename(cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ImageCache(cache, digest, rejected, ignored)


def _cache_of(storage: Path, digest: str) -> Path:
    return storage / f"images-{digest[:16]}"


def _is_whole(cache: Path) -> bool:
    return all((cache / name).is_file() for name in WHOLE)


def _gone_on_with(config: Config, storage: Path, rows: pa.Table) -> str:
    """The digest of the images of an unfinished training of these settings, if its decoded images are those of the `rows` of
    `trained_on.listed`, only from files of other times; empty if there is none.
    """
    for training in sorted(storage.glob(training_name(config, "*"))):
        for cache in filter(_is_whole, sorted(storage.glob(f"images-{training.name.split('-')[2]}*"))):
            known = pq.read_table(cache / trained_on.IMAGES)
            digest = trained_on.digest_of(known, config.data)  # another one if they were decoded otherwise
            if cache != _cache_of(storage, digest) or known.num_rows != rows.num_rows:
                continue
            if not trained_on.changes(known, rows, config.data):
                return digest
    return ""


def training_name(config: Config, digest: str) -> str:
    """What the folder of an unfinished training is called, of these settings and images of this digest."""
    return f"generator-{config.gan.fingerprint()}-{digest[:12]}-{config.cluster.train_workers}"


def sweep(storage: Path, own: Path | None = None) -> None:
    """Remove images below `storage` that were decoded for trainings which have ended, or of files that are others now, but `own`,
    and what kills have left of trainings that were being removed.

    Under the lease of the generator's folder.
    """
    sweep_removed(storage, "generator-*")
    for left in (*storage.glob(PARTIAL), *storage.glob("images-*")):
        digest = left.name.removeprefix("images-")[:12]
        if left != own and not any(storage.glob(f"generator-*-{digest}-*")):  # see `training_name`
            shutil.rmtree(left, ignore_errors=True)


def _decode_all(rows: pa.Table, config: DataConfig, folder: Path) -> dict[str, str]:
    pixels = _blank(folder / PIXELS, (rows.num_rows, config.channels, config.resolution, config.resolution))

    def load(start: int) -> list[tuple[str | None, bytes | None]]:
        """Decodes some; of each the reason why it cannot be read, or the digest of its pixels."""
        found = read_pixels(rows.slice(start, CHUNK), config)
        for place, image in enumerate(found, start):
            if not isinstance(image, str):
                pixels[place] = image
        return [(image if isinstance(image, str) else None, trained_on.pixels_digest(image)) for image in found]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of the interpreter's lock
        loaded = [one for chunk in pool.map(load, range(0, rows.num_rows, CHUNK)) for one in chunk]
    reasons = [reason for reason, _ in loaded]
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
    trained_on.write(folder, rows, [digest for _, digest in loaded])
    return rejected


def _blank(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """A mapped file of zeros whose space is taken: a write into a hole for which there is none would kill the process.

    Raises UserError if there is not so much.
    """
    size = math.prod(shape)
    try:
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"the decoded images of the training take {size / 1e9:.3g} GB below '{path.parents[1]}', and there is not so much "
            "space; free some, or give another --output"
        ) from None
    return mapped


def card_of(config: Config, cache: ImageCache) -> dict[str, Any]:
    """What the card of a generator says of the images that it is trained on, and how."""
    return {
        "data": config.data.model_dump(mode="json"),
        "images": len(cache.open()[1]),
        "images_sha256": cache.digest,
        **trained_on.described(cache.folder),
        "rejected": cache.rejected,
        "training": config.gan.model_dump(mode="json"),
    }


def _require_fit(config: Config, images: Tensor, labels: Tensor) -> None:
    check_images(config.gan, images, labels)
    quality.check(config.gan.quality, images.shape[1], images.shape[2], labels)


def check(config: Config, storage: Path) -> ImageCache:
    """Raise UserError for settings that do not fit the images; returns the decoded images. Needs no Ray."""
    check_workers(config.gan, config.cluster.train_workers)
    cache = prepare_images(config, storage)
    _require_fit(config, *cache.open())  # a class may have been of images that cannot be read
    return cache
