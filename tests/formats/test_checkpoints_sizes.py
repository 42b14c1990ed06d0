"""Checkpoints of others are read without believing the sizes that they claim, and small ones keep nobody busy."""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Call, Id, torch_zip, with_ids
from hostile_files import LEGACY_HEAD, legacy, nested, refuse

from dmat_ray.formats import opcodes


def storage(count: int, key: str = "0") -> Id:
    return Id("storage", torch.FloatStorage, key, "cpu", count)


def tensor_of(*arguments: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, *arguments, False, OrderedDict())


def array_state(shape: tuple[int, ...], raw: Any = b"1234", dtype: Any = None) -> bytes:
    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            function, arguments, _ = np.zeros(1, np.float32).__reduce__()
            return function, arguments, (1, shape, dtype or np.dtype("f4"), False, raw)

    return pickle.dumps(Array(), 4)


def lying_zip(size: int) -> bytes:
    """A zip whose directory gives its first file another size than it has."""
    data = bytearray(torch_zip(with_ids({}), {}))
    directory = data.rindex(b"PK\x01\x02", 0, data.index(b"PK\x01\x02") + 4)
    data[directory + 20 : directory + 28] = struct.pack("<II", size, size)
    return bytes(data)


def twice() -> bytes:
    buffer = io.BytesIO(torch_zip(with_ids({}), {}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data.pkl", b"N.")
    return buffer.getvalue()


def nest(levels: int) -> bytes:
    return b"\x80\x02})" + b"\x85" * levels + b"Ns."


HUGE = 2**62
TOO_LARGE = "storage of 1099511627776"
SIZES: dict[str, tuple[bytes, str]] = {
    "bytes8": (b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"x.", "damaged or cut short"),
    "bytes4": (b"\x80\x03B" + struct.pack("<I", 2**31 - 1) + b"x.", "damaged or cut short"),
    "text8": (b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x.", "damaged or cut short"),
    "bytearray8": (b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"x.", "damaged or cut short"),
    "long4": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "damaged or cut short"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N.", "a frame of"),
    "place in the memo": (b"\x80\x02]r\xff\xff\xff\x7f.", "the number 2147483647"),
    "place in the memo as text": (b"\x80\x02]p99999999999\n.", "the number 99999999999"),
    "nesting": (nest(200_000), "nested deeper"),
    "copies of a dict": (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "is damaged"),
    "storage in a zip": (torch_zip(with_ids(tensor_of(storage(2**40), 0, (1,), (1,))), {"0": b"1234"}), TOO_LARGE),
    "storage that is not there": (torch_zip(with_ids(tensor_of(storage(1, "7"), 0, (1,), (1,))), {}), "not hold the tensors"),
    "storage in a stream": (legacy(with_ids(tensor_of(Id(*storage(2**40).pid, None), 0, (1,), (1,)))), TOO_LARGE),
    "storage in bytes": (nested(legacy(with_ids(Id(*storage(2**40).pid, None)))), TOO_LARGE),
    "negative storage": (torch_zip(with_ids(storage(-1)), {"0": b"1234"}), "no known type"),
    "tensor": (torch_zip(with_ids(tensor_of(storage(1), 0, (10**12,), (1,))), {"0": b"1234"}), "with only 1 numbers behind it"),
    "expanded tensor": (torch_zip(with_ids(tensor_of(storage(1), 0, (10**6, 10**6), (0, 0))), {"0": b"1234"}), "only 1 numbers"),
    "offset": (torch_zip(with_ids(tensor_of(storage(1), 10**9, (1,), (1,))), {"0": b"1234"}), "with only 1 numbers behind it"),
    "negative stride": (torch_zip(with_ids(tensor_of(storage(1), 0, (1,), (-1,))), {"0": b"1234"}), "impossible shape"),
    "array": (array_state((10**12,)), "with only 1 numbers behind it"),
    "array of text": (array_state((1,), dtype=np.dtype("U1")), "not plain numbers"),
    "array of a list": (array_state((1,), raw=[1.0]), "a NumPy array of objects"),
    "compressed zip": (torch_zip(b"N." + bytes(10_000_000), {}, zipfile.ZIP_DEFLATED), "compressed zip"),
    "zip that lies": (lying_zip(2**31), "larger than itself"),
    "zip with two pickles": (twice(), "two files of one name"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_held_against_the_file(tmp_path: Path, name: str) -> None:
    data, expected = SIZES[name]
    message = refuse(tmp_path, data)
    assert re.search(expected, message), message


TWICE = b")" + b"q\x00h\x00\x86" * 60  # a tuple of twice the tuple before it, 60 times
LISTS = b"]q\x00" + b"0](h\x00h\x00eq\x00" * 60
KEY = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"


def again(raw: bytes, times: int) -> bytes:
    """A pickle that has the same bytes read as a tensor again and again."""
    call = b"ctorch.storage\n_load_from_bytes\nq\x01"
    return b"\x80\x03B" + struct.pack("<I", len(raw)) + raw + b"q\x00" + call + b"(" + b"h\x01h\x00\x85R" * times + b"t."


def two_storages(keys: list[str]) -> bytes:
    """What torch.save wrote of old, with two tensors of storages "0" and "1"."""
    tensors = {key: tensor_of(Id("storage", torch.FloatStorage, key, "cpu", 1, None), 0, (1,), (1,)) for key in "01"}
    return LEGACY_HEAD + with_ids(tensors) + pickle.dumps(keys, 2) + (struct.pack("<q", 1) + b"abcd") * 2


TOO_MUCH = "longer or nested deeper"
EMPTY = with_ids(Id(*storage(0).pid, None))  # a storage without numbers, as its tree, its key and their count
ENDING = pickle.dumps(["0"], 2) + bytes(8)
BUSY: dict[str, tuple[bytes, str]] = {
    "tuples as a key": (b"\x80\x02}" + TWICE + b"Ns.", TOO_MUCH),
    "tuples copied": (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", TOO_MUCH),
    "tuples in a set": (b"\x80\x04\x8f(" + TWICE + b"\x90.", TOO_MUCH),
    "tuples through a function": (b"\x80\x02}ctorch._utils\n_rebuild_parameter\n" + TWICE + b"\x85RNs.", TOO_MUCH),
    "tuples as a storage": (torch_zip(b"\x80\x02(" + KEY + TWICE + b"X\x03\x00\x00\x00cpuK\x01tQ.", {}), TOO_MUCH),
    "tuples as a storage of a stream": (legacy(b"\x80\x02(" + KEY + TWICE + b"X\x03\x00\x00\x00cpuK\x01NtQ."), TOO_MUCH),
    "a large tuple as many keys": (b"\x80\x02}(" + b"N" * 1000 + b"tq\x000" + b"h\x00Ns" * 40_000 + b".", TOO_MUCH),
    "tuples as an id": (torch_zip(b"\x80\x02" + TWICE + b"Q.", {}), TOO_MUCH),
    "lists as an id": (torch_zip(b"\x80\x02" + LISTS + b"Q.", {}), "persistent object of kind a list"),
    "lists as a dtype": (b"\x80\x02cnumpy\ndtype\n" + LISTS + b"\x85R.", "array of dtype a list"),
    "long storage name": (torch_zip(with_ids(storage(1, "x" * 1000)), {}), "names a storage by x+"),
    "many small pickles": (again(LEGACY_HEAD + EMPTY + ENDING, 2000), TOO_MUCH),
    "many opcodes in one tensor": (again(LEGACY_HEAD + EMPTY[:2] + b"N0" * 10_000 + EMPTY[2:] + ENDING, 40), TOO_MUCH),
    "enormous number": (pickle.dumps(10**5000, 2), "a number of 16610 bits"),
    "enormous number in text": (b"\x80\x02L" + b"9" * 4000 + b"L\n.", "a number of 13288 bits"),
    "enormous shape": (torch_zip(with_ids(tensor_of(storage(0), 0, (0, 10**30), (1, 1))), {"0": b""}), "impossible shape"),
    "large shape": (torch_zip(with_ids(tensor_of(storage(0), 0, (0, 2**40, 2**40), (1,) * 3)), {"0": b""}), "impossible shape"),
    "enormous stride": (torch_zip(with_ids(tensor_of(storage(1), 0, (1,), (10**30,))), {"0": b"1234"}), "impossible shape"),
    "enormous offset": (torch_zip(with_ids(tensor_of(storage(0), 10**30, (0,), (1,))), {"0": b""}), "without numbers"),
    "enormous storage": (torch_zip(with_ids(storage(10**30)), {"0": b""}), "no known type"),
    "array without a state": (pickle.dumps(Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b")), "array without numbers"),
    "storage named twice": (two_storages(["0", "0"]), "not hold the tensors"),
    "storage of another name": (two_storages(["0", "2"]), "not hold the tensors"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BUSY)
def test_small_files_do_not_keep_us_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name.startswith("many"):
        monkeypatch.setattr(opcodes, "MAX_OPCODES", 50_000)  # a million takes seconds
    data, expected = BUSY[name]
    message = refuse(tmp_path, data)
    assert re.search(expected, message), message
