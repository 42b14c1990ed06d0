"""What the evaluation's page shows of methods that were trained with several seeds: means over trainings, and differences."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dmat_ray.evaluation.intervals import Estimate, points
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models.methods import Method
from dmat_ray.reports.columns import SET_NAMES
from dmat_ray.reports.report_values import MOST_COMPARED

MEANS = (
    "The mean over trainings ± the half of its 95 % interval, which covers the draw of test images and that of trainings "
    "(Student's t, Satterthwaite 1946); of one training it is of images alone (Wilson)."
)
COMPARED = (
    "By how many percentage points, with 95 % intervals over images and trainings, and Student's p; with a plus the method that "
    "is named first is right more often. Trainings are pairs by their seeds where one method has all seeds of the other, else "
    "not paired. Bold is what excludes 0, as about one in twenty does by chance alone."
)


@dataclass(frozen=True)
class Compared:
    """The difference of two methods in every column, of so many trainings."""

    first: str
    second: str
    trainings: str
    cells: dict[str, Estimate]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.first} − {self.second}"


@dataclass(frozen=True)
class MethodTable:
    """Means over trainings on one test set, and differences of methods with several; `best` has the largest of each column."""

    set_name: str
    count: int
    columns: list[str]
    methods: list[Method]
    cells: dict[tuple[str, str], Estimate]
    best: dict[str, str]
    differences: list[Compared]

    @property
    def title(self) -> str:
        """For people."""
        return f"By method: mean accuracy (%) over trainings, on {self.count} {SET_NAMES[self.set_name]}"

    @property
    def explained(self) -> str:
        """What the numbers are, and of which models."""
        every = [f"{m.name} ({', '.join(m.models)})" for m in self.methods if len(m.trainings) > 1]
        few = any(len(m.trainings) == 2 for m in self.methods)
        told = " Two trainings tell very little of how far trainings differ." if few else ""
        return f"{MEANS}{told} Trainings of one method differ in training.seed alone: {'; '.join(every)}."

    @property
    def compared(self) -> str:
        """What the differences are."""
        left = [m.name for m in self.methods if len(m.trainings) == 1]
        return f"{COMPARED} Of one training, and not compared here: {', '.join(left)}." if left else COMPARED

    def is_best(self, method: str, column: str) -> bool:
        """Whether no other of several methods has a larger number."""
        return len(self.methods) > 1 and _value(self.cells[method, column]) == self.best[column]


def _value(found: Estimate) -> str:
    return f"{points(found.value):.1f}"


def tables(results: Results, methods: Sequence[Method]) -> dict[str, MethodTable]:
    """Test set -> its table; none if no method has two trainings, nor of a set of a single image, which has no spread."""
    if max(len(method.trainings) for method in methods) < 2:
        return {}
    first = methods[0].models[0]
    return {s: _table(results, list(methods), s) for s in results.config.sets if len(results.ids(first, s)) > 1}


def _table(results: Results, methods: list[Method], set_name: str) -> MethodTable:
    columns = results.means(set_name)
    cells = {(m.name, c): results.over_trainings(m.models, set_name, c) for m in methods for c in columns}
    best = {c: _value(max((cells[m.name, c] for m in methods), key=lambda found: found.value)) for c in columns}
    several = [method for method in methods if len(method.trainings) > 1]
    pairs = [(b, a) for a, b in itertools.combinations(several, 2)]
    if len(several) > MOST_COMPARED:
        pairs = [(method, several[0]) for method in several[1:]]
    differences = [_difference(results, *pair, set_name, columns) for pair in pairs]
    count = len(results.ids(methods[0].models[0], set_name))
    return MethodTable(set_name, count, columns, methods, cells, best, differences)


def _difference(results: Results, first: Method, second: Method, set_name: str, columns: Sequence[str]) -> Compared:
    seeds = first.seeds_shared(second)
    one, other = ([side.trainings[seed] for seed in seeds or side.trainings] for side in (first, second))
    told = f"{len(seeds)} pairs" if seeds else f"{len(one)} and {len(other)}, not paired"
    cells = {c: results.difference_over_trainings(one, other, set_name, c, paired=bool(seeds)) for c in columns}
    return Compared(first.name, second.name, told, cells)
