"""The one error type that means: the user can fix this."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong. The message names what was found and what to do; jobs print it as one line."""


class NotFiniteError(UserError):
    """A loss or an output that is infinite or not a number: the network has diverged."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """For the message about a `name` that is not known: "did you mean X? " of the one that is most like it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}? " if close else ""
