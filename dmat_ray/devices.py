"""The device that computes: which there is, how it rounds float32, and what torch.compile needs there."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dmat_ray.errors import UserError


def device_of(given: torch.device | str) -> torch.device:
    """The device of this name. Raises UserError for one that torch does not know, or that this machine does not have."""
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"device is {given!r}, which torch does not know; give 'cpu', 'cuda' or 'cuda:0'") from None
    kind = getattr(torch, device.type, None)  # torch.cuda, say; nothing is asked of the device itself, which may be busy
    if not getattr(kind, "is_available", lambda: True)():
        raise UserError(f"device is '{device}', and torch finds no such device here; give 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device is '{device}', and the GPUs here are cuda:0 to cuda:{count - 1}; give one of these")
    return device


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, products and convolutions of float32 may be rounded to TF32 on GPUs, or may not; afterwards what was before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed  # PyTorch's own default is to allow it
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def require_compiler(device: torch.device, setting: str) -> None:
    """Raise UserError if this machine has none of those that torch looks for: what `setting` asks for would fail on `device`.

    On a GPU Triton builds its launchers with a C compiler; on a CPU torch's inductor writes C++.
    """
    on_gpu, cxx = device.type == "cuda", "clang++" if sys.platform == "darwin" else "g++"
    language, variable, packages = ("C", "CC", "gcc and libc6-dev") if on_gpu else ("C++", "CXX", cxx)
    named = os.environ.get(variable)
    names = [named] if named is not None else ["gcc", "clang"] if on_gpu else [cxx]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{setting} needs a {language} compiler, and {platform.node()} has no {' or '.join(names)}; install {packages} there "
            f"(or name another compiler by {variable}), or set {setting} false"
        )
