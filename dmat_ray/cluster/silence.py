"""A line now and then while nothing can be reported, so that work can be told from waiting."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from dmat_ray.wording import duration

FIRST_S, LONG_S = 30.0, 300.0


def _cluster() -> str:
    have = ray.cluster_resources()
    found = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
    return f"; Ray counts {found} in the cluster (if it waits for machines, `ray status` says for which)"


@contextmanager
def breaking_silence(what: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Inside, says so when no `what` was finished for `FIRST_S`, twice that, and so on, and at
    least every `LONG_S`; from the second line on with what the cluster has.

    It gives what is to be called whenever one was. Ray must be connected.
    """
    last, stop = [time.monotonic()], threading.Event()

    def heard() -> None:
        last[0] = time.monotonic()

    def watch() -> None:
        since, wait, told, lines = last[0], FIRST_S, last[0], 0
        while not stop.wait(min(1.0, FIRST_S / 4)):
            if last[0] != since:
                since, wait, told, lines = last[0], FIRST_S, last[0], 0
            if (now := time.monotonic()) - told > wait:
                told, wait, lines = now, min(2 * wait, LONG_S), lines + 1
                say(f"no {what} was finished in the last {duration(now - since)}{_cluster() if lines > 1 else ''}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join()
