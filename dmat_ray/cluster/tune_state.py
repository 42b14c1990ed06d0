"""What Ray Tune remembers of a search, and a copy of it that is whole whenever the job is killed.

Tune overwrites its own files in place, about every second: a kill in that moment, or a full disk, cuts one off, and then no
search goes on from them. They come from a temporary folder of the driver's machine, where all are whole between two steps of
Tune's loop.
"""

import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import ray.tune
from ray import cloudpickle
from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray.errors import UserError, first_line
from dmat_ray.storage import at

STATE, COPY = "ray_tune", "ray_tune.zip"  # Tune's folder in that of a search, and the copy of the files that it goes on from
TUNER = "tuner.pkl"  # which Tune writes once, into its folder in that of the search
EVERY_S = 1.0
JSON = "experiment_state-"  # how files begin that are JSON; the others are pickles, whatever they are called


class Copies:
    """Makes the copy of the search in `folder` anew as its trials go."""

    def __init__(self, folder: Path) -> None:
        self._file, self._tuner = at(folder / COPY), folder / STATE / TUNER
        self._copied, self._when = 0, -math.inf

    def renew(self, trials: Sequence[TuneTrial], *, last: bool = False) -> None:
        """Copy what Tune has written since, at most every second, but for the `last` time.

        Called between two steps of its loop.
        """
        if not trials or trials[0].storage is None or (time.monotonic() - self._when < EVERY_S and not last):
            return
        # a session that goes on has the tuner's among the others, whole whatever becomes of that in the search's folder
        named = {file.name: file for file in (self._tuner, *_files(Path(trials[0].local_experiment_path)))}
        files = [file for file in named.values() if file.is_file()]
        changed = max((file.stat().st_mtime_ns for file in files), default=0)
        if changed <= self._copied:
            return
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for file in files:
                archive.write(file, file.name)
        with suppress(OSError):  # a disk that is full for now; the one before stays
            self._file.write_bytes(buffer.getvalue())
            self._copied = changed
        self._when = time.monotonic()


def goes_on(folder: Path, say: Callable[[str], None]) -> bool:
    """Whether the search in `folder` has something to go on with, which is made whole from the copy where it is not. Nobody else
    may be writing there.

    Raises UserError if it is damaged, and trials would be lost with it.
    """
    state, copy = folder / STATE, folder / COPY
    at(folder).sweep()
    # Ray takes a folder for one to go on from before it has written what there is to go on with
    if not (ray.tune.Tuner.can_restore(str(state)) and any(state.glob(f"{JSON}*.json"))):
        return False
    damage = _damage(state)
    if damage and copy.is_file():
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(copy) as archive:
            # in this order: a kill in between leaves a damaged file the newest, not one of an older session that passes for it
            archive.extractall(state)
            kept = {TUNER, *archive.namelist()}
            while _damage(state) and (later := [file for file in _files(state) if file.name not in kept]):
                for file in later:  # of a session that ended before it could be copied
                    file.unlink()
        if not _damage(state):
            say(f"{damage}: going on with its copy in '{copy}'")
            return True
    if damage and any(folder.glob("trials/*/*/checkpoint_*")):
        raise UserError(
            f"the search in '{folder}' cannot go on: {damage}; give it another name by --tune.name, or remove that folder to "
            "begin it anew"
        )
    return not damage


def _files(folder: Path) -> list[Path]:
    """What Tune goes on from: the newest of each kind, by the time in its name. What is to become such a file has another name
    until then.
    """
    found = (path for path in folder.glob("[!.]*") if path.suffix in (".json", ".pkl") and path.is_file())
    there = sorted(path for path in found if not path.name.startswith("tmp-"))
    return list({path.stem.rstrip("-_0123456789"): path for path in there}.values())


def _damage(state: Path) -> str:
    """Which of Tune's files cannot be read, and why; empty if all can."""
    for file in _files(state):
        try:
            (json.loads if file.name.startswith(JSON) else cloudpickle.loads)(file.read_bytes())
        except Exception as error:  # a pickle that is cut off may raise anything
            return f"'{file}' is damaged ({first_line(error)})"
    return ""
