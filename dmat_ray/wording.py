"""Pieces of what jobs say, of lines and of messages alike."""

import difflib
from collections.abc import Iterable


def number_of(number: int, noun: str) -> str:
    """A number with its noun: "1 shard", "20 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """How long something takes, as precisely as one would say it: "40 s", "12 minutes", "3.5 hours", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For the message about a `name` that is not known: "did you mean X? " of the one that is most like it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""
