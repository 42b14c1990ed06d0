"""Checkpoints that trainings which did not end have left: a model goes on from them in whatever group it is trained next."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pydantic

from dmat_ray.cluster.context import stored_checkpoints
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.models import checkpoint
from dmat_ray.storage import Location
from dmat_ray.storage.folders import remove_folder, sweep_removed
from dmat_ray.storage.lease import sole
from dmat_ray.training.trained_models import is_of, is_trained

GROUP = "models"  # what the folder of several models is called after their number


class Leftover:
    """What lies in the folder of a training: checkpoints by the model's name, the newest first, each with its run.json."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._found: dict[str, list[tuple[Location, dict[str, Any]]]] = {}
        self._unread = False
        for place in stored_checkpoints(folder):
            try:
                run = checkpoint.read_run(place)
            except (UserError, FileNotFoundError):
                self._unread = True  # damaged, of a version that is no longer or not yet read, or removed just now
                continue
            self._found.setdefault(run["config"]["name"], []).append((place, run))

    def of(self, config: Config) -> list[Location]:
        """Those that a training of these settings, with this set and generator, may go on from."""
        found = self._found.get(config.name, [])
        # one name, one training: a folder's name is made of all that its models depend on
        return [place for place, _ in found] if found and is_of(found[0][1], config, found[0][0]) else []

    def history(self, config: Config) -> list[dict[str, float]]:
        """The metrics of the epochs that such a training has behind it, by the newest of them."""
        return list(self._found[config.name][0][1]["history"]) if self.of(config) else []

    def final(self, config: Config) -> Location | None:
        """The one that such a training ended with."""
        finished = [place for place, run in self._found.get(config.name, []) if run["finished"]]
        for place in finished if self.of(config) else []:
            try:
                checkpoint.require_whole(place, checkpoint.RUN)  # all of it, which in an object store is a download
                return place
            except UserError:
                continue
        return None

    def is_used_up(self, output: str) -> bool:
        """Whether all models that it is of are trained; never if one of its checkpoints does not tell whose it is."""
        runs = [found[0][1]["config"] for found in self._found.values()]
        with contextlib.suppress(pydantic.ValidationError, UserError):  # of a version with other settings, or of another format
            return not self._unread and all(is_trained(Config.model_validate({**values, "output": output})) for values in runs)
        return False


def _folders(storage: Location, configs: list[Config]) -> Iterator[Location]:
    """Those of trainings of models that are called as these are, and of groups."""
    names = {config.name for config in configs}
    for folder in storage.folders():
        label = folder.name.rsplit("-", 1)[0]
        if label in names or re.fullmatch(rf"\d+_{GROUP}", label):
            yield folder


def sweep(storage: Location, trained: list[Config]) -> None:
    """Remove what is used up of these models' trainings, and of groups': the job that published them was killed before it could,
    or in the middle of it.

    Where another job is at work nothing is removed.
    """
    if trained:
        sweep_removed(storage)
    for folder in _folders(storage, trained) if trained else ():
        discard(folder, trained[0].output)


def discard(folder: Location, output: str) -> None:
    """Remove what a training has left if that is used up, and no job is at work there."""
    if Leftover(folder).is_used_up(output):
        with contextlib.suppress(UserError), sole(folder):
            if Leftover(folder).is_used_up(output):  # as it is now that nobody else writes
                remove_folder(folder)


def left_by_others(todo: list[Config], own: Location) -> Iterator[Leftover]:
    """What lies beside the folder `own` of a training of these models, and is of one of them, or of none that is not trained.

    Who trains a model holds its lease, and so nobody writes more of what is of one of these; other jobs may read it.
    """
    for folder in _folders(own.parent, todo):
        if folder.name != own.name:
            found = Leftover(folder)
            if any(map(found.of, todo)) or found.is_used_up(todo[0].output):
                yield found
