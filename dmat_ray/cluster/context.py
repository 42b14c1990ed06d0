"""RunContext inside a Ray Train worker."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray.train
import ray.train.torch
from torch import Tensor, nn

from dmat_ray.cluster.events import send
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
