"""What the disk is asked to hold, and what is given its name, in order."""

import os
from pathlib import Path

import pytest


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """From now on ("synced", name) of every file or folder, and ("renamed", name) of what a path becomes."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(("renamed", Path(target).name))
        return rename(path, target)

    def replaced(path: Path, target: Path) -> Path:
        events.append(("renamed", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return events
