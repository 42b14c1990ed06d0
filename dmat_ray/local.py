"""RunContext without ray: one process, or several under torchrun."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dmat_ray.errors import UserError
from dmat_ray.models.checkpoint import is_whole
from dmat_ray.storage.files import make_lasting
from dmat_ray.storage.folders import copy_files
from dmat_ray.wording import number_of

# what torch 2.13 deprecates and what it puts in its place, which differ in whether buffers, equal here, are sent once at first
_ARGUMENTS = signature(DistributedDataParallel.__init__).parameters
_NO_BROADCASTS: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False}


def average_over_workers_(tensors: Sequence[Tensor], world_size: int) -> None:
    """Mean over all processes of the default group, in place; one flat message for each dtype."""
    if world_size == 1:
        return
    # in the order of the tensors: a set's order would differ between processes, and they would wait for each other
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        flat /= world_size
        for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            t.copy_(part.view_as(t))


def wrap_ddp(module: nn.Module, world_size: int) -> nn.Module:
    """DDP without buffer broadcasts: two forwards a step with batch norm would otherwise trip over each other."""
    return module if world_size == 1 else DistributedDataParallel(module, **_NO_BROADCASTS)


def _device() -> torch.device:
    """The GPU that torchrun gives this process, made the current one; else that which is current; the CPU where there is none.

    Raises UserError where torchrun starts more processes than there are GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if (local_rank := os.environ.get("LOCAL_RANK")) is None:
        return torch.device("cuda", torch.cuda.current_device())
    if int(local_rank) >= (count := torch.cuda.device_count()):
        raise UserError(
            f"torchrun started process {int(local_rank) + 1} on a machine with {number_of(count, 'GPU')}; give --nproc-per-node "
            "the number of GPUs, or hide them with CUDA_VISIBLE_DEVICES="
        )
    device = torch.device("cuda", int(local_rank))
    torch.cuda.set_device(device)
    return device


class LocalContext:
    """Runs a training loop here. Metrics go to `on_report`, checkpoints to `folder/checkpoint`, the one before to `.before`."""

    def __init__(self, folder: Path, on_report: Callable[[Mapping[str, float]], None] | None = None) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = _device()  # first: a process without one would leave the others waiting for it
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self._checkpoint = folder / "checkpoint"
        self._sure = False  # whether what lies there is whole: of an earlier process it may not be
        self._on_report = on_report
        self._told_to_stop, self._stopping = False, False

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Inside, a SIGTERM makes the loop write a checkpoint, and then ends the process with exit code 143.

        One that came too late for that is sent again at the end, to whoever handled it before.
        """

        def note(number: int, frame: object) -> None:
            self._told_to_stop = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: of no Python code
        if self._told_to_stop and not self._stopping:  # an error tells more than the signal
            os.kill(os.getpid(), signal.SIGTERM)

    def wrap(self, module: nn.Module) -> nn.Module:
        """See RunContext."""
        return wrap_ddp(module, self.world_size)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See RunContext."""
        average_over_workers_(tensors, self.world_size)

    @property
    def _before(self) -> Path:
        return self._checkpoint.with_name(f"{self._checkpoint.name}.before")

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        """Keep the checkpoint, then call `on_report` on rank 0."""
        if checkpoint is not None:
            fresh = self._checkpoint.with_name(f"{self._checkpoint.name}.partial")
            shutil.rmtree(fresh, ignore_errors=True)
            copy_files(checkpoint, fresh)
            make_lasting(fresh)  # or a machine that goes down soon could take this one and the one before with it
            shutil.rmtree(checkpoint)
            if self._checkpoint.is_dir() and not (self._sure or is_whole(self._checkpoint)):
                shutil.rmtree(self._checkpoint)  # the training went on from the one before, which stays
            if self._checkpoint.is_dir():
                shutil.rmtree(self._before, ignore_errors=True)
                self._checkpoint.rename(self._before)
            fresh.rename(self._checkpoint)
            self._sure = True
        if self._on_report is not None and self.rank == 0 and metrics:
            self._on_report(metrics)
        if self._stopping:
            self.say(f"asked to stop: the same command goes on from the checkpoint in '{self._checkpoint}'")
            raise SystemExit(128 + signal.SIGTERM)

    def checkpoints(self) -> Sequence[Path]:
        """See RunContext."""
        return [folder for folder in (self._checkpoint, self._before) if folder.is_dir()]

    def preempted(self) -> bool:
        """True once any of the processes was sent SIGTERM; the report that follows is the last."""
        told = torch.tensor(float(self._told_to_stop), device=self.device)
        self.average_([told])
        self._stopping = bool(told > 0)
        return self._stopping

    def say(self, text: str) -> None:
        """To standard error."""
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)
