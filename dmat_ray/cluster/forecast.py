"""How far a stage is, and how long the rest of it will take, by what its actors have done since they started."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmat_ray.cluster.silence import breaking_silence
from dmat_ray.wording import duration

SAY_EVERY_S = 5.0
# of the work, or seconds: before either it is not told, for little work says little
LEAST_SHARE, LEAST_S = 0.05, 60.0


class Forecast:
    """Of work of a given size, in units of its own, that `actors` share.

    The first piece of each is counted as done and not as measured: its time is that of starting actors, too.
    """

    def __init__(self, whole: float, actors: int) -> None:
        self._left, self._starting, self._since, self._measured = whole, actors, 0.0, 0.0

    def done(self, size: float, now: float) -> None:
        """A piece of it is done."""
        self._left -= size
        if self._starting:
            self._starting, self._since = self._starting - 1, now
        else:
            self._measured += size

    def rate(self, now: float) -> float:
        """Units a second; 0 while too little was done to say."""
        seconds, whole = now - self._since, self._left + self._measured
        enough = self._measured >= LEAST_SHARE * whole or seconds >= LEAST_S
        return self._measured / seconds if self._measured and seconds > 1 and enough else 0.0

    def to_go(self, now: float) -> str:
        """To stand behind a report; nothing at the end, and while there is no rate."""
        rate = self.rate(now)
        return f", about {duration(self._left / rate)} to go" if self._left > 0 and rate else ""


class Progress:
    """When to say how far a stage is, which is told of every piece that is done, and what to say of its time."""

    def __init__(self, whole: float, actors: int, heard: Callable[[], None]) -> None:
        self._forecast, self._left, self._least, self._heard = Forecast(whole, actors), whole, 1e-9 * whole, heard
        self._began = self._said = self._now = time.monotonic()

    def done(self, size: float) -> bool:
        """A piece of it is done. Returns whether to say so: at the end, and else every `SAY_EVERY_S`."""
        self._heard()
        self._now = time.monotonic()
        self._left -= size
        self._forecast.done(size, self._now)
        if self._now - self._said < SAY_EVERY_S and self._left > self._least:
            return False
        self._said = self._now
        return True

    @property
    def seconds(self) -> float:
        """From the beginning to the last piece."""
        return self._now - self._began

    def rate(self) -> float:
        """See Forecast."""
        return self._forecast.rate(self._now)

    def to_go(self) -> str:
        """See Forecast."""
        return self._forecast.to_go(self._now)


@contextmanager
def progress(whole: float, actors: int, piece: str, say: Callable[[str], None]) -> Iterator[Progress]:
    """That of a stage of this size (see Forecast), inside; it is said as well when no `piece` was done for long.

    Ray must be connected.
    """
    with breaking_silence(piece, say) as heard:
        yield Progress(whole, actors, heard)
