"""The device that computes: which there is, how it rounds float32, and what torch.compile needs there."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def _newer_settings() -> list[tuple[Any, Any]]:
    """What holds torch's newer settings of how float32 is rounded, each with what it follows while it says nothing itself.

    They are of a backend, or of one of its operations; the older two are of products, and of convolutions. Setting an older one
    sets newer ones, too, and reading it raises where these say something else.
    """
    every: Any = torch.backends
    on_gpus = every.cudnn.conv, every.cudnn.rnn, every.cuda.matmul
    on_cpus = every.mkldnn.conv, every.mkldnn.rnn, every.mkldnn.matmul
    return [(every.cudnn, every), *((one, every.cudnn) for one in on_gpus), *((one, every.mkldnn) for one in on_cpus)]


def _all_float32() -> None:
    for one, _ in _newer_settings():
        one.fp32_precision = "ieee"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, products and convolutions of float32 may be rounded to TF32 on GPUs, or may not; afterwards what was before."""
    newer = [(one, one.fp32_precision, other.fp32_precision) for one, other in _newer_settings()]
    _all_float32()
    products = torch.get_float32_matmul_precision()
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it is not what "ieee" says
        convolutions = True
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed  # PyTorch's own default is to allow it
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
        for one, own, followed in newer:
            one.fp32_precision = "none" if own == followed else own  # what says the same is taken to follow


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
