"""Pools of Ray Data's actors: what every stage that has one tells Ray Data."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray.data

# what a moment later may be gone: a refused connection, a storage that answers too slowly
PASSING = ["OSError", "cannot be written", "cannot be read"]


@contextmanager
def patient() -> Iterator[None]:
    """Datasets that are made inside wait for machines and for slow work as long as it takes, and try again what may pass."""
    context = ray.data.DataContext.get_current().copy()  # other stages of this process have another
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # spot machines may be hours away, and so may the end of a piece of work
    context.retried_map_errors, context.max_map_retries = PASSING, 2
    context.max_consecutive_actor_init_deaths = 3
    with ray.data.DataContext.current(context):
        yield
