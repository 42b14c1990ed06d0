"""Checkpoints of others are read without running anything that is in them."""

import builtins
import os
import pickle
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Call, Id, Persistent, nvlabs_pickle, torch_saved, torch_zip, with_ids, write
from hostile_files import FLOATS, legacy, nested, refuse

from dmat_ray.formats import checkpoints
from dmat_ray.formats.stored import Module


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that every attack here would write if anything of it ran."""
    return tmp_path / "executed"


def test_the_source_in_an_nvlabs_pickle_is_dropped_not_run(tmp_path: Path, marker: Path) -> None:
    network = Persistent("Generator", f"open({str(marker)!r}, 'w')", weight=FLOATS)
    found = checkpoints.read(write(tmp_path, nvlabs_pickle({"G_ema": network}))).tree["G_ema"]
    assert isinstance(found, Module)
    assert found.class_name == "Generator"
    assert torch.equal(found.state["weight"].read(), FLOATS)
    assert "open(" not in repr(found)
    assert not marker.exists()


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
