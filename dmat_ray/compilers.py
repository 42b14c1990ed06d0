"""The compilers that torch.compile calls, of which torch brings none."""

import os
import platform
import shutil
import sys

import torch

from dmat_ray.errors import UserError


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
