"""Types that cross rooms: the batch, and the protocols of generator, threat and run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmat_ray.positions import Index, positions
from dmat_ray.rng import Draws


@dataclass(frozen=True)
class Batch:
    """Examples: `id` (B), `x_BCHW` float in [0, 1], `y_B` int64, and `w_BLD` with g(w) = x where it is known."""

    id: Sequence[str]
    x_BCHW: Tensor
    y_B: Tensor
    w_BLD: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        w = None if self.w_BLD is None else self.w_BLD.to(device)
        return Batch(self.id, self.x_BCHW.to(device), self.y_B.to(device), w)

    def take(self, index: Index) -> "Batch":
        """Some of the examples, by their positions or by a mask. Raises UserError for a mask of another length."""
        where = positions(index, len(self))
        rows_N = torch.from_numpy(where)
        w = None if self.w_BLD is None else self.w_BLD[rows_N]
        return Batch([self.id[i] for i in where], self.x_BCHW[rows_N], self.y_B[rows_N], w)

    def __len__(self) -> int:
        return len(self.id)


class Generator(Protocol):
    """A map from W+ to images whose range stands for the image manifold."""

    z_dim: int
    w_dim: int
    num_ws: int
    resolution: int
    channels: int
    w_mean: Tensor
    w_std: Tensor

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """z ~ N(0, 1) -> w_BLD."""

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        """w_BLD -> x_BCHW, in [0, 1] unless `clamp` is False."""


class Threat(Protocol):
    """A way to render a batch under a parameter theta that may move only so far."""

    def start(self, batch: Batch, draws: Draws | None) -> Tensor:
        """First theta, batch first: random inside the budget, or with draws=None the one closest to no change."""

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        """x_BCHW in [0, 1], differentiable in theta."""

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """The step of unit length in the threat's norm along which the loss rises most."""

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """theta back inside its ball or box, and where it says so to the closest point there."""

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """How far what is searched of theta has gone, per example: at most `limit`, in its units."""

    @property
    def limit(self) -> float:
        """The largest `distance` that the threat allows: `eps` of balls, 1 where theta is a share of the budget."""

    @property
    def span(self) -> float:
        """The largest distance of two thetas that the threat allows, along one coordinate."""

    @property
    def default_step(self) -> float | None:
        """Step size the threat's source prescribes per sqrt-step, or None for 2.5 limit / steps."""


class Query(NamedTuple):
    """What a theta did to the network, per example: the loss that is to be raised, its gradient to theta (empty for a search that
    needs none), and whether the image is misclassified.
    """

    loss_B: Tensor
    gradient: Tensor
    broken_B: Tensor


@runtime_checkable
class Measured(Threat, Protocol):
    """A threat whose steps have a length, for searches that leave the budget and come back: its `distance` must grow from 0 at no
    change and be differentiable in theta.
    """

    def length(self, batch: Batch, theta: Tensor, move: Tensor) -> Tensor:
        """How far, per example and in the units of `distance`, a step `move` leads away from theta."""


class RunContext(Protocol):
    """Where a training loop runs: one process, torchrun, a Ray Train worker, or the process that Ray Tune gives a trial. The loop
    knows no more than this.
    """

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module as trained here: itself for one worker, under DistributedDataParallel for several."""

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all workers, in place."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        """Hand over metrics, already the same on all workers, and on rank 0 a finished checkpoint folder, which is taken.

        With `wait` it returns when the checkpoint is where it will be kept. All workers must call it.
        """

    def checkpoints(self) -> Sequence[Path | str]:
        """The checkpoints that are kept, newest first: the first is the one to go on from, unless it is damaged.

        Folders of this machine, or URLs of an object store.
        """

    def preempted(self) -> bool:
        """True if this machine will soon be taken away. All workers must ask, and all get the same answer."""

    def say(self, text: str) -> None:
        """A line for the user, from rank 0."""
