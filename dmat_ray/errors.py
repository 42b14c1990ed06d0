"""The one error type that means: the user can fix this."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names what was found and what to do; jobs print it as one line."""


class NotFiniteError(UserError):
    """A loss or an output that is infinite or not a number: the network has diverged."""
