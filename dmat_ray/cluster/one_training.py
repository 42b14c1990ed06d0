"""A training on Ray Train whose progress is counted in thousand images, from the driver's side: a generator's or an encoder's."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dmat_ray.cluster import session, tracking, workers
from dmat_ray.cluster.context import stored_checkpoints
from dmat_ray.cluster.events import Asked, heed_stop, listen
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.models import steps
from dmat_ray.models.checkpoint import newest_of
from dmat_ray.storage import Location, Place
from dmat_ray.storage.files import awaited
from dmat_ray.storage.folders import replace_folder
from dmat_ray.storage.lease import Lease


class Training:
    """One that is under way in `place`, under the `lease` of the folder that its result will be put into."""

    def __init__(
        self, config: Config, place: Location, lease: Lease, run: tracking.Run, asked: Asked, say: Callable[[str], None]
    ) -> None:
        self.run = run
        self._config, self._place, self._lease, self._asked, self._say = config, place, lease, asked, say
        self._told = 0.0  # the thousand images that MLflow was told of last

    def fit(
        self,
        worker: Callable[[dict[str, Any]], Any],
        prepare: Callable[[], dict[str, Any]],
        progress: str,
        lines: Callable[[dict[str, float]], list[str]],
        other: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Location, Any] | None:
        """The last checkpoint, whose file `progress` says how far it is, and what rank 0's `worker` returned; None if it was
        asked to stop before its end.

        Workers get the settings, the mailbox and, once there are machines, what `prepare` gives. Reports are said in `lines`,
        events that neither report nor say anything go to `other`. Ray must be connected. Raises UserError once another run has
        taken over the lease, and where the last checkpoint is not there after all: an earlier one must not pass for the result.
        """

        def handle(event: dict[str, Any]) -> None:
            if "text" in event:
                self._say(event["text"])
            elif "metrics" in event:
                self._tell(event["metrics"], lines)
            elif other is not None:
                other(event)

        cluster = self._config.cluster
        with listen(handle, self._asked) as mailbox:
            session.await_machines(cluster, self._say, cluster.train_workers)
            settings = {"config": self._config.to_json(), "mailbox": mailbox, **prepare()}
            result = workers.fit(worker, settings, cluster, self._place, self._say, keep=2)
        self._lease.check()
        if (last := self._last(progress, self._say)) is None and self._asked.is_set():
            self._say("stopped; the same command goes on from the checkpoint")
            return None
        if last is None:  # a shared disk may show late what another machine has written
            last = awaited(functools.partial(self._last, progress, lambda line: None))
        if last is None:
            raise UserError(
                f"the training has ended, but its last checkpoint in '{self._place}' is damaged or cannot be seen from here, and "
                "nothing is published: give the same command again, which goes on from the one before"
            )
        return last, result.return_value

    def _last(self, progress: str, say: Callable[[str], None]) -> Location | None:
        """The checkpoint of the training's end, if it is whole; where this process was killed Ray Train may not know of it."""
        newest = newest_of(stored_checkpoints(self._place), progress, say)
        return newest if newest is not None and steps.is_last((newest / progress).read_json()) else None

    def _tell(self, metrics: dict[str, float], lines: Callable[[dict[str, float]], list[str]]) -> None:
        if metrics["kimg"] > self._told:  # else workers that were started anew have come there again
            self._told = metrics["kimg"]
            self.run.metrics(metrics, step=round(1000 * self._told))
        for line in lines(metrics):
            self._say(line)

    def publish(self, folder: Place, name: str, write: Callable[[Path], None], values: Mapping[str, float], kimg: float) -> None:
        """Put what `write` makes in the place of `folder`, and into MLflow as `name`, with `values` at `kimg` thousand images.

        Raises UserError if another run has taken over the lease, or the folder cannot be written.
        """

        def write_and_check(fresh: Path) -> None:
            write(fresh)
            self._lease.check()

        replace_folder(folder, write_and_check)
        self.run.done = True
        self.run.artifact(folder, name)
        self.run.metrics(values, step=round(1000 * kimg))


@contextlib.contextmanager
def tracked(config: Config, stage: str, place: Location, lease: Lease, say: Callable[[str], None]) -> Iterator[Training]:
    """Inside, a training of MLflow's `stage`, whose checkpoints are kept in `place`.

    Asked to stop (SIGTERM, Ctrl-C) it has one written, and this raises SystemExit at its end. Once another run has taken over
    the `lease` it is stopped as well.
    """
    kind = f"{place.name.split('-')[0]}-"
    others = [found.name for found in place.parent.folders() if found.name.startswith(kind) and found.name != place.name]
    if others:
        say(
            f"'{place.parent}' holds unfinished trainings of other settings, inputs or workers, which this one leaves: "
            + ", ".join(others)
        )
    with tracking.tracked(config, "", stage) as run, heed_stop() as asked:
        lease.when_lost(asked.set)  # the other goes on with this
        yield Training(config, place, lease, run, asked, say)
