"""TorchScript that would fill the memory, or end the process, while torch loads it."""

import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from exported_decoders import CPU, Decoder, edited, made_fixture  # noqa: F401  (fixtures)

from dmat_ray.errors import UserError
from dmat_ray.formats.programs import load_program
from dmat_ray.formats.sources import check_source
from dmat_ray.formats.stored import RefusedError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


def repacked(path: Path, target: Path, compression: int, **more: bytes) -> Path:
    """A copy of an archive with some of its records replaced by compressed ones."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name.partition("/")[2] not in more:
                new.writestr(name, old.read(name))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content, compression)
    return target


@pytest.mark.parametrize(
    ("record", "compression", "message"),
    [
        ("constants.pkl", zipfile.ZIP_DEFLATED, "is a compressed zip"),
        ("data.pkl", zipfile.ZIP_BZIP2, "is a compressed zip"),
        ("code/__torch__/more.py", zipfile.ZIP_DEFLATED, "more than 16 MiB of code"),
        ("code/__torch__/more.py", zipfile.ZIP_BZIP2, "packed in a way that torch does not know"),
    ],
)
def test_bombs_are_not_unpacked(made: Any, tmp_path: Path, record: str, compression: int, message: str) -> None:
    path = repacked(made(Decoder, "script"), tmp_path / "bomb.pt", compression, **{record: bytes(30_000_000)})
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        load_program(path, "torchscript", CPU)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_record_that_is_longer_than_it_says_is_not_unpacked(made: Any, tmp_path: Path) -> None:
    record, content = "code/__torch__/more.py", bytes(30_000_000)
    path = repacked(made(Decoder, "script"), tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, **{record: content})
    length = struct.pack("<I", len(content))
    path.write_bytes(path.read_bytes().replace(length, struct.pack("<I", 1000)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is damaged .*Bad CRC-32"):
        load_program(path, "torchscript", CPU)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


MANY = 200_000
DEEP_CODE = {
    "brackets": "(" * MANY + "w" + ")" * MANY,
    "brackets after a string": "f('\"', " * MANY + "w" + ")" * MANY,
    "brackets after a comment": "w # '\n" + "    return " + "(" * MANY + "w" + ")" * MANY + " # '",
    "sum": "+".join(["w"] * MANY),
    "signs": "-" * MANY + "w",
    "choices": "w if True else " * MANY + "w",
    "indices": "w" + "[0]" * MANY,
    "calls": "w" + "()" * MANY,
    "indentation": "\n" + "".join(" " * i + "if True:\n" for i in range(4, 500)),
    "elif": "\n    if True:\n      pass\n" + "    elif True:\n      pass\n" * 30_000,
    "a long string": '"""' + "(" * 10 + '"""',
}


@pytest.mark.parametrize("what", DEEP_CODE)
def test_code_that_would_end_the_process_is_refused(made: Any, tmp_path: Path, what: str) -> None:
    left = [1]  # a process that has scripted much before makes files of code that are copies of each other

    def edit(name: str, content: bytes) -> bytes:
        if not left or not name.endswith(".py") or b"    return " not in content:
            return content
        left.clear()
        return content.replace(b"    return ", f"    return {DEEP_CODE[what]}\n    return ".encode(), 1)

    path = edited(made(Decoder, "script"), tmp_path / "deep.pt", edit)
    with pytest.raises(UserError, match=r"holds (code that is nested deeper|elif|\"\"\").*code/.*\.py") as caught:
        load_program(path, "torchscript", CPU)
    assert "\n" not in str(caught.value)


def test_code_with_long_strings_and_lists_is_not_deep() -> None:
    check_source(b'x = ["((((", ' + b"'[\\'', -1.5, w + 2 * (w - 1), " * 100_000 + b"w]\n")
    check_source(b"y = torch.add(w, w)\n" * 50_000)
    with pytest.raises(RefusedError):
        check_source(b"(" * 201)


GROWING = b"\x80\x02" + b"".join(b"]q" + bytes([i]) for i in range(100)) + b"0" * 99  # 100 empty lists
DEEP_PICKLES = {
    "tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "lists": b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b".",
    "lists from the outside": GROWING + b"h\x00h\x01a0h\x01h\x02a.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "shared tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
    "shared lists": b"\x80\x02]q\x00" + b"0](h\x00h\x00eq\x00" * 60 + b".",
    "a second pickle": b"\x80\x02N." + b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "no pickle": b"\xff" * 100,
}


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize("what", DEEP_PICKLES)
def test_pickles_that_would_end_the_process_are_refused(made: Any, tmp_path: Path, what: str, record: str) -> None:
    path = repacked(made(Decoder, "script"), tmp_path / "deep.pt", zipfile.ZIP_STORED, **{record: DEEP_PICKLES[what]})
    with pytest.raises(UserError, match=r"holds|is longer or nested|cannot load") as caught:
        load_program(path, "torchscript", CPU)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
