"""Checkpoints of others are read as their tensors, each when it is asked for, and other files are named."""

import argparse
import contextlib
import io
import struct
import tracemalloc
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import EasyDict, Persistent, nvlabs_pickle, odd_directory, torch_saved, torch_zip, write
from hostile_files import FLOATS, refuse

from dmat_ray.errors import UserError
from dmat_ray.formats import archives, checkpoints
from dmat_ray.formats.stored import RefusedError, Storage, Stored, shown

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
