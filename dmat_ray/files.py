"""Digests, and JSON files of this machine that are written whole or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dmat_ray.errors import UserError


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Hex sha256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no space for a file, in the system's words or in safetensors' or torch's."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    torchs = isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error))
    return torchs or isinstance(error, SafetensorError)


def write_json(path: Path, value: Any) -> None:
    """JSON written whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises UserError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"'{path}' is damaged: {error}") from None
