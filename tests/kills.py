"""Kills of a process at a moment of its work, within this one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class KilledError(BaseException):
    """Nothing is tidied up after it."""


@contextmanager
def killed_when_removed(count: int, *names: str) -> Iterator[None]:
    """Inside, the process is killed when it has removed `count` files of these names, and is about to remove another."""
    unlink, gone = os.unlink, []

    def remove(name: Any, **how: Any) -> None:
        if Path(name).name in names:
            if len(gone) == count:
                raise KilledError
            gone.append(name)
        unlink(name, **how)

    with pytest.MonkeyPatch.context() as here:
        here.setattr(os, "unlink", remove)
        try:
            yield
        except KilledError:
            return
    pytest.fail(f"{len(gone)} such files were removed, and no more")
