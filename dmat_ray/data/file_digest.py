"""What tells that a file of many images is another than when it was listed: its images are known by their places in it."""

import hashlib
from typing import Any

from dmat_ray.errors import UserError
from dmat_ray.storage import Location

# bytes of a local file's beginning and of its end; in Parquet the latter has the places and sizes of all columns
SAMPLE = 1 << 16


def file_digest(place: Location, file: Any) -> int:
    """Of an open file: an int64 that changes with it, for an object store by what that says of it.

    Of a file of this machine its size, beginning and end count, and not its time: each machine may have a copy of its own. What
    leaves all three as they are, such as a bit that is damaged between them, is not seen.
    """
    size = file.size()
    if place.scheme:
        told = repr(sorted((file.metadata() or {}).items())).encode()
    else:
        told = b""
        for start in (0, max(0, size - SAMPLE)):
            file.seek(start)
            told += file.read(SAMPLE)
        file.seek(0)
    return int.from_bytes(hashlib.sha256(b"%d %s" % (size, told)).digest()[:8], "little", signed=True)


def changed(place: Location) -> UserError:
    """What is to be raised for a file that is not as it was listed: no image of it is at fault."""
    return UserError(
        f"'{place}' has changed since it was listed, or differs between machines; run again when nothing writes to it"
    )
