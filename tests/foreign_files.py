"""Files as other projects write them, for the tests of all that reads such files."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class EasyDict(dict):
    """dnnlib.util.EasyDict, as far as pickles go."""


class Persistent:
    """An object of torch_utils.persistence: pickled as its class's name, its state, and the source of its module."""

    def __init__(self, class_name: str, source: str, **state: Any) -> None:
        self.class_name, self.source, self.state = class_name, source, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("nothing of a pickle may be called")


class Network:
    """dnnlib.tflib.network.Network, as far as pickles go."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


@contextmanager
def published_modules() -> Iterator[None]:
    """NVlabs' modules, only while pickling: pickles name classes by the modules in which they lie."""
    homes = {
        "dnnlib": None, "dnnlib.util": EasyDict, "dnnlib.tflib": None, "dnnlib.tflib.network": Network, "torch_utils": None,
        "torch_utils.persistence": _reconstruct_persistent_obj,
    }  # fmt: skip
    try:
        for name, member in homes.items():
            sys.modules[name] = types.ModuleType(name)
            if member is not None:
                setattr(sys.modules[name], member.__name__, member)
                member.__module__ = name
        yield
    finally:
        for name in homes:
            del sys.modules[name]


def nvlabs_pickle(tree: Any, protocol: int = 4) -> bytes:
    with published_modules():
        return pickle.dumps(tree, protocol=protocol)


def modules_of(state: dict[str, Tensor], attributes: dict[str, dict[str, Any]], source: str = "") -> Persistent:
    """A flat state dict as nested persistent modules, as a generator of stylegan2-ada-pytorch is."""

    def build(prefix: str) -> Persistent:
        own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        children = OrderedDict((key.split(".")[0], None) for key in own if "." in key)
        buffers = ("noise_const", "resample_filter", "w_avg")
        leaves = {key: value for key, value in own.items() if "." not in key}
        return Persistent(
            "Generator" if not prefix else "Part",
            source,
            training=False,
            _parameters=OrderedDict((k, torch.nn.Parameter(v)) for k, v in leaves.items() if k not in buffers),
            _buffers=OrderedDict((k, v) for k, v in leaves.items() if k in buffers),
            _modules=OrderedDict((name, build(f"{prefix}{name}.")) for name in children),
            _non_persistent_buffers_set=set(),
            _backward_hooks=OrderedDict(),
            _init_args=(),
            _init_kwargs=EasyDict(channel_max=512),
            weight_gain=np.float64(0.3),
            **attributes.get(prefix.removesuffix("."), {}),
        )

    return build("")


def torch_zip(data: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip in the form of torch.save's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return buffer.getvalue()


class Id:
    """Pickled as a persistent id."""

    def __init__(self, *pid: Any) -> None:
        self.pid = pid


def with_ids(tree: Any) -> bytes:
    """A pickle in which every `Id` is a persistent id."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.pid if isinstance(value, Id) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def torch_saved(tree: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def write(folder: Path, data: bytes) -> Path:
    path = folder / "foreign.bin"  # nothing may depend on the name
    path.write_bytes(data)
    return path


def shared_lists(levels: int = 60) -> list[Any]:
    """A list of twice the list before it, and so on: a few hundred bytes of pickle, and 2^60 lists to look through."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found, found]
    return found


def odd_directory(data: bytes, place: int, byte: bytes) -> bytes:
    """A zip with one byte changed in its directory: at 6 the version that is needed, at 46 a letter of a UTF-8 name."""
    start = data.rindex(b"PK\x01\x02")
    utf8 = bytearray(data)
    utf8[start + 9] |= 8
    utf8[start + place : start + place + 1] = byte
    return bytes(utf8)
