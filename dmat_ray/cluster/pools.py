"""Pools of Ray Data's actors: what every stage that has one tells Ray Data, and how its actors start."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

import ray.data

from dmat_ray.storage.files import tried_again

Given = ParamSpec("Given")

# what a moment later may be gone: a refused connection, a storage that answers too slowly
PASSING = ["OSError", "cannot be written", "cannot be read"]
START_PAUSES_S = (10.0, 60.0)  # before an actor reads again what it needs, which the store did not give


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


def patient_start(init: Callable[Given, None]) -> Callable[Given, None]:
    """For the `__init__` of an actor: it reads again, after pauses, what a store that is away does not give.

    `patient` has Ray Data try calls again, not starts, of which a few that fail in a row end the stage.
    """

    @wraps(init)
    def start(*given: Given.args, **named: Given.kwargs) -> None:
        tried_again(lambda: init(*given, **named), START_PAUSES_S, lambda line: print(line, file=sys.stderr, flush=True))

    return start
