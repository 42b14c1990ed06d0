"""Foreign checkpoints are read without running them, without believing their sizes, and all errors are one line."""

import argparse
import builtins
import contextlib
import io
import os
import pickle
import re
import struct
import subprocess
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    Call,
    EasyDict,
    Id,
    Persistent,
    nvlabs_pickle,
    odd_directory,
    torch_saved,
    torch_zip,
    with_ids,
    write,
)

from dmat_ray.errors import UserError
from dmat_ray.manifold.formats import archives, checkpoints, opcodes
from dmat_ray.manifold.formats.stored import Module, RefusedError, Storage, Stored, shown

FLOATS = torch.arange(6.0)
LEGACY_HEAD = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that every attack here would write if anything of it ran."""
    return tmp_path / "executed"


def refuse(folder: Path, data: bytes) -> str:
    """The error that these bytes end in, after checking that it came fast, in one line and without an allocation."""
    path = write(folder, data)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        checkpoints.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * len(data) + 10_000_000
    assert time.perf_counter() - began < 60  # minutes without the limit; other tests run beside this one
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert message.startswith("checkpoint '")
    return message


# ---- what is read ---------------------------------------------------------------------------------------------------

TENSORS = {
    "floats": FLOATS.reshape(2, 3),
    "transposed": FLOATS.reshape(2, 3).T,
    "part": FLOATS[2:5],
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "half": FLOATS.half(),
    "bfloat": FLOATS.bfloat16(),
    "double": FLOATS.double(),
    "long": torch.tensor([1, -(2**40)]),
    "bool": torch.tensor([True, False]),
    "number": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def check_tensors(found: dict[str, Any]) -> None:
    for name, expected in TENSORS.items():
        assert found[name].shape == tuple(expected.shape)
        assert torch.equal(found[name].read(), expected), name
        assert found[name].read().dtype == expected.dtype


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_as_torch_saves_them(tmp_path: Path, zipped: bool) -> None:
    tree = {
        "deep": OrderedDict(TENSORS),
        "parameter": torch.nn.Parameter(FLOATS),
        "args": argparse.Namespace(size=256, path="x"),
        "step": 7,
        "number": np.float64(0.25),
    }
    found = checkpoints.read(write(tmp_path, torch_saved(tree, zipped=zipped))).tree
    check_tensors(found["deep"])
    assert torch.equal(found["parameter"].read(), FLOATS)
    assert (found["step"], found["number"]) == (7, 0.25)
    assert found["args"] == {}, "an argparse.Namespace is a plain dict, and its values are not wanted"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_tensors_and_arrays_inside_of_a_pickle(tmp_path: Path, protocol: int) -> None:
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))}
    tree = {"tensors": TENSORS, "arrays": arrays, "easy": EasyDict(a=1), "scalar": np.float32(1.5), "set": {1, 2}}
    found = checkpoints.read(write(tmp_path, nvlabs_pickle(tree, protocol))).tree
    check_tensors(found["tensors"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(found["arrays"][name].read().numpy(), array)
    assert (found["easy"], found["scalar"]) == ({"a": 1}, 1.5)


def test_the_source_in_an_nvlabs_pickle_is_dropped_not_run(tmp_path: Path, marker: Path) -> None:
    network = Persistent("Generator", f"open({str(marker)!r}, 'w')", weight=FLOATS)
    found = checkpoints.read(write(tmp_path, nvlabs_pickle({"G_ema": network}))).tree["G_ema"]
    assert isinstance(found, Module)
    assert found.class_name == "Generator"
    assert torch.equal(found.state["weight"].read(), FLOATS)
    assert "open(" not in repr(found)
    assert not marker.exists()


def test_tensors_are_read_only_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, torch_saved({"a": torch.zeros(4_000_000), "b": FLOATS}))
    tracemalloc.start()
    found = checkpoints.read(path).tree
    assert torch.equal(found["b"].read(), FLOATS)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()


def test_damaged_numbers_in_a_zip_are_noticed(tmp_path: Path) -> None:
    data = torch_saved({"a": FLOATS}).replace(FLOATS.numpy().tobytes(), (FLOATS + 1).numpy().tobytes())
    found = checkpoints.read(write(tmp_path, data)).tree["a"]
    with pytest.raises(UserError, match="is damaged: Bad CRC"):
        found.read()


# ---- what would run something ---------------------------------------------------------------------------------------


def legacy(body: bytes) -> bytes:
    return LEGACY_HEAD + body + pickle.dumps([], 2)


def nested(raw: bytes) -> bytes:
    return nvlabs_pickle(Call(torch.storage._load_from_bytes, raw))


ATTACKS: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "pickle": (lambda evil: pickle.dumps({"G_ema": evil}), "asks for posix.system"),
    "torch zip": (lambda evil: torch_saved({"g_ema": evil}), "asks for posix.system"),
    "torch stream": (lambda evil: torch_saved({"g_ema": evil}, zipped=False), "asks for posix.system"),
    "state of a network": (lambda evil: nvlabs_pickle(Persistent("G", "", weight=evil)), "asks for posix.system"),
    "bytes of a tensor": (lambda evil: nested(pickle.dumps(evil)), "bytes that torch.save did not write"),
    "stream of a tensor": (lambda evil: nested(legacy(pickle.dumps(evil, 2))), "asks for posix.system"),
    "nested twice": (lambda evil: nested(legacy(nested(legacy(pickle.dumps(evil, 2))))), "asks for posix.system"),
    "not a storage": (lambda evil: nested(legacy(pickle.dumps({}, 2))), "something other than numbers"),
    "array of objects": (lambda evil: pickle.dumps(np.array([evil], dtype=object)), "dtype O8, which is not plain numbers"),
    "dict's items": (lambda evil: pickle.dumps(OrderedDict(a=evil)), "asks for posix.system"),
    "eval": (lambda evil: pickle.dumps(Call(eval, "1 + 1")), "asks for builtins.eval"),
    "getattr": (lambda evil: pickle.dumps(Call(getattr, Call(builtins.__import__, "os"), "system")), "builtins.getattr"),
    "subprocess": (lambda evil: pickle.dumps(Call(subprocess.Popen, "true")), "asks for subprocess.Popen"),
    "a path of names": (lambda evil: b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
    "persistent id": (lambda evil: with_ids(Id("module", evil)), "asks for posix.system"),
    "kind of persistent id": (lambda evil: with_ids(Id("module", "os")), "persistent object of kind module"),
    "module in a zip": (lambda evil: torch_zip(with_ids(Id("module", 1, 2, 3, 4)), {}), "persistent object of kind module"),
    "inst": (lambda evil: b"\x80\x02(S'true'\nios\nsystem\n.", "asks for os.system"),
    "inst without a header": (lambda evil: b"(S'true'\nios\nsystem\n.", "is no checkpoint of a known format"),
    "obj": (lambda evil: b"\x80\x02(cos\nsystem\nS'true'\no.", "asks for os.system"),
    "newobj": (lambda evil: b"\x80\x02csubprocess\nPopen\nX\x04\x00\x00\x00true\x85\x81.", "asks for subprocess.Popen"),
    "extension": (lambda evil: b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "out-of-band buffer": (lambda evil: b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
    "attributes of a function": (lambda evil: b"\x80\x02ctorch._utils\n_rebuild_parameter\n}b.", "changes a function"),
    "attributes of a class": (lambda evil: b"\x80\x02ccollections\nOrderedDict\n}b.", "is damaged"),
    "state of a tensor": (
        lambda evil: nvlabs_pickle({"a": FLOATS})[:-2] + b"\x94}b" + b"s.",
        "changes a tensor",
    ),
    "control characters": (lambda evil: b"\x80\x04\x8c\x05\x1b[2J\n\x8c\x01x\x93.", r"asks for \?\[2J\?.x"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_file_is_run(tmp_path: Path, marker: Path, name: str) -> None:
    make, expected = ATTACKS[name]
    message = refuse(tmp_path, make(Call(os.system, f"touch {marker}")))
    assert not marker.exists()
    assert re.search(expected, message), message


def test_the_attack_of_these_tests_works_on_pickle_itself(marker: Path) -> None:
    pickle.loads(pickle.dumps(Call(os.system, f"touch {marker}")))
    assert marker.exists()


# ---- sizes that are not there ---------------------------------------------------------------------------------------


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


# ---- small files that would keep a reader busy ----------------------------------------------------------------------

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


def test_a_tensor_without_numbers_is_never_zeros() -> None:
    with pytest.raises(RefusedError, match="does not hold the tensors"):
        Stored().place(Storage(torch.float32, 2), 0, (2,), (1,)).read()


@pytest.mark.slow
def test_what_others_write_is_far_from_those_bounds(tmp_path: Path) -> None:
    """Shared lists, a numpy state of a random generator, and as many tensors as a training run's file has."""
    options = [0.9, 0.99]
    tree = {
        "state": {i: {"step": torch.tensor(1.0), "betas": options, "shape": (3, (4, 5))} for i in range(1000)},
        "rng": np.random.default_rng(0).bit_generator.state,
        "a list in itself": options,
    }
    options.append(options)  # type: ignore[arg-type]
    for zipped in (True, False):
        assert len(checkpoints.read(write(tmp_path, torch_saved(tree, zipped=zipped))).tree["state"]) == 1000


def test_each_tensor_reads_only_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = torch.arange(500_000.0)
    path = write(tmp_path, torch_saved({str(i): pool[i : i + 10] for i in range(100)}))
    summed: list[int] = []
    crc32 = zlib.crc32
    monkeypatch.setattr(archives.zlib, "crc32", lambda data, start: summed.append(len(data)) or crc32(data, start))
    found = checkpoints.read(path).tree
    tracemalloc.start()
    for i in range(100):
        assert torch.equal(found[str(i)].read(), pool[i : i + 10])
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert sum(summed) < 2_100_000, "the checksum of a storage is looked at once"


GOOD = {
    "zip": torch_saved(TENSORS),
    "stream": torch_saved(TENSORS, zipped=False),
    "nvlabs": nvlabs_pickle({"G_ema": Persistent("G", "", **TENSORS)}),
}


@pytest.mark.parametrize("kind", GOOD)
def test_files_that_are_cut_short(tmp_path: Path, kind: str) -> None:
    data = GOOD[kind]
    checkpoints.read(write(tmp_path, data))
    for length in [0, 1, 3, 20, *range(50, len(data) - 1, max(1, len(data) // 40)), len(data) - 1]:
        refuse(tmp_path, data[:length])


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_no_damaged_byte_ends_in_anything_but_a_user_error(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(GOOD[kind]), 150):
        data = bytearray(GOOD[kind])
        data[position] ^= 1 << rng.integers(0, 8)
        with contextlib.suppress(UserError):  # a bit of a number or of a name may well differ unnoticed
            tree = checkpoints.read(write(tmp_path, bytes(data))).tree
            [value.read() for value in getattr(tree, "values", list)() if isinstance(value, Stored)]


# ---- what is no checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no checkpoint of a known format"),
        (b"hello", "no checkpoint of a known format"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (struct.pack("<Q", 2) + b"{}", "safetensors file; give the folder"),
        (torch_zip(b"N.", {}).replace(b"data.pkl", b"data.txt"), "a zip that torch.save did not write"),
        (odd_directory(torch_saved({}), 6, b"\xff"), "is damaged"),
        (odd_directory(torch_saved({}), 46, b"\xff"), "is damaged"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, expected: str) -> None:
    assert expected in refuse(tmp_path, data)


def test_a_script_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    assert "is a TorchScript program" in refuse(tmp_path, buffer.getvalue())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoints.read(tmp_path / "no.pth")


def test_foreign_text_is_printed_safely() -> None:
    assert shown("a\n\x1b[31mb") == "a??[31mb"
    assert len(shown("x" * 1000)) == 80
    assert [shown(v) for v in (3, 0.5, None, True, torch.half)] == ["3", "0.5", "None", "True", "torch.float16"]
    assert [shown(v) for v in ((1, 2), (1,), [1, 2], 10**5000)] == ["(1, 2)", "(1,)", "[1, 2]", "a number of 16610 bits"]
    assert [shown(v) for v in ([[1]], {1: 2}, (0,) * 9, Stored())] == ["a list", "a dict", "a tuple", "a Stored"]
