"""Checkpoint files of other projects, read without running any of what they hold.

A checkpoint is a pickle, alone or inside a zip, and a pickle is a program that calls whatever it names. Here it may name
what stands in one literal table, which gives it the records of `stored`: no class of a file is ever built and no source
in it executed. Every size that a file claims is held against the bytes that it has before anything is allocated.
torch.load(weights_only=True) would run nothing either, but it believes those sizes (a tensor that claims more than its
storage makes the storage grow), and a check of ours beforehand could read the same file in another way than torch does.

The format is recognised by content, never by a file's name.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from dmat_ray.errors import UserError
from dmat_ray.formats import stored
from dmat_ray.formats.archives import Entry, check_zip
from dmat_ray.formats.opcodes import Budget, check_opcodes
from dmat_ray.formats.stored import (
    Bag,
    Maker,
    NumpyType,
    RefusedError,
    Storage,
    Stored,
    TensorFlowNetwork,
    shown,
)

MAX_KEY = 64  # letters in a storage's name
MAX_PICKLE = 4 << 30  # bytes; zips, whose tensors stay in the file until they are asked for, may be larger
# how torch.save began its files before they were zips: the pickle of a number
TORCH_MAGIC = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
TORCH_PROTOCOL = 1001
BEGINNINGS = {
    b"<": "is a web page, as a download leaves that asked for a login or a confirmation",
    b"version https://git-lfs": "is a Git LFS pointer; 'git lfs pull' gets the file itself",
    b"\x1f\x8b": "is compressed with gzip; decompress it first",
    b"\x89HDF": "is an HDF5 file, and no weights that are known here come in one",
    b"\x93NUMPY": "is a NumPy array, not a checkpoint",
}
STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "ShortStorage": torch.int16,
    "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
# All that a pickle may name, and what it gets; a text is a method of _Unpickler
NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Bag,
    ("dnnlib.util", "EasyDict"): Bag,
    ("dnnlib", "EasyDict"): Bag,
    ("argparse", "Namespace"): Bag,
    ("builtins", "set"): stored.dropped,
    ("__builtin__", "set"): stored.dropped,
    ("torch._utils", "_rebuild_tensor"): stored.tensor,
    ("torch._utils", "_rebuild_tensor_v2"): stored.tensor,
    ("torch._utils", "_rebuild_parameter"): stored.parameter,
    ("torch.storage", "_load_from_bytes"): "_nested_storage",
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{(f"{package}.multiarray", "_reconstruct"): "_blank" for package in ("numpy.core", "numpy._core")},
    **{(f"{package}.multiarray", "scalar"): stored.scalar for package in ("numpy.core", "numpy._core")},
    **{(f"{package}.numeric", "_frombuffer"): stored.frombuffer for package in ("numpy.core", "numpy._core")},
    ("_codecs", "encode"): stored.number_bytes,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): NumpyType,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): stored.persistent,
    ("dnnlib.tflib.network", "Network"): TensorFlowNetwork,
}


class _Unpickler(pickle.Unpickler):
    """Builds what stands in NAMES and nothing else."""

    def __init__(self, data: bytes, budget: Budget, storage: Callable[[Any], Storage] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._budget, self._storage = budget, storage
        self._blanks: list[Stored] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise RefusedError(f"asks for {shown(module)}.{shown(name)}, which no weights need")
        found = NAMES[module, name]
        if isinstance(found, str):
            return Maker(getattr(self, found))
        return Maker(found) if isinstance(found, FunctionType) else found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            kind = pid[0] if isinstance(pid, tuple) and pid else pid
            raise RefusedError(f"asks for a persistent object of kind {shown(kind)}, which no weights need")
        if not isinstance(pid[2], str) or len(pid[2]) > MAX_KEY:
            raise RefusedError(f"names a storage by {shown(pid[2])}, which torch.save does not")
        return self._storage(pid)

    def load(self) -> Any:
        tree = super().load()
        if not all(hasattr(blank, "storage") for blank in self._blanks):
            raise RefusedError("holds a NumPy array without numbers")
        return tree

    def _blank(self, *_: Any) -> Stored:
        """numpy.core.multiarray._reconstruct: an array whose state comes next."""
        self._blanks.append(Stored())
        return self._blanks[-1]

    def _nested_storage(self, raw: Any) -> Storage:
        """torch.storage._load_from_bytes: a storage that torch.save wrote inside of another pickle."""
        storage = _read_torch_stream(raw, self._budget) if isinstance(raw, bytes) else None
        if not isinstance(storage, Storage):
            raise RefusedError("holds something other than numbers where those of a tensor should be")
        return storage


def _unpickle(data: bytes, budget: Budget, storage: Callable[[Any], Storage] | None = None) -> Any:
    check_opcodes(data, budget)
    return _Unpickler(data, budget, storage).load()


def _part(view: memoryview, begin: int, end: int) -> memoryview:
    return view[begin:end]


def _read_torch_stream(data: bytes, budget: Budget) -> Any:
    """What torch.save wrote before it wrote zips: five pickles, then for each storage its count and its bytes."""
    storages: dict[Any, Storage] = {}
    position = 0

    def storage(pid: Any) -> Storage:
        _, dtype, key, _, count, *view = pid
        if any(v is not None for v in view):
            raise RefusedError("holds views of storages, as only very old versions of torch wrote; save it again")
        found = storages.setdefault(key, Storage(dtype, count))
        if (found.dtype, found.count) != (dtype, count):
            raise RefusedError("gives one storage two sizes")
        if found.nbytes > len(data):
            raise RefusedError(f"names a storage of {shown(count)} numbers that it does not hold")
        return found

    def following() -> Any:
        nonlocal position
        start, position = position, check_opcodes(data, budget, position)
        return _Unpickler(data[start:position], budget, storage).load()

    if not data.startswith(TORCH_MAGIC):
        raise RefusedError("holds bytes that torch.save did not write where those of a tensor should be")
    _, protocol, system, tree, keys = [following() for _ in range(5)]
    if protocol != TORCH_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("was written by an unknown version of torch or on a machine of another byte order")
    # one that is named twice would leave another without numbers
    if not isinstance(keys, list) or len(keys) != len(storages) or set(keys) != set(storages):
        raise RefusedError("does not hold the tensors that it names")
    view = memoryview(data)
    for key in keys:
        found, begin = storages[key], position + 8
        position = begin + found.nbytes
        if position > len(data) or struct.unpack_from("<q", data, begin - 8)[0] != found.count:
            raise RefusedError("is cut short, or names a tensor of another size than it holds")
        found.read = partial(_part, view[begin:position])
    return tree


def _read_torch_zip(path: Path, size: int) -> Any:
    """What torch.save writes: a zip with one pickle, and a file for each storage."""
    with zipfile.ZipFile(path) as archive:
        listing = archive.infolist()
    if any(info.filename.endswith("/constants.pkl") for info in listing):
        raise RefusedError("is a TorchScript program, not weights")
    check_zip(listing, size)
    entries = {info.filename: info for info in listing}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("is a zip that torch.save did not write")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> bytes:
        return Entry(path, entries[name]).read(0, entries[name].file_size)

    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise RefusedError("was written on a machine of another byte order")

    def storage(pid: Any) -> Storage:
        info = entries.get(f"{root}data/{pid[2]}")
        if info is None:
            raise RefusedError("does not hold the tensors that it names")
        reader = readers.setdefault(pid[2], Entry(path, info))  # one for each, so that its checksum is looked at once
        found = Storage(pid[1], pid[4], reader.read)
        if found.nbytes > info.file_size:
            raise RefusedError(f"names a storage of {shown(pid[4])} numbers that it does not hold")
        return found

    readers: dict[str, Entry] = {}
    return _unpickle(content(pickles[0]), Budget(size), storage)


@dataclass(frozen=True)
class Contents:
    """What a file holds: dicts, lists, numbers and text, with `Stored`, `Module` and `TensorFlowNetwork` among them."""

    tree: Any = field(repr=False)
    size: int  # bytes of the file


def read(path: Path) -> Contents:
    """The contents of a checkpoint; the numbers of its tensors are not read yet.

    Raises UserError for what is no checkpoint, is damaged, claims more than it holds, or names anything besides weights.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
        for beginning, what in BEGINNINGS.items():
            if start.startswith(beginning):
                raise RefusedError(what)
        if start.startswith(b"PK\x03\x04"):
            return Contents(_read_torch_zip(path, size), size)
        if start[8:9] == b"{" and struct.unpack_from("<Q", start)[0] < size:
            raise RefusedError("is a safetensors file; give the folder that it lies in, with its card.json")
        if not start.startswith(b"\x80"):
            raise RefusedError("is no checkpoint of a known format (neither what torch.save writes nor a pickle)")
        if size > MAX_PICKLE:
            raise RefusedError(f"is a pickle of {size >> 30} GiB, larger than any that is known")
        data = path.read_bytes()
        return Contents((_read_torch_stream if data.startswith(TORCH_MAGIC) else _unpickle)(data, Budget(size)), size)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint '{path}'") from None
    except RefusedError as error:
        raise UserError(f"checkpoint '{path}' {error}; nothing in it was run") from None
    except UserError:
        raise
    except Exception as error:  # a forged or damaged file can make the unpickler and zipfile raise anything
        if isinstance(error, OSError) and error.filename:  # no right to read it, or a folder
            raise
        reason = f"{type(error).__name__}: {shown(str(error), 120)}"
        raise UserError(f"checkpoint '{path}' is damaged or cut short ({reason}); nothing in it was run") from None
