"""The errors whose message is for the user: it names what was found and what to do, and jobs print it as one line."""


class DmatRayError(ValueError):
    """Any of these."""


class UserError(DmatRayError):
    """Something the user gave is wrong, or a file is damaged: as long as nobody mends it, it stays so."""


class StorageError(DmatRayError):
    """A place could not be read, written or listed: nothing is known of what is there, and the store may come back.

    No UserError: who takes one for a damaged file, which is made again, must not take a store that does not answer for one.
    """


class NotFiniteError(UserError):
    """A loss or an output that is infinite or not a number: the network has diverged."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or, of one that says nothing, its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
