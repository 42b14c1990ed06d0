"""RunContext inside a Ray Train worker."""

import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from torch import Tensor, nn

from dmat_ray.cluster.events import is_stopping, send
from dmat_ray.cluster.gauges import of_machine
from dmat_ray.cluster.nodes import require_like_driver
from dmat_ray.cluster.session import device_of_actor
from dmat_ray.errors import DmatRayError, StorageError, UserError
from dmat_ray.local import average_over_workers_, wrap_ddp
from dmat_ray.models.checkpoint import no_space
from dmat_ray.storage import Location, Place, at, object_store
from dmat_ray.storage.files import is_full, tried_again
from dmat_ray.storage.folders import put

Value = TypeVar("Value")
WHOLE = re.compile(r"(checkpoint_[0-9][^/]*)/[^/]*\.json")
NAMED = "checkpoint_%Y-%m-%d_%H-%M-%S.%f"  # as Ray Train names them, by the clock of rank 0's machine
UPLOAD_PAUSES_S = (10.0, 60.0, 120.0)  # before a checkpoint is uploaded again, which the store did not take
OF_AMAZON = "AWS Error "  # what Ray Train takes for a reason to upload again, from a folder that is no longer there


class StoppedError(Exception):
    """The driver was asked to stop, and a checkpoint has been written."""


def stored_checkpoints(folder: Place) -> list[Location]:
    """Ray Train's checkpoints in the folder of a training, the newest first; it keeps a file of a similar name beside them.

    In an object store those that are written to their end, of which their JSON is the last.
    """
    place = at(folder)
    if place.local is not None:
        names = {path.name for path in place.local.glob("checkpoint_[0-9]*")}
    else:
        names = {match[1] for file in place.tree()[0] if (match := WHOLE.fullmatch(file))}
    return [place / name for name in sorted(names, reverse=True)]


def next_name(newest: str | None) -> str:
    """What a checkpoint is called that comes after one of the name `newest`: by the time in UTC, but later in the order of names.

    Clocks of machines that follow each other differ, by their zones as well, and are set back.
    """
    name = datetime.now(UTC).strftime(NAMED)
    if newest is None or newest < name:
        return name
    try:
        return (datetime.strptime(newest, NAMED) + timedelta(microseconds=1)).strftime(NAMED)
    except ValueError:
        return f"{newest}_"


class RayContext:
    """Reports to Ray Train, which persists checkpoints, and sends rank 0's metrics to the driver's mailbox.

    Several runs may share one worker group, one after the other: `name` says whose checkpoint is whose. With `wait` a
    checkpoint is always where it will be kept before its metrics are sent.
    """

    def __init__(self, name: str, mailbox: str, *, wait: bool = False) -> None:
        require_like_driver()
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        # all workers of a machine see all of its GPUs, and Ray Train knows whose is whose
        self.device = ray.train.torch.get_device() if torch.cuda.is_available() else device_of_actor()
        self._name, self._mailbox, self._wait = name, mailbox, wait
        self._stopping, self._newest = False, ""
        self._leaving: set[int] = set()  # ranks on machines whose going was noticed
        self._uploading = False  # whether a checkpoint is on its way to the storage
        of_machine(self.device)  # the load that is told is that since the last time
        storage = context.get_storage()
        self._filesystem = storage.storage_filesystem
        self._storage = Location(object_store.scheme_of(self._filesystem), storage.experiment_fs_path)

    def wrap(self, module: nn.Module) -> nn.Module:
        """See RunContext."""
        return wrap_ddp(module, self.world_size)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See RunContext."""
        average_over_workers_(tensors, self.world_size)

    def of_rank_zero(self, value: Value) -> Value:
        """Rank 0's value, on all workers, which must all ask."""
        return ray.train.collective.broadcast_from_rank_zero(value)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        """See RunContext. Without `wait` the checkpoint is copied to the storage while training goes on, if that is done with the
        one before: Ray would let any number of them wait in the temporary folder.
        """
        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint))
        waits = wait or self._wait or (kept is not None and self._uploading)
        mode = CheckpointUploadMode.SYNC if waits else CheckpointUploadMode.ASYNC
        self._uploading = self._uploading or kept is not None
        ray.train.report(
            dict(metrics),
            checkpoint=kept,
            checkpoint_dir_name=None if kept is None else self._next_name(),
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=self._upload,
        )
        if self.rank == 0 and metrics:
            send(self._mailbox, {"run": self._name, "metrics": dict(metrics), "machine": of_machine(self.device)})
        if self._stopping:
            raise StoppedError

    def _next_name(self) -> str:
        """On rank 0, whose names the other workers take."""
        stored = [place.name for place in stored_checkpoints(self._storage)[:1]] if not self._newest else []
        self._newest = next_name(self._newest or next(iter(stored), None))
        return self._newest

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copy to the storage; a checkpoint appears there whole or not at all. In a thread of its own, if training goes on."""
        try:
            self._put(Path(checkpoint.path), self._storage / name)
        except (OSError, DmatRayError) as error:
            shutil.rmtree(checkpoint.path, ignore_errors=True)  # Ray removes what was uploaded, and nobody the rest
            if not isinstance(error, DmatRayError) and not is_full(error):
                raise
            told: Exception = StorageError(str(error).replace(OF_AMAZON, "AWS ")) if isinstance(error, StorageError) else error
            if not isinstance(error, DmatRayError):
                told = UserError(no_space(error, f"'{self._storage}'", self.checkpoints()))
            if isinstance(told, UserError):  # else the group is started anew, from the last one that was stored
                ray.get(ray.get_actor(self._mailbox).put_user_error.remote(told))
            raise told from error
        finally:
            self._uploading = False
        return ray.train.Checkpoint((self._storage / name).key, self._filesystem)

    def _put(self, folder: Path, place: Location) -> None:
        tried_again(lambda: put(folder, place), UPLOAD_PAUSES_S, self.say)

    def checkpoints(self) -> Sequence[str]:
        """See RunContext. The storage is asked, for Ray tells only the worker that wrote one; it names them in order."""
        return [str(place) for place in stored_checkpoints(self._storage)]

    def preempted(self) -> bool:
        """See RunContext: true once for each machine; Ray Train starts anew from the latest checkpoint when it comes to that.

        Also true once the driver was asked to stop: the report that follows is the last, and raises StoppedError.
        """
        stop = torch.tensor(float(self.rank == 0 and is_stopping(self._mailbox)), device=self.device)
        self.average_([stop])
        if stop > 0:
            self._stopping = True
            return True
        info = ray.train.get_preemption_info()  # of all machines that are to go; rank 0's, on all workers
        before, self._leaving = self._leaving, set(info.preempted_ranks) if info is not None else set()
        return not self._leaving <= before

    def say(self, text: str) -> None:
        """To the driver."""
        if self.rank == 0:
            send(self._mailbox, {"run": self._name, "text": text})
