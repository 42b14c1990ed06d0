"""What a setting of a search may be: domains of ray.tune, weights on a simplex, multiples of what it is without the search."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized, Uniform

from dmat_ray.errors import UserError


@dataclass(frozen=True)
class Simplex:
    """Weights that are at least `least` each and sum to `total`, uniformly."""

    total: float = 1.0
    least: float = 0.0


def simplex(total: float = 1.0, least: float = 0.0) -> Simplex:
    """The domain of a tuple of settings, such as the weights of an objective's terms."""
    return Simplex(total, least)


@dataclass(frozen=True)
class Times:
    """From `low` to `high` times what a setting is, evenly on a logarithmic scale."""

    low: float
    high: float


def times(low: float, high: float) -> Times:
    """The domain of a number, relative to its value in the settings that the search starts from."""
    return Times(low, high)


def ends(key: str, domain: Domain) -> tuple[Any, ...]:
    """The least and the largest value, or all of a choice. Raises UserError for a domain without ends."""
    if isinstance(domain, Categorical):
        return tuple(domain.categories)
    sampler = domain.get_sampler()
    quantized = isinstance(sampler, Quantized)
    inner = sampler.sampler if quantized else sampler
    if not isinstance(domain, Float | Integer) or not isinstance(inner, Uniform | LogUniform):
        raise UserError(f"{key}: a domain needs two ends or a list of choices; use tune.uniform, loguniform, randint or choice")
    if isinstance(domain, Integer):
        return int(domain.lower), int(domain.upper) - (0 if quantized else 1)
    return float(domain.lower), float(domain.upper)


def on_step(domain: Domain, value: float) -> float:
    """The nearest multiple of the step that a quantized domain has; of any other the value."""
    sampler = domain.get_sampler()
    return round(value / sampler.q) * sampler.q if isinstance(sampler, Quantized) else value


def is_stepped_log(domain: Domain) -> bool:
    """Whether it is one of multiples of a step on a logarithmic scale."""
    sampler = domain.get_sampler()
    return isinstance(sampler, Quantized) and isinstance(sampler.sampler, LogUniform)


def told(domain: Domain) -> str:
    """In words, for a user."""
    found, sampler = ends("", domain), domain.get_sampler()
    if isinstance(domain, Categorical):
        return f"one of {', '.join(map(str, found))}"
    step = f", multiples of {sampler.q:g}" if isinstance(sampler, Quantized) else ""
    inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
    scale = ", evenly on a logarithmic scale" if isinstance(inner, LogUniform) else ""
    whole = "whole numbers " if isinstance(domain, Integer) else ""
    return f"{whole}from {found[0]:g} to {found[1]:g}{step}{scale}"


def described(domain: Domain) -> str:
    """A text that differs for domains that differ."""
    sampler = domain.get_sampler()
    step = f" q {sampler.q:g}" if isinstance(sampler, Quantized) else ""
    inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
    return f"{type(domain).__name__} {type(inner).__name__.strip('_')} {list(ends('', domain))}{step}"


def grid(domain: Domain, points: int) -> list[Any]:
    """Values from end to end, evenly apart as the domain measures it."""
    found = ends("", domain)
    if isinstance(domain, Categorical):
        return list(found)
    sampler = domain.get_sampler()
    inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
    spread: Callable[..., np.ndarray] = np.geomspace if isinstance(inner, LogUniform) else np.linspace
    values = spread(*found, points)
    if isinstance(sampler, Quantized):
        values = np.round(values / sampler.q) * sampler.q
    if isinstance(domain, Integer):
        return [int(v) for v in dict.fromkeys(np.round(values).astype(int).tolist())]
    return [float(f"{v:.6g}") for v in dict.fromkeys(values.tolist())]


def lattice(keys: tuple[str, ...], domain: Simplex, points: int) -> list[list[float]]:
    """All points of a simplex whose shares are multiples of 1 / (points - 1)."""
    steps, room = points - 1, domain.total - len(keys) * domain.least
    found = (c for c in itertools.product(range(steps + 1), repeat=len(keys)) if sum(c) == steps)
    return [[domain.least + room * part / steps for part in c] for c in found]


def share(key: str) -> str:
    """What is drawn for a setting on a simplex."""
    return f"share of {key}"


def broken(keys: tuple[str, ...], domain: Simplex, sample: Mapping[str, Any]) -> list[float]:
    """Breaks a stick: with uniform shares the weights are uniform on the simplex (each piece is Beta(1, pieces left))."""
    left, weights = domain.total - len(keys) * domain.least, []
    for number, key in enumerate(keys[:-1]):
        piece = left * (1.0 - math.pow(1.0 - float(sample[share(key)]), 1.0 / (len(keys) - 1 - number)))
        weights.append(domain.least + piece)
        left -= piece
    return [*weights, domain.least + left]


def python(value: Any) -> Any:
    """A plain value of what may be numpy's."""
    return value.item() if isinstance(value, np.generic) else value
