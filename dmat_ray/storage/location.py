"""A file or folder, on this machine or in an object store, by one small interface.

pyarrow's file systems do the work. What is written here appears whole or not at all.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow as pa
from pyarrow import fs

from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import object_store
from dmat_ray.storage.files import as_json, parse_json

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
CHUNK = 16 << 20  # bytes that a download asks for at a time


def _identity(path: str) -> tuple[int, int]:
    """What a folder is, by whatever links it is come to."""
    told = os.stat(path)
    return told.st_dev, told.st_ino


@dataclass(frozen=True)
class Location:
    """A file or folder. `key` is its path, for an object store with the bucket in front; `scheme` is '' on this machine."""

    scheme: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}" if self.scheme else self.key

    def __fspath__(self) -> str:
        """The path, for what opens files of this machine: pathlib.Path(place). Raises UserError for one of an object store."""
        if self.scheme:
            raise UserError(f"'{self}' is in an object store and has no path on this machine; str() gives its URL")
        return self.key

    def __truediv__(self, name: str) -> "Location":
        if self.scheme:  # a key is any text
            return Location(self.scheme, f"{self.key}/{name}" if name else self.key)
        return Location("", str(Path(self.key) / name))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Location":
        """The folder that this lies in; of a bucket the bucket itself."""
        return self if self.scheme and "/" not in self.key else Location(self.scheme, str(PurePosixPath(self.key).parent))

    @property
    def local(self) -> Path | None:
        """The path, if this is on this machine."""
        return None if self.scheme else Path(self.key)

    def is_file(self) -> bool:
        """True if there is a file of this name. Raises UserError or OSError if that cannot be found out."""
        return bool(self._type() == fs.FileType.File)

    def is_dir(self) -> bool:
        """True if there is a folder of this name; in an object store, if any name begins with it. Raises like `is_file`."""
        return bool(self._type() == fs.FileType.Directory)

    def _type(self) -> Any:
        if self.scheme:
            with self._explained("looked at"):
                return self.filesystem.get_file_info(self.key).type
        # pyarrow knows no names that are not UTF-8, and pathlib takes what it may not look at for absent
        try:
            mode = os.stat(self.key).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return fs.FileType.NotFound
        if stat.S_ISDIR(mode):
            return fs.FileType.Directory
        return fs.FileType.File if stat.S_ISREG(mode) else fs.FileType.Unknown

    def files(self) -> "list[Location]":
        """The files that lie directly in this folder, sorted by name, hidden ones left out; none if it does not exist."""
        return self._children(folders=False)

    def folders(self) -> "list[Location]":
        """Likewise the folders that lie directly in this one."""
        return self._children(folders=True)

    def _children(self, *, folders: bool) -> "list[Location]":
        if self.scheme:
            kind = fs.FileType.Directory if folders else fs.FileType.File
            found = [info.path.rstrip("/") for info in self._infos(recursive=False) if info.type == kind]
            places = [Location(self.scheme, path) for path in sorted(found)]
            return [place for place in places if not place.name.startswith(".")]
        try:
            with os.scandir(self.key) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
                names = sorted(entry.name for entry in shown if (entry.is_dir() if folders else entry.is_file()))
        except FileNotFoundError:
            return []
        return [self / name for name in names]

    def sweep(self) -> None:
        """Remove from this folder what writers that were killed have left of their work; nobody may be writing here.

        An object store shows nothing of it, but may keep it: parts of large objects, which a rule of the bucket can expire.
        """
        if self.local is not None and self.local.is_dir():
            for path in self.local.iterdir():
                if PARTIAL.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def tree(self) -> tuple[list[str], list[str]]:
        """All files and all folders below this folder, as '/'-separated paths relative to it, in no order.

        What is hidden (a name that begins with a dot) is left out with all that is in it, and so are links back to a folder that
        they lie in. Names that are not UTF-8 come as `os.fsdecode` makes them. An object store is listed once, not folder by
        folder. Nothing if the folder does not exist; raises OSError or UserError for what may not be listed.
        """
        if not self.scheme:
            return self._walk()
        skip = len(self.key) + 1
        found: tuple[list[str], list[str]] = [], []
        for info in self._infos(recursive=True):
            path = info.path[skip:].rstrip("/")
            if not path.startswith(".") and "/." not in path:
                found[info.type != fs.FileType.File].append(path)
        return found

    def _walk(self) -> tuple[list[str], list[str]]:
        files: list[str] = []
        folders: list[str] = []
        todo: list[tuple[str, tuple[tuple[int, int], ...]]] = []  # with the folders that each lies in
        if self.is_dir():
            todo.append(("", (_identity(self.key),)))
        while todo:
            prefix, above = todo.pop()
            with os.scandir(os.path.join(self.key, prefix)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        if (this := _identity(entry.path)) not in above:
                            folders.append(prefix + entry.name)
                            todo.append((f"{prefix}{entry.name}/", (*above, this)))
                    elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                        # a link to nothing is a file that cannot be read, and is told so
                        files.append(prefix + entry.name)
        return files, folders

    def versions(self) -> dict[str, str]:
        """Size and time of last change of all files of an object store below this name (or of this file), by key."""
        if self.is_file():
            infos = [self.filesystem.get_file_info(self.key)]
        else:
            infos = [info for info in self._infos(recursive=True) if info.type == fs.FileType.File]
        return {info.path: f"{info.size} {info.mtime_ns}" for info in infos}

    def _infos(self, *, recursive: bool) -> list[Any]:
        with self._explained("listed"):
            return list(self.filesystem.get_file_info(fs.FileSelector(self.key, allow_not_found=True, recursive=recursive)))

    def open(self) -> Any:
        """A seekable pyarrow file for reading, of which only what is asked for is fetched. Raises like `read_bytes`."""
        if self.scheme:
            with self._explained("read"):
                return self.filesystem.open_input_file(self.key)
        return pa.PythonFile(Path(self.key).open("rb"), mode="r")

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises FileNotFoundError, PermissionError, for a file of this machine another OSError, and StorageError for an object
        store that does not answer.
        """
        if not self.scheme:
            return Path(self.key).read_bytes()
        while True:
            with self._explained("read"):
                with self.filesystem.open_input_file(self.key) as file:
                    content, version = cast(bytes, file.read()), file.metadata()
                # its size is asked for first: had it been replaced before it was read, this would be a part of another file
                with self.filesystem.open_input_file(self.key) as file:
                    if file.metadata() == version:
                        return content

    def version(self) -> str:
        """What changes with the content of this file of an object store. Raises like `read_bytes`."""
        with self._explained("read"), self.filesystem.open_input_file(self.key) as file:
            return f"{file.size()} {sorted((file.metadata() or {}).items())}"

    def download(self, path: Path) -> None:
        """Copy this file of an object store to `path`. Raises like `read_bytes`."""
        with self._explained("read"), self.filesystem.open_input_stream(self.key) as file, path.open("wb") as target:
            shutil.copyfileobj(file, target, CHUNK)

    def write_bytes(self, content: Any) -> None:
        """Write the file, and the folders above it, in place of an older one: readers see the one or the other."""
        if self.scheme:
            with self._explained("written"):
                stream = self.filesystem.open_output_stream(self.key)
                stream.write(content)
                stream.close()  # an object appears when it is closed; after an error it must not be
            return
        with self._partial(content, lasting=True) as partial:
            partial.replace(self.key)

    def create_bytes(self, content: bytes) -> bool:
        """Write the file if there is none, and say whether it was written.

        On this machine exactly one of several callers succeeds; an object store is asked first and then written to, so that two
        callers may both do so within moments.
        """
        if self.scheme:
            if self.is_file():
                return False
            self.write_bytes(content)
            return True
        with self._partial(content, lasting=False) as partial:
            try:
                os.link(partial, self.key)
            except FileExistsError:
                return partial.stat().st_nlink == 2  # a network file system may repeat a request that it has granted
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                with contextlib.suppress(FileExistsError), Path(self.key).open("xb") as file:  # a file system without links
                    file.write(content)
                    return True
                return False
        return True

    @contextlib.contextmanager
    def _partial(self, content: Any, *, lasting: bool) -> Iterator[Path]:
        """A hidden file beside this one with its content to be, removed at the end. Errors name this file."""
        path = Path(self.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex[:16]}.partial")
        try:
            with partial.open("xb") as file:
                file.write(content)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())  # a name must not outlive its content when the machine goes down
            yield partial
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), self.key) from None
        finally:
            with contextlib.suppress(OSError):  # it is not there, or this folder is not ours
                partial.unlink()

    def unlink(self) -> None:
        """Remove the file, if it is there."""
        if not self.scheme:
            Path(self.key).unlink(missing_ok=True)
        elif self.is_file():
            with self._explained("removed"), contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(self.key)

    def remove(self) -> None:
        """Remove the folder with all that is in it, if it is there; of a folder of this machine, as far as that is possible."""
        if not self.scheme:
            shutil.rmtree(self.key, ignore_errors=True)
            return
        with self._explained("removed"), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.key)

    def read_json(self) -> Any:
        """What `write_json` wrote; raises UserError for a damaged file."""
        return parse_json(self.read_bytes(), self)

    def write_json(self, value: Any) -> None:
        """JSON, written whole or not at all."""
        self.write_bytes(as_json(value).encode())

    @property
    def filesystem(self) -> fs.FileSystem:
        """pyarrow's, of an object store; the key is a path in it."""
        return object_store.filesystem(self.scheme, self.key.split("/", 1)[0])

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """An object store's refusal in plain words: FileNotFoundError, PermissionError of a file read, else StorageError."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
        except pa.ArrowInvalid as error:  # a key that pyarrow does not take
            raise OSError(errno.EINVAL, str(error), str(self)) from None
        except OSError as error:
            if done == "read" and any(word in str(error) for word in object_store.REFUSALS):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self)) from None
            raise StorageError(f"'{self}' cannot be {done}: {object_store.explain(str(error))}") from None
