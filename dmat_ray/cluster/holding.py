"""A lease that Tune's loop looks at, so that it ends once another run has taken over."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray.tune

from dmat_ray.storage.lease import Lease

_LEASE: Lease | None = None


class Holds(ray.tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Checks the lease that is `held`, after every step. Tune pickles its callbacks, so this holds nothing."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if _LEASE is not None:
            _LEASE.check()


@contextlib.contextmanager
def held(lease: Lease) -> Iterator[None]:
    """Inside, `Holds` checks this lease: one at a time in a process. Raises UserError if it was lost, which Tune wraps."""
    global _LEASE
    _LEASE = lease
    try:
        yield
    except Exception:
        lease.check()
        raise
    finally:
        _LEASE = None
