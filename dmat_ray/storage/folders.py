"""Folders whose files belong together (models, generators, encoders, checkpoints), on this machine or in an object store.

What says that such a folder is whole is JSON (run.json, card.json, ...). In an object store nothing can be renamed: its JSON is
removed first and written last, so that a folder which is half written has none.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from dmat_ray.errors import UserError, first_line
from dmat_ray.storage import Place, at
from dmat_ray.storage.files import is_full, make_lasting, sync, text_digest
from dmat_ray.storage.location import Location

KEPT_S = 3600.0  # a copy that nobody has asked for so long goes when another is made


def fetched(place: Place) -> Path:
    """The path of a file, or of a folder's files: their own, or in an object store that of a copy, which is not to be changed.

    A version is downloaded once a machine, into its temporary folder, for all processes. Of an object store it raises
    FileNotFoundError if nothing is there, and else like `Location.read_bytes`.
    """
    place = at(place)
    if place.local is not None:
        return place.local
    while True:
        files = {f"{place.name}/{file.name}": file for file in place.files()} or {place.name: place}
        versions = {path: file.version() for path, file in files.items()}
        copy = _copies() / text_digest(f"{place} {versions}")[:32]
        if _holds(copy, versions):
            return copy / place.name
        with _alone(copy.parent):
            if _holds(copy, versions) or _download(files, versions, copy):
                return copy / place.name


def _copies() -> Path:
    """This machine's folder of copies, which nobody else may write to."""
    folder = Path(tempfile.gettempdir()) / f"dmat_ray_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"'{folder}' is not a folder of this user alone; remove it, or set TMPDIR")
    return folder


def _holds(copy: Path, versions: dict[str, str]) -> bool:
    """Whether all is there, which is asked for now; what cleans temporary folders may have taken a part."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(copy)  # first: nobody sweeps it from now on
        return all((copy / path).stat().st_size == int(version.split()[0]) for path, version in versions.items())
    return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, this is the only process of the machine that makes copies: workers that start together want the same."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(files: dict[str, Location], versions: dict[str, str], copy: Path) -> bool:
    """Make a copy; False if meanwhile they were replaced, so that it might be half of the one and half of the other."""
    for other in copy.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if other.is_dir() and time.time() - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
    shutil.rmtree(copy, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(dir=copy.parent))
    try:
        for path, file in files.items():
            (fresh / path).parent.mkdir(exist_ok=True)
            file.download(fresh / path)
        if {path: file.version() for path, file in files.items()} != versions:
            return False
        fresh.rename(copy)
        return True
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def fetched_input(place: Place, what: str) -> Path:
    """`fetched`, of a file or folder that a user has named; raises UserError if it is not there."""
    try:
        path = fetched(place)
    except FileNotFoundError:
        path = None
    if path is None or not path.exists():
        raise UserError(f"there is no {what} '{place}'")
    return path


def holds_anything(folder: Place) -> bool:
    """Whether anything is in a folder; an object store may keep the name of one that is empty."""
    place = at(folder)
    if place.local is None:
        return bool(place.files())
    return place.local.is_dir() and any(place.local.iterdir())


def copy_files(folder: Path, fresh: Path) -> None:
    """Copy the files of a folder that has no others in it to a new one; nothing of it stays where that fails.

    shutil.copytree goes on after a disk is full, and its error does not say that it was.
    """
    fresh.mkdir(parents=True)
    try:
        for file in sorted(folder.iterdir()):
            shutil.copy2(file, fresh / file.name)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def put(folder: Path, place: Place) -> None:
    """Copy a folder of this machine to a place where there is none: readers see it whole, or not as one that is whole."""
    place = at(place)
    if place.local is None:
        for file in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
            (place / file.name).write_bytes(pa.memory_map(str(file)).read_buffer())
        return
    partial = place.local.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_files(folder, partial)
    make_lasting(partial)
    partial.rename(place.local)
    sync(place.local.parent)


def replace_folder(place: Place, write: Callable[[Path], None]) -> None:
    """Let `write` make a fresh folder, then put that in the place of an older one, of which no file stays.

    Raises UserError if there is no space for it; the older one is then as it was.
    """
    place = at(place)
    try:
        if place.local is not None:
            _replace_here(place.local, write)
        else:
            _replace_there(place, write)
    except Exception as error:
        if not is_full(error):
            raise
        said = first_line(error)
        raise UserError(
            f"'{place}' cannot be written ({said}): is the disk full? Free space and run the same command again"
        ) from error


def _replace_there(place: Location, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="dmat_ray_") as temporary:
        fresh = Path(temporary) / place.name
        write(fresh)
        for old in sorted(place.files(), key=lambda file: not file.name.endswith(".json")):
            old.unlink()
        put(fresh, place)


def _replace_here(folder: Path, write: Callable[[Path], None]) -> None:
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    # one that was killed on its way has left these
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        write(partial)
        make_lasting(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def remove_folder(place: Place) -> None:
    """Remove a folder of which nobody is to find a part, if it is there, as far as that is possible.

    On this machine it has another name first, and what a kill leaves of it is for `sweep_removed`.
    """
    place = at(place)
    if place.local is None:
        place.remove()
        return
    hidden = _removed(place.local)
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not there, or the folder above is not ours
        place.local.rename(hidden)
    for left in (hidden, place.local):
        shutil.rmtree(left, ignore_errors=True)


def sweep_removed(parent: Place, name: str = "*") -> None:
    """Remove what kills have left of folders of this name (a pattern) below `parent` that were being removed."""
    above = at(parent).local
    for left in [] if above is None else above.glob(_removed(above / name).name):
        shutil.rmtree(left, ignore_errors=True)


def _removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")
