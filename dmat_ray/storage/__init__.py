"""Where things are: what settings name is a path, or the URL of a folder or file in an object store.

A place is written as a path, or as a URL: `s3://bucket/folder`, `gs://bucket/folder`. Credentials, region and endpoint come from
where they always do (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, the machine's role).
"""

import errno
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from dmat_ray.config import Config
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import object_store
from dmat_ray.storage.location import Location

Place = str | Path | Location

READERS = 16  # files read at a time: an object store answers slowly, and many at once
DATABASE = "mlflow.db"  # in an output folder, where no address of an MLflow is given
# of a database; those of memory are sqlite:// and sqlite:///:memory:
RELATIVE_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)([^?]+)(.*)", re.DOTALL)
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# what is wrong with a file itself; all else (a stale handle, an input/output error, too many open files) is the machine's
OF_THE_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
)


def require_not_of_storage(error: Exception, place: Location) -> None:
    """Raise StorageError if an error of reading this file says nothing of the file, but of the way to it."""
    if object_store.is_its_error(error):
        raise StorageError(f"'{place}' cannot be read: {object_store.explain(str(error))}") from None
    if isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_FILE:
        raise StorageError(f"'{place}' cannot be read: {error.strerror}") from None


def text_of(place: Place) -> str:
    """A place as settings write it. Raises UserError for what is neither a path nor a URL: a network, or None."""
    if not isinstance(place, str | os.PathLike):
        raise UserError(f"a {type(place).__name__} names no folder or file; give a path or URL, as text or a pathlib.Path")
    return str(place) if isinstance(place, str | Location) else os.fsdecode(place)


def at(place: Place) -> Location:
    """The location that a setting names; a local path is made absolute, from the home folder if it begins with ~.

    Raises UserError for a scheme that is not known, and for credentials in a URL: settings are written into models and reports.
    And for what `text_of` refuses.
    """
    if isinstance(place, Location):
        return place
    text = text_of(place)
    match = None if isinstance(place, Path) else URL.fullmatch(text)
    if match is None:
        return Location("", str(Path(os.path.expanduser(text)).resolve()))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"'{text}' names a file of another machine; write file:///folder")
        return Location("", str(Path(unquote(rest)).resolve()))
    if scheme not in object_store.SCHEMES:
        raise UserError(
            f"'{text}' begins with {scheme}://; known are paths, {', '.join(f'{s}://' for s in object_store.SCHEMES)}"
        )
    bucket = rest.split("/", 1)[0]
    if not bucket:
        raise UserError(f"'{text}' names no bucket")
    if "@" in bucket or ":" in bucket:  # a secret may hold a slash, and then the @ comes later
        raise UserError(f"a {scheme}:// URL holds credentials before its bucket; give them by environment, not in settings")
    return Location(scheme, str(PurePosixPath(rest)))


def set_folder(config: Config) -> Location:
    """Where the on-manifold set lies: where the settings say, or in the output folder."""
    return at(config.manifold_set) if config.manifold_set else at(config.output) / "on_manifold_set"


def tracking_uri(config: Config) -> str:
    """The configured MLflow, of a database in a file with an absolute path, or sqlite in the output folder.

    Raises UserError if that is no folder of this machine.
    """
    if config.tracking.uri:
        relative = RELATIVE_SQLITE.fullmatch(config.tracking.uri)
        return f"{relative[1]}{at(Path(relative[2]))}{relative[3]}" if relative else config.tracking.uri
    folder = at(config.output)
    if folder.local is None:
        raise UserError(
            f"output '{folder}' is in an object store, which cannot hold MLflow's database; give the address of an MLflow "
            "server as --tracking.uri"
        )
    return f"sqlite:///{folder.local / DATABASE}"


def local_output(config: Config, job: str) -> Path:
    """The output folder, for a job that needs one on a disk; raises UserError for a URL."""
    folder = at(config.output)
    if folder.local is None:
        raise UserError(
            f"{job} cannot write to an object store, as output '{folder}' is: give a path that all nodes share as --output. Its "
            f"inputs may be URLs (--manifold_set {set_folder(config)}), and what it makes may be copied there"
        )
    return folder.local


__all__ = [
    "DATABASE",
    "RELATIVE_SQLITE",
    "Location",
    "Place",
    "at",
    "local_output",
    "require_not_of_storage",
    "set_folder",
    "text_of",
    "tracking_uri",
]
