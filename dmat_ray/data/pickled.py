"""The Python version of CIFAR's files: pickled dicts, read without running any of what they hold.

A pickle is a program that calls whatever it names. Here it may name what an array of NumPy is made of, and gets a record of
where the numbers stand. Only the labels, the names and the place of the pixels in the file are taken out of it.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmat_ray.formats.opcodes import Budget, check_opcodes
from dmat_ray.formats.refusal import RefusedError, shown


class _Bytes:
    """Stands in for numpy.dtype, of which only single bytes are known."""

    def __init__(self, text: Any = None, *_: Any) -> None:
        if text not in ("u1", b"u1"):
            raise RefusedError(f"holds an array of {shown(text)}, not of bytes")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands in for an array: its shape and its bytes, which are checked against each other."""

    # of the class: a pickle may make an object without calling this
    shape: tuple[int, ...] = ()
    raw = b""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Version, shape, dtype, column-major order, bytes."""
        parts: Any = state if isinstance(state, tuple) and len(state) == 5 else (None,) * 5
        _, shape, kind, by_columns, raw = parts
        if not isinstance(kind, _Bytes) or not isinstance(raw, bytes) or by_columns:
            raise RefusedError("holds an array that is not of bytes, row by row")
        # of two axes, as CIFAR's are, so that nothing can overflow
        sized = isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)
        if not sized or shape[0] * shape[1] != len(raw):
            raise RefusedError(f"holds an array of shape {shown(shape)} with {len(raw)} bytes behind it")
        self.shape, self.raw = shape, raw


# all that such a pickle may name, and what it gets; classes, since a plain function would let a pickle change its attributes
NAMES: dict[tuple[str, str], Any] = {
    **{(f"{package}.multiarray", "_reconstruct"): _Array for package in ("numpy.core", "numpy._core")},
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    """Builds what stands in NAMES and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise RefusedError(f"asks for {shown(module)}.{shown(name)}, which no images need; nothing in it was run")
        return NAMES[module, name]


def _load(content: bytes) -> dict[str, Any]:
    """The dict in a file, with text for its keys. Raises RefusedError."""
    try:
        check_opcodes(content, Budget(len(content)))
        tree = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # a forged or damaged file can make the unpickler raise anything
        raise RefusedError(f"is damaged or no pickle ({type(error).__name__}: {shown(str(error))})") from None
    if not isinstance(tree, dict):
        raise RefusedError("holds no dict")
    # Python 2 has written bytes where Python 3 has text
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in tree.items()}


@dataclass(frozen=True)
class Batch:
    """The labels of a file's images, and where in the file its pixels begin: `width` bytes an image, one after the other."""

    labels: np.ndarray
    start: int
    width: int


def read_batch(content: bytes, key: str) -> Batch:
    """What a batch of CIFAR says under `data` and this key of labels. Raises RefusedError with the reason if it is none."""
    tree = _load(content)
    labels, data = tree.get(key), tree.get("data")
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise RefusedError(
            f"has no 'data' and '{key}', but {', '.join(repr(shown(name)) for name in list(tree)[:8]) or 'nothing'}"
        )
    count, width = data.shape if data.raw else (0, 1)
    if count != len(labels) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise RefusedError(f"has {len(labels)} labels for {count} images, or labels that are no numbers below 256")
    return Batch(np.array(labels, np.int64), content.find(data.raw), width)


def read_names(content: bytes, key: str) -> list[str]:
    """The names of the classes under this key of a file of names. Raises RefusedError if it has none."""
    names = _load(content).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise RefusedError(f"has no '{key}'")
    return [name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name for name in names]
