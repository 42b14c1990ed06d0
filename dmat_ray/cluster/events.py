"""Live lines from workers: an actor that holds messages, and a thread in the driver that reads them.

Metrics travel here as they come up, so that only the driver talks to MLflow and to the terminal, and workers need
neither credentials nor a shared disk for it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dmat_ray.errors import DmatRayError, UserError

BEAT_S, DEAF_S = 10.0, 60.0  # between two beats of a worker, and without any from which on there is none
SILENCE_S = 300.0  # without a worker, before that is told
TWICE_S = 1.0  # two requests to stop that are nearer than this are one
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class _Mailbox:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.user_error: DmatRayError | None = None
        self.stopping = False
        self.heard: float | None = None  # when a worker last beat

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def put_user_error(self, error: DmatRayError) -> None:
        self.user_error = self.user_error or error

    def get_user_error(self) -> DmatRayError | None:
        return self.user_error

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def beat(self) -> None:
        self.heard = time.monotonic()

    def hears(self) -> bool:
        return self.heard is not None and time.monotonic() - self.heard < DEAF_S

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def send(mailbox: str, event: dict[str, Any]) -> None:
    """From any process of the job: hand `event` (what Ray can serialise) to the driver's listener, if that is still there.

    Losing a line must not end a training: its numbers are in the checkpoint's history as well.
    """
    try:
        ray.get_actor(mailbox).put.remote(event)
    except (ValueError, ray.exceptions.RayError) as error:
        print(f"no listener for events: {error}", file=sys.stderr)


def is_stopping(mailbox: str) -> bool:
    """From any process of the job: whether the driver was asked to end, and work should be put away."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        return bool(ray.get(ray.get_actor(mailbox).is_stopping.remote(), timeout=10))
    return False


class Asked(threading.Event):
    """Set once this process was asked to stop, by the signal `number`, of two the second."""

    number = signal.SIGTERM


@contextmanager
def heed_stop() -> Iterator[Asked]:
    """Inside, the first SIGTERM or Ctrl-C only sets the event, which `listen` passes on; the second does what it otherwise would.

    One that follows within `TWICE_S` is the first once more: `timeout` sends it to the process and to its group. Raises
    SystemExit at the end if there was one, with 128 and its number, whatever the handler makes of the second, in whose place this
    one is. In other threads than the main one nothing changes.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before, first = {number: signal.getsignal(number) for number in SIGNALS}, 0.0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not asked.is_set():
            asked.number = signal.Signals(number)
            asked.set()
            first = time.monotonic()
        elif time.monotonic() - first > TWICE_S:
            asked.number = signal.Signals(number)
            restore()
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield asked
    except (SystemExit, KeyboardInterrupt) as error:  # of Ray's handler, and of `session.connected`'s
        if not asked.is_set() or error.args != (asked.number,):
            raise
    finally:
        restore()
    if asked.is_set():
        raise SystemExit(128 + asked.number)


@contextmanager
def no_retry_of_user_errors(mailbox: str) -> Iterator[bool]:
    """For the body of a worker: yields False if an earlier attempt found what only a user can mend, and the body must do nothing.

    Ray Train starts a failed group anew, whatever it failed of. This first attempt fails, so that all of its workers are
    stopped at once; the next one ends without doing anything, and the listener raises the UserError. A StorageError is tried
    again as any other failure is. While the body runs the listener knows that there is a worker (see `listen`).
    """
    actor = None
    with contextlib.suppress(ValueError):
        actor = ray.get_actor(mailbox)
    if actor is not None and ray.get(actor.get_user_error.remote()) is not None:
        yield False
        return
    try:
        with _beating(actor):
            yield True
    except UserError as error:
        if actor is not None:
            ray.get(actor.put_user_error.remote(type(error)(str(error))))
        raise


@contextmanager
def _beating(actor: Any) -> Iterator[None]:
    """Inside, the mailbox hears of this worker, in a thread: between two looks may lie a validation of many minutes."""
    stop = threading.Event()

    def loop() -> None:
        while True:
            with contextlib.suppress(ray.exceptions.RayError):
                actor.beat.remote()
            if stop.wait(BEAT_S):
                return

    if actor is not None:
        threading.Thread(target=loop, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


@contextmanager
def listen(handle: Callable[[dict[str, Any]], None], asked: Asked | None = None, interval_s: float = 0.3) -> Iterator[str]:
    """Calls `handle` in a thread for every event sent to the mailbox whose name this yields; all are handled at exit.

    Workers are told when `asked` is set (see `is_stopping`), and answer at their next step; if there are none (yet, or any more),
    this process is sent the signal again. That there are none is told every `SILENCE_S`.
    Raises the UserError that a worker has left there (see `no_retry_of_user_errors`), whatever the body raises.
    """
    name = f"dmat_ray_events_{uuid.uuid4().hex[:12]}"
    # on the driver's own node: a spot worker may go at any time
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Mailbox).options(name=name, num_cpus=0, scheduling_strategy=here).remote()
    stop = threading.Event()
    complained = False

    def tell(event: dict[str, Any]) -> None:
        nonlocal complained
        try:
            handle(event)
        except Exception as error:  # hours of training must not end because a tracking server has a bad minute
            if not complained:
                with contextlib.suppress(OSError):  # nobody may be there to read it
                    print(f"warning: an event could not be handled: {error}", file=sys.stderr, flush=True)
            complained = True

    def drain() -> None:
        for event in ray.get(actor.take.remote(), timeout=60):
            tell(event)

    def loop() -> None:
        told, alone, look = False, False, time.monotonic() + SILENCE_S
        while not stop.wait(interval_s):
            with contextlib.suppress(ray.exceptions.RayError):
                drain()
                if asked is None:
                    continue
                if asked.is_set():
                    by = SIGNALS[asked.number]
                    if not told:
                        ray.get(actor.stop.remote(), timeout=60)
                        told = True
                        tell({"text": f"asked to stop ({by}): writing a checkpoint first; a second {by} stops at once"})
                    if alone or not ray.get(actor.hears.remote(), timeout=60):
                        if not alone:
                            tell({"text": "no worker is at work: stopping at once"})
                        alone = True
                        os.kill(os.getpid(), asked.number)  # again and again: the first may come too soon (see heed_stop)
                elif time.monotonic() > look:
                    look = time.monotonic() + SILENCE_S
                    if not ray.get(actor.hears.remote(), timeout=60):
                        tell({"text": "no worker is at work: waiting for machines, or for what runs on them (see `ray status`)"})

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    found: DmatRayError | None = None
    try:
        yield name
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            drain()
            found = ray.get(actor.get_user_error.remote(), timeout=60)
            ray.kill(actor)
        if found is not None:
            raise found
