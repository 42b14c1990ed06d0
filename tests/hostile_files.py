"""Parts of checkpoints, and the one-line error that those which no honest program writes must end in."""

import pickle
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from foreign_files import Call, nvlabs_pickle, write

from dmat_ray.errors import UserError
from dmat_ray.formats import checkpoints

FLOATS = torch.arange(6.0)
LEGACY_HEAD = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


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


def legacy(body: bytes) -> bytes:
    return LEGACY_HEAD + body + pickle.dumps([], 2)


def nested(raw: bytes) -> bytes:
    return nvlabs_pickle(Call(torch.storage._load_from_bytes, raw))
