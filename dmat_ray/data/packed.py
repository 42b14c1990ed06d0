"""CIFAR-10, CIFAR-100, MNIST and what comes in MNIST's format, in the few files in which they are published.

They are known by the names of their files. What is listed of an image is its file and the byte at which it begins there, so
that any part of it is read without the rest. All have a test set of their own, which is told as `Items.in_test`.

Formats: www.cs.toronto.edu/~kriz/cifar.html (binary and Python versions); yann.lecun.com/exdb/mnist (idx).
"""

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dmat_ray.config import DataConfig
from dmat_ray.data import parquet_rows, pickled
from dmat_ray.data.decoding import encode
from dmat_ray.data.file_digest import changed, file_digest
from dmat_ray.data.items import Items
from dmat_ray.errors import UserError
from dmat_ray.formats.refusal import RefusedError
from dmat_ray.storage import Location

CIFAR_SHAPE = (3, 32, 32)
CIFAR_BYTES = math.prod(CIFAR_SHAPE)
COARSE = ("coarse_label", "coarse_labels")  # data.label_column, for CIFAR-100's 20 classes instead of its 100
FINE_NAMES = "fine_label_names.txt"
MOST_PICKLED = 1 << 30  # bytes of a pickle, which is read whole to be listed
BUFFER, RECORDS = 1 << 18, 1000  # bytes and records in memory while a file is read
IDX = re.compile(r"(train|t10k)-(images)[-.]idx3-ubyte(\.gz)?")
LARGEST = 1 << 31  # pixels of an image
IDX_IMAGES, IDX_LABELS = 0x803, 0x801  # bytes of three axes, of one axis


@dataclass(frozen=True)
class Layout:
    """The names of the files of a data set, in their order; a folder that holds all `marks` is taken for one."""

    title: str
    marks: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str = ""


def _cifar10(suffix: str, names: str, title: str) -> Layout:
    train = tuple(f"data_batch_{k}{suffix}" for k in range(1, 6))
    return Layout(title, train[:1], train, (f"test_batch{suffix}",), names)


# of two that a folder holds the first is taken
LAYOUTS = (
    _cifar10(".bin", "batches.meta.txt", "CIFAR-10, binary version"),
    Layout("CIFAR-100, binary version", ("train.bin", FINE_NAMES), ("train.bin",), ("test.bin",), FINE_NAMES),
    _cifar10("", "batches.meta", "CIFAR-10, Python version"),
    Layout("CIFAR-100, Python version", ("train", "test", "meta"), ("train",), ("test",), "meta"),
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A data set and the folder below the source that it lies in ('' = the source itself)."""

    folder: str
    layout: Layout


def find(files: Sequence[str]) -> Published | None:
    """The published data set among these paths, if there is one. Raises UserError for several."""
    folders: dict[str, set[str]] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    found = [Published(folder, layout) for folder, names in sorted(folders.items()) if (layout := _layout(names)) is not None]
    if len(found) > 1:
        told = ", ".join(f"'{one.folder or '.'}' ({one.layout.title})" for one in found)
        raise UserError(f"data.source holds several data sets: {told}; give the folder of one of them")
    return found[0] if found else None


def _layout(names: set[str]) -> Layout | None:
    for layout in LAYOUTS:
        if names.issuperset(layout.marks):
            return layout
    # a file that is there twice is taken as it is, not compressed: any part of it can be read without the rest
    images = sorted((name for name in names if IDX.fullmatch(name)), key=lambda name: (name.endswith(".gz"), name))
    parts = {part: next((n for n in images if n.startswith(part)), f"{part}-images-idx3-ubyte") for part in ("train", "t10k")}
    return Layout("MNIST's format (idx)", (), (parts["train"],), (parts["t10k"],)) if images else None


def is_packed(name: str) -> bool:
    """True for the name of a file that holds images of such a data set."""
    base = name.rpartition("/")[2]
    return bool(IDX.fullmatch(base)) or any(base in (*layout.train, *layout.test) for layout in LAYOUTS)


def packed_items(root: Location, files: Sequence[str], found: Published, config: DataConfig) -> Items:
    """All images of a data set: first its training, then its test files, which `data.official_split` false leaves aside.

    Raises UserError for files that are missing, damaged, cut short, empty, or do not go together.
    """
    layout, prefix, there = found.layout, f"{found.folder}/" if found.folder else "", set(files)
    if missing := [prefix + name for name in (*layout.train, *layout.test) if prefix + name not in there]:
        raise UserError(f"data.source '{root}' is {layout.title}, but lacks {', '.join(map(repr, missing))}")
    coarse = config.label_column in COARSE and "CIFAR-100" in layout.title
    ids: list[str] = []
    labels, offsets, names, in_test, digests = [], [], [], [], []
    official = config.official_split is not False
    for split, parts in (("train", layout.train), ("test", layout.test))[: 1 + official]:
        listed = [_digest(root / (prefix + name)) for name in parts]
        read = [_records(root, prefix + name, there, coarse) for name in parts]
        count = sum(len(part) for part, _ in read)
        ids += [f"{split}-{i:05d}" for i in range(count)]
        labels += [part for part, _ in read]
        offsets += [start + step * np.arange(len(part)) for part, (start, step) in read]
        names += [
            pa.repeat(pa.scalar(os.fsencode(prefix + n), pa.binary()), len(p)) for n, (p, _) in zip(parts, read, strict=True)
        ]
        in_test.append(np.full(count, split == "test"))
        digests += [np.full(len(part), digest, np.int64) for digest, (part, _) in zip(listed, read, strict=True)]
    label = np.concatenate(labels).astype(np.int64)
    if not len(label):
        raise UserError(f"data.source '{root}' is {layout.title} without images")
    class_names = _class_names(root, prefix, layout, there, coarse)
    numbers = np.arange(len(class_names or ()))
    if class_names is None:  # those that occur: labels may begin at 1, as the letters of EMNIST do
        numbers, label = np.unique(label, return_inverse=True)
        class_names = tuple(str(number) for number in numbers)
    if label.max() >= len(class_names):
        raise UserError(f"label {label.max()} occurs in '{root}', but '{prefix}{layout.names}' names {len(class_names)} classes")
    return Items(
        pa.array(ids, pa.string()),
        label,
        pa.chunked_array(names, pa.binary()),
        pa.array(np.concatenate(offsets), pa.int64()),
        class_names,
        "" if official else f"the test set of {layout.title} (data.official_split)",
        in_test=np.concatenate(in_test) if official else None,
        also=tuple(str(number) for number in numbers),
        file_digests=np.concatenate(digests),
    )


def _digest(place: Location) -> int:
    with _told(place), place.open() as file:
        return file_digest(place, file)


def _class_names(root: Location, prefix: str, layout: Layout, there: set[str], coarse: bool) -> tuple[str, ...] | None:
    """The names of the classes, or None if no file tells them."""
    name = layout.names.replace("fine", "coarse") if coarse else layout.names
    if not name or prefix + name not in there:
        return None
    place = root / (prefix + name)
    content = _whole(place)
    if name.endswith(".txt"):
        return tuple(line.strip() for line in content.decode("utf-8", "backslashreplace").splitlines() if line.strip())
    key = "label_names" if name == "batches.meta" else "coarse_label_names" if coarse else "fine_label_names"
    with _told(place):
        return tuple(pickled.read_names(content, key))


@contextmanager
def _told(place: Location) -> Iterator[None]:
    """What is wrong with a file, as UserError that names it."""
    try:
        yield
    except RefusedError as error:
        raise UserError(f"'{place}' {error}") from None
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"'{place}' {parquet_rows.reason(error, place)}") from None


def _whole(place: Location) -> bytes:
    with _told(place), place.open() as file:
        if file.size() > MOST_PICKLED:
            raise RefusedError(f"has {file.size()} bytes, more than any such file")
        return bytes(file.read())


def _records(root: Location, name: str, there: set[str], coarse: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """The labels of a file's images, and (the byte at which the first of them begins, bytes from each to the next)."""
    place, base = root / name, name.rpartition("/")[2]
    if IDX.fullmatch(base):
        return _idx(root, name, there)
    if base.endswith(".bin"):
        before = 2 if base in ("train.bin", "test.bin") else 1  # CIFAR-100: the coarse label, then the fine
        with _told(place):
            return _binary(place, before, 0 if coarse or before == 1 else 1)
    key = "labels" if "batch" in base else "coarse_labels" if coarse else "fine_labels"
    with _told(place):
        batch = pickled.read_batch(_whole(place), key)
        if batch.width != CIFAR_BYTES and len(batch.labels):
            raise RefusedError(f"has {batch.width} bytes an image, not {CIFAR_BYTES}")
    return batch.labels, (batch.start, CIFAR_BYTES)


def _binary(place: Location, before: int, which: int) -> tuple[np.ndarray, tuple[int, int]]:
    record, labels = before + CIFAR_BYTES, []
    with _opened(place) as (file, size):
        if size % record:
            raise UserError(f"'{place}' has {size} bytes, which is no multiple of {record}: it is cut short or of another format")
        for _ in range(0, size, record * RECORDS):
            part = np.frombuffer(file.read(record * RECORDS), np.uint8)
            labels.append(part.reshape(-1, record)[:, which].copy())
    return np.concatenate([np.zeros(0, np.uint8), *labels]), (before, record)


def _idx(root: Location, name: str, there: set[str]) -> tuple[np.ndarray, tuple[int, int]]:
    place = root / name
    folder, separator, base = name.rpartition("/")
    plain = folder + separator + base.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    label_name = next((n for n in (plain, f"{plain}.gz") if n in there), None)
    if label_name is None:
        raise UserError(f"data.source '{root}' holds '{name}', but no '{plain}' (or .gz), which would say its labels")
    with _told(place), _opened(place) as (file, size):
        count, height, width = _idx_header(file.read(16), IDX_IMAGES)
        if height * width > LARGEST:
            raise RefusedError(f"claims images of {height}x{width}")
        if not name.endswith(".gz") and size != 16 + count * height * width:
            raise RefusedError(f"has {size} bytes, but claims {count} images of {height}x{width}")
    with _told(root / label_name), _opened(root / label_name) as (file, _):
        (labelled,) = _idx_header(file.read(8), IDX_LABELS)
        labels = np.frombuffer(file.read(count + 1), np.uint8)
    if not count == labelled == len(labels):
        raise UserError(f"'{root / label_name}' has {len(labels)} labels and claims {labelled}, for {count} images in '{name}'")
    return labels, (16, height * width)


def _idx_header(header: bytes, kind: int) -> tuple[int, ...]:
    """The sizes that an idx file claims."""
    magic, *sizes = struct.unpack(f">{len(header) // 4}I", header) if len(header) in (8, 16) else (0,)
    if magic != kind or len(sizes) != kind & 0xFF:
        raise RefusedError(f"is no idx file of {'images' if kind == IDX_IMAGES else 'labels'}: it begins with {header[:4]!r}")
    return tuple(sizes)


@contextmanager
def _opened(place: Location, digest: int | None = None) -> Iterator[tuple[Any, int]]:
    """A file for reading here and there, decompressed, and its size as it lies in the storage.

    Raises UserError for one that had another `digest` when it was listed.
    """
    with place.open() as file:
        if digest is not None and file_digest(place, file) != digest:
            raise changed(place)
        size = int(file.size())
        buffered = io.BufferedReader(file, BUFFER)  # neighbours are one request to an object store
        if not place.name.endswith(".gz"):
            yield buffered, size
            return
        with gzip.GzipFile(fileobj=buffered) as plain:
            yield plain, size


def read_images(place: Location, digest: int, offsets: Sequence[int], max_bytes: int) -> list[bytes | str]:
    """The images that begin at these bytes of a file, as PNG, or the text of the reason why one cannot be read.

    No more than the images asked for is kept in memory, none of which has more than `max_bytes`. Raises StorageError for a
    storage that does not answer, and UserError for a file that had another `digest` when it was listed.
    """
    found: dict[int, bytes] = {}
    reason = "cannot be read: the file ends before it"
    try:
        with _opened(place, digest) as (file, _):
            shape: tuple[int, ...] = CIFAR_SHAPE
            if IDX.fullmatch(place.name):
                shape = (1, *_idx_header(file.read(16), IDX_IMAGES)[1:])
                if math.prod(shape) > max_bytes:  # of a compressed file no size tells what a header may claim
                    raise RefusedError(f"claims images of {shape[1]}x{shape[2]}, more than data.max_pixels allows")
            for offset in sorted(set(offsets)):
                file.seek(offset)
                content = file.read(math.prod(shape))
                if len(content) == math.prod(shape):
                    found[offset] = encode(np.frombuffer(content, np.uint8).reshape(shape))
    except (OSError, EOFError, zlib.error) as error:
        reason = parquet_rows.reason(error, place)
    except RefusedError as error:
        reason = f"cannot be read: the file {error}"
    return [found.get(offset, reason) for offset in offsets]
