"""How long the rest of a stage will take, by what its actors have done since they started."""

from dmat_ray.wording import duration

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
