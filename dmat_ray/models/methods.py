"""Which models are trainings of one method: what their run.json says made them is the same but for the seed."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dmat_ray.models import trained_settings

# between a method and the number of its training, as in dmat-0, dmat_seed1
SEPARATOR = re.compile(r"(?:[-_]+seed)?[-_]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Method:
    """A method by its name, and its models by their seeds, in the order of these; one of a single model has that one's name."""

    name: str
    trainings: dict[int, str]

    @property
    def models(self) -> list[str]:
        """Those that are trainings of it."""
        return list(self.trainings.values())

    def seeds_shared(self, other: "Method") -> list[int]:
        """By which the trainings of two methods are pairs: all those of the one that has fewer, two at least; else none."""
        both = [seed for seed in self.trainings if seed in other.trainings]
        return both if len(both) == min(len(self.trainings), len(other.trainings)) >= 2 else []


def among(runs: Mapping[str, Mapping[str, Any]]) -> list[Method]:
    """The methods of models by name, given their run.json, each once and in the order of its first model.

    A model that was imported, or whose training is not finished, or whose seed another of the same settings has, is a method of
    its own. Methods have the common part of their models' names, or all of these where that is none or another's.
    """
    found: dict[str, dict[int, str]] = {}
    for model, run in runs.items():
        key, seed = json.dumps(trained_settings.but_for_seed(run), sort_keys=True), trained_settings.seed_of(run)
        if not (run.get("set_sha256") and run.get("finished")) or seed in found.get(key, ()):
            key = f"{model}: {key}"
        found.setdefault(key, {})[seed] = model
    named = [(_common(list(models.values())), dict(sorted(models.items()))) for models in found.values()]
    taken = Counter(name for name, _ in named)
    return [Method(name if name and taken[name] == 1 else ", ".join(models.values()), models) for name, models in named]


def _common(models: Sequence[str]) -> str:
    """What names begin with, without the number that tells them apart and what leads to it; the whole of one alone.

    Nothing where they part within a word or a number, as eps1.0 and eps1.5 do.
    """
    if len(models) == 1:
        return models[0]
    head = "".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*models, strict=False)))
    if any(name[len(head) : len(head) + 1].isdigit() for name in models):  # dmat-10, dmat-11
        head = head.rstrip("0123456789")
    rest = [name.removeprefix(head) for name in models]
    parted = head.endswith(("-", "_")) or all(not end or end[0] in "-_" for end in rest)
    numbered = head[-1:].isalpha() and all(not end or end.isdigit() for end in rest)
    return SEPARATOR.sub("", head) if parted or numbered else ""
