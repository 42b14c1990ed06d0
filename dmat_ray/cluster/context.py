"""RunContext inside a Ray Train worker."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from dmat_ray.cluster.events import send
from dmat_ray.errors import UserError
from dmat_ray.local import average_over_workers_, wrap_ddp


class RayContext:
    """Reports to Ray Train, which persists checkpoints, and sends rank 0's metrics to the driver's mailbox.

    Several runs may share one worker group, one after the other: `name` says whose checkpoint is whose.
    """

    def __init__(self, name: str, mailbox: str) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._name, self._mailbox = name, mailbox

    def wrap(self, module: nn.Module) -> nn.Module:
        """See RunContext."""
        return wrap_ddp(module, self.world_size)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See RunContext."""
        average_over_workers_(tensors, self.world_size)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """See RunContext."""
        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint))
        ray.train.report(dict(metrics), checkpoint=kept)
        if self.rank == 0:
            send(self._mailbox, {"run": self._name, "metrics": dict(metrics)})

    def latest_checkpoint(self) -> Path | None:
        """See RunContext."""
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.to_directory())


def device_of_actor() -> torch.device:
    """The GPU that Ray gave this actor, or the CPU if none was asked for.

    Raises UserError if torch cannot use the GPU: a cluster that is paid for its GPUs must not compute on CPUs unnoticed.
    `DMAT_RAY_LOGICAL_GPUS=1` allows it, for clusters whose GPUs are only said to be there.
    """
    if not ray.get_gpu_ids():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("DMAT_RAY_LOGICAL_GPUS") == "1":
        return torch.device("cpu")
    raise UserError(
        f"Ray gave this actor on {platform.node()} a GPU, but torch {torch.__version__} finds none there (driver, or a torch "
        "without CUDA?); set cluster.gpus_per_worker 0 to compute on CPUs"
    )
