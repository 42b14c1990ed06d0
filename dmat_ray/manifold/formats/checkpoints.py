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
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from dmat_ray.errors import UserError
from dmat_ray.manifold.formats import stored
from dmat_ray.manifold.formats.stored import Bag, Maker, NumpyType, RefusedError, Storage, TensorFlowNetwork, shown

MAX_OPCODES, MAX_NESTING = 3_000_000, 300  # the largest published checkpoints have some 50 thousand and 50
MAX_PICKLE = 4 << 30  # bytes; zips, whose tensors stay in the file until they are asked for, may be larger
# how torch.save began its files before they were zips: the pickle of a number
TORCH_MAGIC = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
TORCH_PROTOCOL = 1001
BEGINNINGS = {
    b"<": "is a web page, as a download leaves that asked for a login or a confirmation",
    b"version https://git-lfs": "is a Git LFS pointer; 'git lfs pull' gets the file itself",
    b"\x1f\x8b": "is compressed with gzip; decompress it first",
    b"\x89HDF": "is an HDF5 file, and no generator that is known here comes in one",
    b"\x93NUMPY": "is a NumPy array, not a checkpoint",
}
STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "ShortStorage": torch.int16,
    "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
PUT_OPCODES, GET_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
GROWING_OPCODES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


def _nested_storage(raw: Any) -> Storage:
    """torch.storage._load_from_bytes: a storage that torch.save wrote inside of another pickle."""
    storage = _read_torch_stream(raw) if isinstance(raw, bytes) else None
    if not isinstance(storage, Storage):
        raise RefusedError("holds something other than numbers where those of a tensor should be")
    return storage


# All that a pickle may name, and what it gets
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
    ("torch.storage", "_load_from_bytes"): _nested_storage,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{(f"{package}.multiarray", "_reconstruct"): stored.blank for package in ("numpy.core", "numpy._core")},
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

    def __init__(self, data: bytes, storage: Callable[[Any], Storage] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise RefusedError(f"asks for {shown(module)}.{shown(name)}, which no weights need")
        found = NAMES[module, name]
        return Maker(found) if isinstance(found, FunctionType) else found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None or not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            kind = pid[0] if isinstance(pid, tuple) and pid else pid
            raise RefusedError(f"asks for a persistent object of kind {shown(kind)}, which no weights need")
        return self._storage(pid)


class _Nesting:
    """How deep the values of a pickle are nested, from its opcodes alone.

    Python hashes nested tuples by recursion in C, without a guard: a hundred thousand levels end the process.
    """

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def after(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """The depth of what this opcode leaves on the stack."""
        stack, name, takes = self._stack, opcode.name, opcode.stack_before
        top = stack[-1] if stack else 0
        if name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()
        elif name in PUT_OPCODES or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = top
        elif name in GET_OPCODES:
            stack.append(self._memo.get(argument, 0))
        elif name == "DUP":
            stack.append(top)
        else:
            if pickletools.markobject in takes:
                if not self._marks:
                    raise RefusedError("is no pickle that a program wrote")
                start = max(self._marks.pop() - takes.index(pickletools.markobject), 0)
            else:
                start = max(len(stack) - len(takes), 0)
            taken = stack[start:]
            del stack[start:]
            depth = 1 + max(taken, default=-1)
            if name in GROWING_OPCODES and taken:  # these grow the first of what they take
                depth = max(taken[0], 1 + max(taken[1:], default=-1))
            stack += [depth] * len(opcode.stack_after)
            top = depth
        return top


def _check_opcodes(data: bytes, start: int = 0) -> int:
    """Walk over one pickle without running it; returns where it ends.

    Raises RefusedError for sizes beyond the file, places in the memo that would need an array of their size, nesting that
    would overflow the stack, and opcodes that no checkpoint has.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    nesting = _Nesting()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if opcode.name in REFUSED_OPCODES:
            raise RefusedError(f"holds the opcode {opcode.name}, which no weights need")
        if opcode.name in PUT_OPCODES and not 0 <= argument <= count:  # type: ignore[operator]
            raise RefusedError(f"gives the number {shown(argument)} to an object that is at most its {count}th")
        if opcode.name == "FRAME" and argument > len(data) - (position or 0):  # type: ignore[operator]
            raise RefusedError(f"claims a frame of {shown(argument)} bytes that it does not have")
        if count > MAX_OPCODES or nesting.after(opcode, argument) > MAX_NESTING:
            raise RefusedError("is longer or nested deeper than any checkpoint")
    return stream.tell()


def _unpickle(data: bytes, storage: Callable[[Any], Storage] | None = None) -> Any:
    _check_opcodes(data)
    return _Unpickler(data, storage).load()


def _read_torch_stream(data: bytes) -> Any:
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
        start, position = position, _check_opcodes(data, position)
        return _Unpickler(data[start:position], storage).load()

    if not data.startswith(TORCH_MAGIC):
        raise RefusedError("holds bytes that torch.save did not write where those of a tensor should be")
    _, protocol, system, tree, keys = [following() for _ in range(5)]
    if protocol != TORCH_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("was written by an unknown version of torch or on a machine of another byte order")
    if not isinstance(keys, list) or len(keys) != len(storages) or not all(key in storages for key in keys):
        raise RefusedError("does not hold the tensors that it names")
    view = memoryview(data)
    for key in keys:
        found, begin = storages[key], position + 8
        position = begin + found.nbytes
        if position > len(data) or struct.unpack_from("<q", data, begin - 8)[0] != found.count:
            raise RefusedError("is cut short, or names a tensor of another size than it holds")
        found.read = lambda part=view[begin:position]: part
    return tree


def _check_zip(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip by name. Raises RefusedError for what torch.save does not write: compression, overlaps, doubles."""
    listing = archive.infolist()
    if any(info.filename.endswith("/constants.pkl") for info in listing):
        raise RefusedError("is a TorchScript program, not weights")
    for info in listing:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise RefusedError("is a compressed zip, which torch.save does not write")
    if sum(info.file_size for info in listing) > size:
        raise RefusedError("is a zip whose files would be larger than itself")
    entries = {info.filename: info for info in listing}
    if len(entries) != len(listing):
        raise RefusedError("is a zip with two files of one name")
    return entries


def _read_torch_zip(path: Path, size: int) -> Any:
    """What torch.save writes: a zip with one pickle, and a file for each storage."""
    archive = zipfile.ZipFile(path)
    entries = _check_zip(archive, size)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedError("is a zip that torch.save did not write")
    root = pickles[0].removesuffix("data.pkl")

    def entry(info: zipfile.ZipInfo) -> bytes:
        try:
            return archive.read(info)
        except Exception as error:  # zipfile reads a second header here, and a damaged one can make it raise anything
            raise UserError(f"checkpoint '{path}' is damaged: {shown(error)}") from None

    if f"{root}byteorder" in entries and entry(entries[f"{root}byteorder"]) != b"little":
        raise RefusedError("was written on a machine of another byte order")

    def storage(pid: Any) -> Storage:
        info = entries.get(f"{root}data/{pid[2]}") if isinstance(pid[2], str) else None
        if info is None:
            raise RefusedError("does not hold the tensors that it names")
        found = Storage(pid[1], pid[4], lambda: entry(info))
        if found.nbytes > info.file_size:
            raise RefusedError(f"names a storage of {shown(pid[4])} numbers that it does not hold")
        return found

    return _unpickle(entry(entries[pickles[0]]), storage)


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
            raise RefusedError(f"is a pickle of {size >> 30} GiB, larger than any generator")
        data = path.read_bytes()
        return Contents(_read_torch_stream(data) if data.startswith(TORCH_MAGIC) else _unpickle(data), size)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint '{path}'") from None
    except RefusedError as error:
        raise UserError(f"checkpoint '{path}' {error}; nothing in it was run") from None
    except UserError:
        raise
    except Exception as error:  # a forged or damaged file can make the unpickler and zipfile raise anything
        if isinstance(error, OSError) and error.filename:  # no right to read it, or a folder
            raise
        reason = f"{type(error).__name__}: {shown(error, 120)}"
        raise UserError(f"checkpoint '{path}' is damaged or cut short ({reason}); nothing in it was run") from None
