"""Where a training's batches come from: a split in memory, or a stream of the same shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dmat_ray.config import TrainingConfig
from dmat_ray.data.manifold_set import ManifoldSet, epoch_batches
from dmat_ray.errors import UserError
from dmat_ray.types import Batch


@dataclass(frozen=True)
class Done:
    """What has been trained of an epoch: `steps`, by how many workers, and where that does not say it all, which examples."""

    steps: int = 0
    world_size: int = 1
    seen_N: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `Done(**state)` is equal."""
        return {"steps": self.steps, "world_size": self.world_size, "seen_N": self.seen_N}


NOTHING = Done()


class EpochSource(Protocol):
    """The training split of an on-manifold set, as epochs of batches. The validation examples are not among them."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The set's manifest."""

    @property
    def size(self) -> int:
        """Examples of an epoch, over all workers."""

    def held_out(self, rank: int, world_size: int) -> ManifoldSet | None:
        """This worker's part of the validation examples, every `world_size`-th, which may be empty; None if there are none."""

    def batches(self, epoch: int, rank: int, world_size: int, done: Done = NOTHING) -> Iterator[Batch]:
        """This worker's part of every global batch of an epoch that is left; all workers have as many, of equal sizes."""

    def seen(self) -> Tensor | None:
        """This worker's examples of the epoch so far, 1 or 0 for each in the order of ids; None if `Done.steps` says it all."""


def held_out_positions(size: int, config: TrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Positions, among the usable training examples sorted by id, of those trained on and of those held out.

    A seeded choice, the same for every worker and resume. Raises UserError if nothing would be left to train on.
    """
    if config.val_examples >= size:
        raise UserError(
            f"training.val_examples is {config.val_examples}, but the training split has {size} usable images (those that were "
            "projected poorly are left out: projection.poor_l1); give a smaller --training.val_examples, 0 to hold out none"
        )
    order = np.random.default_rng([config.seed, 1]).permutation(size)
    return np.sort(order[config.val_examples :]), np.sort(order[: config.val_examples])


@dataclass(frozen=True)
class InMemory:
    """An EpochSource over a split that is wholly in this process."""

    data: ManifoldSet
    config: TrainingConfig

    @property
    def manifest(self) -> dict[str, Any]:
        """See EpochSource."""
        return self.data.manifest

    @property
    def size(self) -> int:
        """See EpochSource."""
        return len(held_out_positions(len(self.data), self.config)[0])

    def held_out(self, rank: int, world_size: int) -> ManifoldSet | None:
        """See EpochSource."""
        positions = held_out_positions(len(self.data), self.config)[1]
        return self.data.take(positions[rank::world_size]) if len(positions) else None

    def batches(self, epoch: int, rank: int, world_size: int, done: Done = NOTHING) -> Iterator[Batch]:
        """See EpochSource: the global order depends on (seed, epoch) alone."""
        return epoch_batches(
            self.data,
            held_out_positions(len(self.data), self.config)[0],
            images=self.config.images,
            batch_size=self.config.batch_size,
            epoch=epoch,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            first_step=done.steps,
        )

    def seen(self) -> None:
        """See EpochSource: any number of workers goes through the same batches in the same order."""
        return None
