"""What the layouts of foreign checkpoints share: a table of names, and the shape of a network from those of its tensors.

A layout (see `layouts_stylegan1`, `layouts_stylegan2`) takes the tensors of one network by their foreign names, says by
which of ours they go, and what makes ours of each; `foreign` does the rest.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.formats.stored import Stored, shown

Turn = Callable[[Tensor], Tensor]
Tensors = dict[str, Stored]
Part = tuple[str, Turn]  # their name, and what makes ours of theirs
Rows = dict[str, Part]  # by our name
LARGEST = 1024
MAX_FILTERS, MAX_FILTER = 100, 1 << 20  # and bytes of one: of each channel 3x3 numbers


@dataclass
class Draft:
    """A network on its way to ours: `rows` names its tensors; `random` are those that its file lacks, drawn anew."""

    kind: str
    architecture: dict[str, Any]
    rows: Rows
    random: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def same(x: Tensor) -> Tensor:
    return x


def square(x: Tensor) -> Tensor:
    """(1, 1, R, R) -> (R, R)."""
    return x.reshape(x.shape[-2:])


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first few of many names, and how many there are."""
    printed = sorted(map(shown, names))
    more = f" and {len(printed) - most} more" if len(printed) > most else ""
    return ", ".join(printed[:most]) + more


def check_names(tensors: Tensors, rows: Rows, harmless: str, optional: tuple[str, ...] = ()) -> None:
    """Drop optional rows whose tensor is not there. Raises UserError for tensors that lack or that nothing is known of."""
    for ours in optional:
        if ours in rows and rows[ours][0] not in tensors:
            del rows[ours]
    needed = {theirs for theirs, _ in rows.values()}
    if missing := needed - tensors.keys():
        raise UserError(f"lacks {len(missing)} of {len(needed)} tensors: {listed(missing)}")
    if extra := [name for name in tensors.keys() - needed if not re.fullmatch(harmless, name)]:
        raise UserError(f"holds {len(extra)} tensor(s) that this kind of generator has not: {listed(extra)}")


def check_filters(tensors: Tensors, pattern: str, taps: list[float]) -> None:
    """Raise UserError unless every tensor of that name is the separable filter `taps`, whatever its gain."""
    wanted = torch.tensor(taps).outer(torch.tensor(taps)) / sum(taps) ** 2
    filters = {name: stored for name, stored in tensors.items() if re.fullmatch(pattern, name)}
    if len(filters) > MAX_FILTERS or any(stored.nbytes > MAX_FILTER for stored in filters.values()):
        raise UserError(f"holds more or larger filters than any generator: {listed(filters)}")
    for name, stored in filters.items():
        found = stored.read().float()
        if stored.shape[-2:] == tuple(wanted.shape):
            found = found.reshape(-1, *wanted.shape)
            found = found / found.sum(dim=(1, 2), keepdim=True)
        if found.shape[1:] != wanted.shape or not torch.allclose(found, wanted.expand_as(found), atol=1e-4):
            raise UserError(f"resamples with another filter than {taps}: {shown(name)}")


def count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number in the names that match."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name)) and len(match[1]) < 5]
    return 1 + max(numbers, default=-1)


def check_resolution(resolution: int) -> list[int]:
    """4, 8, ... up to it; raises UserError for one that no StyleGAN has."""
    if resolution & (resolution - 1) or not 8 <= resolution <= LARGEST:
        found = f"layers for images of size {shown(resolution)}" if resolution >= 4 else "no known synthesis layers"
        raise UserError(f"has {found}; the known sizes are 8, 16, ... {LARGEST}")
    return [2**k for k in range(2, resolution.bit_length())]


def widths(found: dict[int, int]) -> dict[str, int]:
    """channel_base and channel_max that give these feature channels at these resolutions.

    Raises UserError if no two numbers do: min(base // resolution, max) is the only rule that is known.
    """
    largest = max(found.values())
    free = {r: c for r, c in found.items() if c < largest}
    low = max([r * c for r, c in found.items()])
    high = min([r * (c + 1) - 1 for r, c in free.items()], default=low)
    if low > high or largest < 1:
        text = ", ".join(f"{r}: {c}" for r, c in found.items())
        raise UserError(f"has feature channels that follow no min(base / resolution, max): {text}")
    return {"channel_base": low, "channel_max": largest}


def mapping(tensors: Tensors, weights: list[str]) -> dict[str, Any]:
    """Sizes of the mapping network, from its weights (out, in)."""
    shapes = [tensors[name].shape for name in weights]
    for name, shape in zip(weights, shapes, strict=True):
        if len(shape) != 2:
            raise UserError(f"tensor '{name}' of shape {shape} is no matrix")
    inner = shapes[0][0] if len(shapes) > 1 and shapes[0][0] != shapes[-1][0] else None
    return {"z_dim": shapes[0][1], "w_dim": shapes[-1][0], "mapping_layers": len(weights), "mapping_width": inner}


def number(value: object, what: str) -> float | None:
    """A setting that is a number or None; raises UserError for anything else."""
    if value is not None and not isinstance(value, int | float):
        raise UserError(f"has {what} {shown(value)}, which is no number")
    return value


def axis(tensors: Tensors, name: str, index: int) -> int:
    """One axis of a tensor; raises UserError if it has no such axis."""
    shape = tensors[name].shape
    if not -len(shape) <= index < len(shape):
        raise UserError(f"tensor '{name}' of shape {shape} has too few axes")
    return shape[index]
