"""Batch norm when a step has several terms: whose examples a layer takes its statistics from, and whose it keeps.

A classifier's batch-norm layers are `TermBatchNorm2d`, which equal torch's until told that a batch is made of several
terms' examples, one behind the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.errors import UserError


class TermBatchNorm2d(nn.BatchNorm2d):
    """In training each term's examples are normalised by their own statistics, as in a forward pass of their own.

    `terms` are the terms in the batch, each by its number, all of the same size. The running statistics move once for each
    term, in that order; after `keep_apart` every term has running statistics of its own.
    """

    terms: tuple[int, ...] = ()
    mean_TC: Tensor | None = None
    var_TC: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.terms):
            return super().forward(input)
        if len(self.terms) == 1:
            return self._normalised(input, self.terms[0])
        parts = zip(input.chunk(len(self.terms)), self.terms, strict=True)
        return torch.cat([self._normalised(part, term) for part, term in parts])

    def _normalised(self, x: Tensor, term: int) -> Tensor:
        if self.mean_TC is None or self.var_TC is None:
            return super().forward(x)
        assert self.momentum is not None  # `keep_apart` refuses it
        return F.batch_norm(x, self.mean_TC[term], self.var_TC[term], self.weight, self.bias, True, self.momentum, self.eps)

    def keep_apart(self, count: int) -> None:
        """From now on `count` terms have running statistics of their own, which start as the layer's are.

        Raises UserError for a layer without them, and for one whose are the mean of all batches, which no term counts.
        """
        if self.momentum is None:
            raise UserError(
                "objective.batch_norm per_term needs batch norm with a momentum, and this network's is None, the mean of all "
                "batches; give it one, such as 0.1, or use separate"
            )
        mean, var = self._running()
        self.mean_TC, self.var_TC = mean.repeat(count, 1), var.repeat(count, 1)

    @torch.no_grad()
    def show(self, terms: Sequence[int]) -> None:
        """Make the running statistics of these terms, or the mean of them, the layer's own."""
        if self.mean_TC is not None and self.var_TC is not None:
            mean, var = self._running()
            mean.copy_(self.mean_TC[list(terms)].mean(dim=0))
            var.copy_(self.var_TC[list(terms)].mean(dim=0))

    def _running(self) -> tuple[Tensor, Tensor]:
        if self.running_mean is None or self.running_var is None:
            raise UserError("objective.batch_norm per_term needs batch norm with running statistics")
        return self.running_mean, self.running_var


def prepare(network: nn.Module) -> nn.Module:
    """Make torch's plain batch-norm layers into TermBatchNorm2d, in place: same weights, same names, same output."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = TermBatchNorm2d
    return network


def layers(network: nn.Module) -> list[TermBatchNorm2d]:
    """The layers that know of terms."""
    return [module for module in network.modules() if isinstance(module, TermBatchNorm2d)]


def can_share_a_batch(network: nn.Module) -> bool:
    """True if terms may go through the network in one batch and come out as in passes of their own."""
    return all(isinstance(m, TermBatchNorm2d) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


@contextmanager
def terms_in_batch(network: nn.Module, terms: Sequence[int]) -> Iterator[None]:
    """Inside, a training batch is made of these terms' examples, one behind the other."""
    touched = layers(network)
    for layer in touched:
        layer.terms = tuple(terms)
    try:
        yield
    finally:
        for layer in touched:
            layer.terms = ()


@contextmanager
def unmoved(network: nn.Module) -> Iterator[None]:
    """Afterwards all buffers are as they were before: running statistics do not remember what happened inside."""
    # with their places: a forward pass may put a new tensor into one
    buffers = [(m, name, b) for m in network.modules() for name, b in m._buffers.items() if b is not None]
    before = [(tensor, tensor.clone()) for tensor in (*(b for _, _, b in buffers), *apart(network))]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(old)
        for module, name, tensor in buffers:
            module._buffers[name] = tensor


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norm uses its running statistics, and they do not move, though the network is in training mode."""
    moving = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in moving:
        layer.training = False
    try:
        yield
    finally:
        for layer in moving:
            layer.training = True


def keep_apart(network: nn.Module, count: int) -> None:
    """Give each of `count` terms running statistics of its own; raises UserError if a layer cannot."""
    if not can_share_a_batch(network):
        kind = next(type(m).__name__ for m in network.modules() if _is_foreign(m))
        raise UserError(f"objective.batch_norm per_term needs plain BatchNorm2d layers; this network has {kind}")
    for layer in layers(network):
        layer.keep_apart(count)


def _is_foreign(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, TermBatchNorm2d)


def show(network: nn.Module, terms: Sequence[int]) -> None:
    """Make the running statistics of these terms, or the mean of them, the network's own."""
    for layer in layers(network):
        layer.show(terms)


@torch.no_grad()
def restore(network: nn.Module, stored: Sequence[Tensor]) -> None:
    """Statistics that are kept apart become those of `apart` elsewhere; of another number of terms, each the layer's own."""
    mine = apart(network)
    if [tensor.shape for tensor in mine] == [tensor.shape for tensor in stored]:
        for tensor, old in zip(mine, stored, strict=True):
            tensor.copy_(old)
        return
    for layer in layers(network):
        if layer.mean_TC is not None:
            layer.keep_apart(len(layer.mean_TC))


def apart(network: nn.Module) -> list[Tensor]:
    """All statistics that are kept apart, to be averaged over workers or saved."""
    return [t for layer in layers(network) for t in (layer.mean_TC, layer.var_TC) if t is not None]
