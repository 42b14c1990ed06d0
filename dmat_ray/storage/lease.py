"""One writer at a time: a small file that says who writes a folder, and beats while they do.

A file, because that is what local disks, shared disks and object stores have in common. Nobody's clock is compared with
anybody's: a second writer watches whether the beat moves. A writer that was killed on the same machine is recognised by its
process, without waiting.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from dmat_ray.errors import DmatRayError, UserError
from dmat_ray.storage import Location, Place, at
from dmat_ray.storage.processes import machine, started

FILE = "writer.json"
BEATS_UNTIL_DEAD = 4
INTERVAL_S, OF_STORES_S = 5.0, 15.0  # between two beats; a store's answer alone may take tens of seconds

_mine: set[str] = set()  # owners that live in this process


class Lease:
    """A held folder; `check` raises once somebody else has taken it."""

    def __init__(self, file: Location, interval_s: float) -> None:
        self._file, self._interval_s = file, interval_s
        self._stop, self._lost = threading.Event(), False
        self._told: list[Callable[[], object]] = []
        pid = os.getpid()
        self._content: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "machine": machine(),
            "pid": pid,
            "started": started(pid),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "interval_s": interval_s,
            "beat": 0,
        }

    @property
    def is_lost(self) -> bool:
        """Whether another run has been seen to have taken the folder."""
        return self._lost

    def check(self) -> None:
        """Raise UserError if another run has taken the folder (this one was suspended, or its storage out of reach)."""
        if self._lost:
            raise UserError(f"another run has taken over '{self._file.parent}' while this one did not answer; this one ends")

    def when_lost(self, call: Callable[[], object]) -> None:
        """Have `call` called once somebody else is seen to have taken the folder, by another thread or at once."""
        self._told.append(call)
        if self._lost:
            call()

    def _take(self) -> None:
        if not self._file.create_bytes(self._bytes()):
            found = self._read()
            if found is not None:
                self._require_dead(found)
            self._file.write_bytes(self._bytes())
        # two that found the same dead writer have both written: the last one stays
        time.sleep(0.2 if self._file.local else 1.0)
        found = self._read()
        if found is None or found["owner"] != self._content["owner"]:
            raise UserError(_refusal(self._file, found))
        _mine.add(self._content["owner"])

    def _require_dead(self, found: dict[str, Any]) -> None:
        if found["machine"] == self._content["machine"] and found["started"] is not None:
            if found["pid"] == os.getpid() and found["started"] == self._content["started"]:
                alive = found["owner"] in _mine
            else:
                alive = started(found["pid"]) == found["started"]
            if alive:
                raise UserError(_refusal(self._file, found))
            return
        end = time.monotonic() + BEATS_UNTIL_DEAD * found["interval_s"]
        while time.monotonic() < end:
            time.sleep(min(1.0, found["interval_s"]))
            now = self._read()
            if now is None:
                return
            if (now["owner"], now["beat"]) != (found["owner"], found["beat"]):
                raise UserError(_refusal(self._file, now))

    def _read(self) -> dict[str, Any] | None:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return None
        wanted = {"owner", "machine", "pid", "started", "since", "interval_s", "beat"}
        with suppress(ValueError, RecursionError):
            found = json.loads(content)
            if isinstance(found, dict) and wanted <= found.keys():
                return found
        raise UserError(f"'{self._file}' is not what a run writes there; remove it if no run writes that folder")

    def _bytes(self) -> bytes:
        return json.dumps(self._content).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                found = self._read()
                if found is not None and found["owner"] != self._content["owner"]:
                    self._lost = True
                    for call in self._told:
                        call()
                    return
                self._content["beat"] += 1
                self._file.write_bytes(self._bytes())
            except (OSError, DmatRayError):
                continue  # a storage that is out of reach for a moment; a successor, if there is one, shows at the next beat

    def _release(self) -> None:
        _mine.discard(self._content["owner"])
        found = self._read()
        if found is not None and found["owner"] == self._content["owner"]:
            self._file.unlink()


def _refusal(file: Location, found: dict[str, Any] | None) -> str:
    who = f"process {found['pid']} on {found['machine'].split('/')[0]}, since {found['since']}" if found else "another run"
    return f"'{file.parent}' is being written by {who}; wait until it ends, or give another --output"


@contextmanager
def sole(folder: Place) -> Iterator[Lease]:
    """Like `exclusive`, for a folder that may be removed meanwhile: the lease lies beside it, and leaves no empty folders."""
    place = at(folder)
    beside = place.parent / f".{place.name}.lease"
    made = [] if beside.local is None else [parent for parent in beside.local.parents if not parent.exists()]
    try:
        with exclusive(beside) as lease:
            yield lease
    finally:
        if beside.local is not None:
            with suppress(OSError):  # another's, who is at work, is not empty
                for empty in (beside.local, *made):
                    empty.rmdir()


@contextmanager
def all_sole(parent: Place, names: Sequence[str]) -> Iterator[list[Lease]]:
    """`sole` of several folders in one, or of none if one of them has a writer that lives.

    They are asked for at the same time, so that the silence of writers that died elsewhere is waited for once.
    """
    above = at(parent)
    made = [] if above.local is None else [folder for folder in (above.local, *above.local.parents) if not folder.exists()]
    for missing in reversed(made):
        missing.mkdir(exist_ok=True)
    held = [sole(above / name) for name in names]
    try:
        with ExitStack() as stack:
            with ThreadPoolExecutor(len(held)) as pool:
                asked = [pool.submit(one.__enter__) for one in held]
            for one, answer in zip(held, asked, strict=True):
                if answer.exception() is None:
                    stack.push(one)
            yield [answer.result() for answer in asked]
    finally:
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


@contextmanager
def exclusive(folder: Location, interval_s: float | None = None) -> Iterator[Lease]:
    """Inside, this process is the folder's only writer. Raises UserError at once if there is another that lives.

    A writer that died elsewhere, so that only its silence shows it, is waited for: four of its beats.
    """
    usual = INTERVAL_S if folder.local is not None else OF_STORES_S
    lease = Lease(folder / FILE, interval_s or usual)
    lease._take()
    thread = threading.Thread(target=lease._beat, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease._stop.set()
        thread.join()
        with suppress(OSError, DmatRayError):  # what is left names a process that is gone, or falls silent
            lease._release()
