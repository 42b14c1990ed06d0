"""CIFAR's and MNIST's files as their documentation describes them, written from arrays."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def arrays(count: int, classes: int, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels, every class in turn, shuffled."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.permutation(np.arange(count) % classes)


def _parts(count: int) -> list[slice]:
    return [slice(k * count // 5, (k + 1) * count // 5) for k in range(5)]


def cifar10_binary(folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Path:
    """<1 x label><3072 x pixel> an image, and the names of the classes, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in _batches(train, test):
        rows = np.concatenate([labels.astype(np.uint8)[:, None], pixels.reshape(len(labels), -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    return folder


def _batches(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> list[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    named = [(f"data_batch_{k}", (train[0][part], train[1][part])) for k, part in enumerate(_parts(len(train[1])), 1)]
    return [*named, ("test_batch", test)]


def cifar100_binary(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], fine: list[str], coarse: list[str]
) -> Path:
    """<1 x coarse label><1 x fine label><3072 x pixel> an image; the coarse label is a fifth of the fine one here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in (("train", train), ("test", test)):
        both = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(np.concatenate([both, pixels.reshape(len(labels), -1)], axis=1).tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"{name}\n" for name in fine))
    (folder / "coarse_label_names.txt").write_text("".join(f"{name}\n" for name in coarse))
    return folder


def python2(tree: dict[str, object]) -> bytes:
    """A dict of texts, lists of small numbers or texts, and one array, pickled as Python 2 and its NumPy have done it."""

    def text(value: str | bytes) -> bytes:
        raw = value.encode() if isinstance(value, str) else value
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw

    def item(value: object) -> bytes:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(text(v) if isinstance(v, str) else b"K" + bytes([v]) for v in value) + b"e"
        assert isinstance(value, np.ndarray)
        sizes = b"".join(b"J" + struct.pack("<i", n) for n in value.shape)
        kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        blank = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return blank + b"(K\x01(" + sizes + b"t" + kind + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in tree.items()) + b"u."


def cifar10_python(folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Path:
    """As published: pickles of Python 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in _batches(train, test):
        tree: dict[str, object] = {"batch_label": name, "labels": labels.tolist(), "data": pixels.reshape(len(labels), -1)}
        (folder / name).write_bytes(python2({**tree, "filenames": [f"{name}_{i}.png" for i in range(len(labels))]}))
    (folder / "batches.meta").write_bytes(python2({"label_names": list(CIFAR10_NAMES)}))
    return folder


def cifar100_python(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], fine: list[str], coarse: list[str]
) -> Path:
    """The same of 100 classes, pickled by the Python of today."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in (("train", train), ("test", test)):
        tree = {"data": pixels.reshape(len(labels), -1), "fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(tree, protocol=4))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": fine, "coarse_label_names": coarse}))
    return folder


def idx(
    folder: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *, compressed: bool = False
) -> Path:
    """MNIST's files: a magic number that says type and axes, the sizes, the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (pixels, labels) in (("train", train), ("t10k", test)):
        files = {"images-idx3-ubyte": pixels, "labels-idx1-ubyte": labels.astype(np.uint8)}
        for name, values in files.items():
            content = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()
            path = folder / f"{part}-{name}{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    return folder
