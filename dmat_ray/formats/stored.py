"""What stands in for the objects of a foreign checkpoint: records that run nothing and believe nothing.

A pickle builds these in place of torch's, NumPy's and NVlabs' own classes (see `checkpoints`). No size is taken on trust:
a tensor is a record of where its numbers lie, made only if they do lie there, and read only when somebody asks. A pickle
may also set the state of what it has built, so every record says what that does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# under their old names too: whoever builds these records refuses and shows with them
from dmat_ray.formats.refusal import RefusedError as RefusedError
from dmat_ray.formats.refusal import shown as shown

NUMPY_TYPES = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32,
    "i8": torch.int64, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
LARGEST = 2**63 - 1
Reader = Callable[[int, int], bytes | bytearray | memoryview]


def _sizes(value: Any) -> tuple[int, ...]:
    """Axes or strides, that fit into 64 bits."""
    if not isinstance(value, tuple) or len(value) > 8 or not all(type(v) is int and 0 <= v <= LARGEST for v in value):
        raise RefusedError("holds a tensor of an impossible shape")
    return value


class Storage:
    """A run of `count` numbers somewhere in a file; `read` gives its bytes from one place to another."""

    def __init__(self, dtype: Any, count: Any, read: Reader | None = None) -> None:
        if not isinstance(dtype, torch.dtype) or type(count) is not int or not 0 <= count <= LARGEST:
            raise RefusedError("holds a tensor of no known type")
        self.dtype, self.count, self.read = dtype, count, read
        self.nbytes = count * dtype.itemsize

    def __setstate__(self, state: object) -> None:
        raise RefusedError("changes a storage that it has built")


class Stored:
    """A tensor in a file, not yet read: its shape, and where its numbers are."""

    storage: Storage
    shape: tuple[int, ...]

    def place(self, storage: Any, offset: Any, shape: Any, stride: Any) -> "Stored":
        """Say where the numbers are. Raises RefusedError unless the storage holds as many."""
        self.shape, self.stride = _sizes(shape), _sizes(stride)
        if math.prod(max(n, 1) for n in self.shape) > LARGEST:
            raise RefusedError("holds a tensor of an impossible shape")
        placed = type(offset) is int and 0 <= offset <= LARGEST and len(self.shape) == len(self.stride)
        if not isinstance(storage, Storage) or not placed:
            raise RefusedError("holds a tensor without numbers")
        self.offset, self.numel = offset, math.prod(self.shape)
        self.span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0
        # the number of elements too: a stride of 0 would make any shape out of one number
        if max(self.numel, offset + self.span) > storage.count:
            raise RefusedError(f"holds a tensor of shape {shown(self.shape)} with only {storage.count} numbers behind it")
        self.storage = storage
        return self

    def __setstate__(self, state: Any) -> None:
        """The state of a NumPy array: version, shape, dtype, column-major order, bytes."""
        if hasattr(self, "storage") or not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("changes a tensor that it has built")
        _, shape, dtype, columns, raw = state
        self.place(*_array_parts(raw, dtype, shape, columns is True))

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """What reading it takes; of a tensor with gaps also these."""
        return max(self.numel, self.span) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, as it is in the file. Raises RefusedError if the file has not its numbers after all."""
        if self.numel == 0:
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.storage.read is None:
            raise RefusedError("does not hold the tensors that it names")
        size = self.dtype.itemsize
        raw = self.storage.read(self.offset * size, (self.offset + self.span) * size)
        flat = torch.frombuffer(bytearray(raw), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


class Bag(dict[Any, Any]):
    """Stands in for every kind of dict; whatever else such an object carries is dropped."""

    def __init__(self) -> None:  # no arguments: copies of copies could fill the memory
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(eq=False)
class Module:
    """A network of NVlabs' PyTorch pickles: the name of its class and its attributes, without its source."""

    class_name: str
    state: dict[Any, Any]

    def __setstate__(self, state: object) -> None:
        raise RefusedError("changes a network that it has built")


class TensorFlowNetwork:
    """A network of NVlabs' TensorFlow pickles, without its source."""

    state: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedError("holds a TensorFlow network without variables")
        self.state = {key: value for key, value in state.items() if key != "build_module_src"}


class NumpyType:
    """A NumPy dtype of plain numbers."""

    def __init__(self, text: Any = None, *_: Any) -> None:
        if not isinstance(text, str) or text not in NUMPY_TYPES:
            raise RefusedError(f"holds a NumPy array of dtype {shown(text)}, which is not plain numbers")
        self.text, self.torch = text, NUMPY_TYPES[text]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "=", "|"):
            raise RefusedError("holds a NumPy array of another byte order")


def _array_parts(raw: Any, dtype: Any, shape: Any, by_columns: bool) -> tuple[Storage, int, tuple[int, ...], tuple[int, ...]]:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, NumpyType):
        raise RefusedError("holds a NumPy array of objects")
    sizes = _sizes(shape)
    axes = list(range(len(sizes)))
    stride, step = [0] * len(sizes), 1
    for axis in axes if by_columns else reversed(axes):
        stride[axis], step = step, step * sizes[axis]
    view = memoryview(raw)
    return Storage(dtype.torch, len(raw) // dtype.torch.itemsize, lambda begin, end: view[begin:end]), 0, sizes, tuple(stride)


class Maker:
    """A function that a pickle may call. A plain function would let the pickle set its attributes, its defaults too."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise RefusedError("changes a function")


def frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Stored:
    """numpy.core.numeric._frombuffer: an array of pickle protocol 5."""
    return Stored().place(*_array_parts(raw, dtype, shape, order == "F"))


def scalar(dtype: Any, raw: Any) -> Any:
    """numpy.core.multiarray.scalar: one number."""
    if not isinstance(dtype, NumpyType) or not isinstance(raw, bytes) or len(raw) != dtype.torch.itemsize:
        raise RefusedError("holds a NumPy number without its bytes")
    return np.frombuffer(raw, dtype.text)[0].item()


def number_bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, which stands for bytes in old pickles: those of a number, as longer ones could be copied at will."""
    if not isinstance(text, str) or encoding != "latin1" or len(text) > 16:
        raise RefusedError("asks for _codecs.encode of something that is no number")
    return text.encode("latin1")


def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return Stored().place(storage, offset, shape, stride)


def parameter(data: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter."""
    return data


def persistent(meta: Any) -> Module:
    """torch_utils.persistence._reconstruct_persistent_obj, which in NVlabs' code executes meta['module_src']."""
    name, state = (meta.get("class_name"), meta.get("state")) if isinstance(meta, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(state, dict):
        raise RefusedError("holds a network without a class name or a state")
    return Module(name, state)


def dropped(*_: Any) -> None:
    """Stands in for sets, of which no weights are made."""
