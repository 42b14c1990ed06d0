"""The one error type that means: the user can fix this."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names what was found and what to do; jobs print it as one line."""


class StorageError(UserError):
    """A place could not be read, written or listed: nothing is known of what is there, and the store may come back."""


class NotFiniteError(UserError):
    """A loss or an output that is infinite or not a number: the network has diverged."""
