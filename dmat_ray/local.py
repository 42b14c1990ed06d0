"""RunContext without ray: one process, or several under torchrun."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
    return module if world_size == 1 else DistributedDataParallel(module, broadcast_buffers=False)


class LocalContext:
    """Runs a training loop here. Checkpoints go to `folder/checkpoint`, metrics to `on_report`."""

    def __init__(self, folder: Path, on_report: Callable[[Mapping[str, float]], None] | None = None) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
        self._checkpoint = folder / "checkpoint"
        self._on_report = on_report

    def wrap(self, module: nn.Module) -> nn.Module:
        """See RunContext."""
        return wrap_ddp(module, self.world_size)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See RunContext."""
        average_over_workers_(tensors, self.world_size)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Keep the checkpoint in place of the one before, then call `on_report` on rank 0."""
        if checkpoint is not None:
            fresh = self._checkpoint.with_name("checkpoint.partial")
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(checkpoint, fresh)
            shutil.rmtree(self._checkpoint, ignore_errors=True)
            fresh.rename(self._checkpoint)
        if self._on_report is not None and self.rank == 0:
            self._on_report(metrics)

    def latest_checkpoint(self) -> Path | None:
        """See RunContext."""
        return self._checkpoint if self._checkpoint.is_dir() else None
