"""Digests, and JSON files of this machine that are written whole or not at all."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from dmat_ray.errors import StorageError, UserError

T = TypeVar("T")
VISIBLE_S = 90.0  # a shared disk may be that late in showing a new file to another machine


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


def awaited(look: Callable[[], T | None], seconds: float | None = None) -> T | None:
    """What `look` finds, asked for every second for as long as a shared disk may take to show a file of another machine's."""
    end = time.monotonic() + (VISIBLE_S if seconds is None else seconds)
    while (found := look()) is None and time.monotonic() < end:
        time.sleep(1.0)
    return found


def tried_again(do: Callable[[], T], pauses_s: Sequence[float], say: Callable[[str], None]) -> T:
    """What `do` gives, which is done again after each pause that a StorageError leaves, and then raises it."""
    for pause in pauses_s:
        try:
            return do()
        except StorageError as error:  # hours of work should not end because a store is away for a minute
            say(f"warning: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return do()


def make_lasting(folder: Path) -> None:
    """Have the disk hold all files of a folder before it takes another's place: a name must not outlive its content when the
    machine goes down.
    """
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems do not sync folders
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def as_json(value: Any) -> str:
    """A value as our files have it."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def parse_json(content: str | bytes, name: object) -> Any:
    """What `as_json` wrote; raises UserError for the content of a damaged file, which `name` is the name of."""
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"'{name}' is damaged: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"'{name}' is damaged: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """JSON written whole or not at all, also when the machine goes down."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(as_json(value))
    sync(partial)
    partial.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises UserError for a damaged file."""
    return parse_json(path.read_bytes(), path)
