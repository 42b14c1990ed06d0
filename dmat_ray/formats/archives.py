"""Zips as torch writes them: nothing is unpacked, and no more is read than the file is long."""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from dmat_ray.errors import UserError
from dmat_ray.formats.stored import RefusedError

LOCAL = b"PK\x03\x04"
CHUNK = 1 << 20


def check_zip(listing: Iterable[zipfile.ZipInfo], size: int, packed: Callable[[str], bool] = lambda name: False) -> None:
    """Raise RefusedError for what torch does not write: compression, encryption, overlaps, two files of one name.

    `packed` says of which names nothing is asked about compression and size.
    """
    names: set[str] = set()
    total = 0
    for info in listing:
        if info.filename in names:
            raise RefusedError("is a zip with two files of one name")
        names.add(info.filename)
        if packed(info.filename):
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise RefusedError("is a compressed zip, which torch.save does not write")
        total += info.file_size
    if total > size:
        raise RefusedError("is a zip whose files would be larger than itself")


class Entry:
    """One uncompressed file of a zip, read in parts; its checksum is looked at before the first."""

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        self._path, self._info = path, info
        self._begin: int | None = None

    def read(self, begin: int, end: int) -> bytes:
        """Some of its bytes. Raises UserError for a damaged file."""
        with self._path.open("rb") as file:
            if self._begin is None:
                file.seek(self._info.header_offset)
                head = file.read(30)
                if head[:4] != LOCAL or len(head) < 30:
                    raise self._damaged("no file where one should begin")
                start = (
                    self._info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
                )
                file.seek(start)
                left, checksum = self._info.file_size, 0
                while left and (chunk := file.read(min(left, CHUNK))):
                    left, checksum = left - len(chunk), zlib.crc32(chunk, checksum)
                if left or checksum != self._info.CRC:
                    raise self._damaged(f"Bad CRC-32 for file '{self._info.filename[:80]}'")
                self._begin = start
            file.seek(self._begin + begin)
            return file.read(min(end, self._info.file_size) - begin)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"checkpoint '{self._path}' is damaged: {what}")
