"""Random numbers that belong to an example, not to a batch.

Every draw derives from (seed, example id, purpose), so that a result does not depend on how many workers there are,
how the batch was cut or where a run was resumed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *parts: object) -> int:
    """A 63-bit seed from a seed and any printable parts."""
    text = "\x1f".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def kept_apart(device: torch.device | str = "cpu") -> Iterator[None]:
    """Leave torch's global random numbers, of the CPU and of this device, as they were: they are the caller's."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


class Draws:
    """One stream of random numbers per example, each from (seed, id, purpose)."""

    def __init__(self, seed: int, ids: Sequence[str], purpose: str) -> None:
        self._streams = [np.random.Generator(np.random.Philox(derive(seed, purpose, i))) for i in ids]

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """(B, *shape), uniform in [0, 1), with the dtype and device of `like`."""
        rows = [stream.random(shape, dtype=np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(rows)).to(like)

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """(B, *shape), standard normal, with the dtype and device of `like`."""
        rows = [stream.standard_normal(shape, dtype=np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(rows)).to(like)
