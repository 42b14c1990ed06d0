"""Live lines from workers: an actor that holds messages, and a thread in the driver that reads them.

Metrics travel here as they come up, so that only the driver talks to MLflow and to the terminal, and workers need
neither credentials nor a shared disk for it.
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray


class _Mailbox:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def send(mailbox: str, event: dict[str, Any]) -> None:
    """From any process of the job: hand `event` (JSON values) to the driver's listener."""
    ray.get_actor(mailbox).put.remote(event)


@contextmanager
def listen(handle: Callable[[dict[str, Any]], None], interval_s: float = 0.3) -> Iterator[str]:
    """Calls `handle` in a thread for every event sent to the mailbox whose name this yields; all are handled at exit."""
    name = f"dmat_ray_events_{uuid.uuid4().hex[:12]}"
    actor = ray.remote(_Mailbox).options(name=name, num_cpus=0).remote()
    stop = threading.Event()
    failures: list[BaseException] = []

    def drain() -> None:
        for event in ray.get(actor.take.remote()):
            handle(event)

    def loop() -> None:
        try:
            while not stop.wait(interval_s):
                drain()
        except BaseException as error:  # handed to the driver's thread below
            failures.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield name
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    drain()
    ray.kill(actor)
