"""The state of the images that are optimised together: one slot each, reserved once and used again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmat_ray.config import ProjectionConfig
from dmat_ray.types import Generator


@dataclass
class Slots:
    """Tensors whose first axis is the slot. The first `len(index)` slots are in use, for the images of those numbers."""

    target: Tensor
    w: Tensor
    best_w: Tensor
    m: Tensor
    v: Tensor
    key: Tensor  # of an image's noise
    position: Tensor  # in the schedule
    updates: Tensor  # of w so far
    best: Tensor  # loss of best_w, once one was evaluated without noise
    lowest: Tensor  # loss so far, noise or not
    history: Tensor  # `lowest` of the last stop_window steps, by updates modulo their number
    done: Tensor
    given_up: Tensor  # done because the loss or its gradient was not finite
    features: list[Tensor] = field(default_factory=list)
    index: list[int] = field(default_factory=list)

    @classmethod
    def reserve(cls, config: ProjectionConfig, generator: Generator, features: list[Tensor], device: torch.device) -> "Slots":
        """Empty slots for `config.batch_size` images; `features` is an example of what is kept of a target."""
        size, side = config.batch_size, generator.resolution

        def whole(count: int = 0) -> Tensor:
            return torch.zeros(size, *([count] if count else []), dtype=torch.int64, device=device)

        def zeros(*shape: int, like: Tensor | None = None) -> Tensor:
            dtype = generator.w_mean.dtype if like is None else like.dtype
            value = torch.zeros(size, *shape, dtype=dtype, device=device)
            return value.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else value

        code = (generator.num_ws, generator.w_dim)
        return cls(
            target=zeros(generator.channels, side, side),
            w=zeros(*code),
            best_w=zeros(*code),
            m=zeros(*code),
            v=zeros(*code),
            key=whole(),
            position=whole(),
            updates=whole(),
            best=zeros(),
            lowest=zeros(),
            history=zeros(max(1, config.stop_window)),
            done=torch.ones(size, dtype=torch.bool, device=device),
            given_up=torch.zeros(size, dtype=torch.bool, device=device),
            features=[zeros(*f.shape[1:], like=f) for f in features],
        )

    @property
    def size(self) -> int:
        """Slots in all."""
        return self.w.shape[0]

    def tensors(self) -> list[Tensor]:
        """All that moves when an image changes its slot."""
        parts = [self.target, self.w, self.best_w, self.m, self.v, self.key, self.position, self.updates]
        return [*parts, self.best, self.lowest, self.history, self.done, self.given_up, *self.features]

    def fill(self, index: list[int], x: Tensor, features: list[Tensor], w: Tensor, key: Tensor) -> None:
        """Put new images, with their targets and first w, behind those in use."""
        new = slice(len(self.index), len(self.index) + len(index))
        self.target[new], self.w[new], self.best_w[new], self.key[new] = x, w, w, key
        for mine, given in zip(self.features, features, strict=True):
            mine[new] = given
        for state in (self.m, self.v, self.position, self.updates):
            state[new] = 0
        for state in (self.best, self.lowest, self.history):
            state[new] = torch.inf
        self.done[new] = self.given_up[new] = False
        self.index += index

    def drop(self, rows: list[int]) -> None:
        """Free these slots; the last of those in use move into the gaps."""
        left, freed = len(self.index) - len(rows), set(rows)
        gaps = [row for row in rows if row < left]
        movers = [row for row in range(left, len(self.index)) if row not in freed]
        for gap, mover in zip(gaps, movers, strict=True):
            for tensor in self.tensors():
                tensor[gap] = tensor[mover]
            self.index[gap] = self.index[mover]
        del self.index[left:]
        self.done[left:] = True
