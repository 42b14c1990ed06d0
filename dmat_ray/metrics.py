"""Numbers from evaluation rows: accuracies with intervals, worst cases, means, curves over eps, transfer, confusion."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmat_ray.config import CleanRow, EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.units import applies, curve_name, group_of, rows_to_run
from dmat_ray.wording import did_you_mean


@dataclass(frozen=True)
class Accuracy:
    """A share with its 95 % interval; all in [0, 1]. Of means and UAR `count` is that of examples, the interval a bound."""

    value: float
    low: float
    high: float
    count: int


def wilson(correct: int, count: int, z: float = 1.959964) -> Accuracy:
    """Wilson score interval (Wilson 1927) of a proportion."""
    if count == 0:
        raise ValueError("no examples to take an accuracy of")
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Accuracy(p, max(0.0, centre - half), min(1.0, centre + half), count)


@dataclass(frozen=True)
class Difference:
    """How much more often one model is right than another on the same `count` examples, in [-1, 1], with its 95 % interval.

    `chance` is McNemar's exact two-sided p: how likely so uneven a split of the examples on which they differ would be if neither
    were better; None of means. All of it is about these models on such images, and not about trainings with other seeds.
    """

    value: float
    low: float
    high: float
    chance: float | None
    count: int


def paired(first_N: np.ndarray, second_N: np.ndarray, z: float = 1.959964) -> Difference:
    """The difference of the means of values in [0, 1], paired by example.

    The interval is Wald's with an example more on either side that only one is right on (Bonett and Price 2012, of shares), which
    keeps it honest for few examples and for none on which they differ. Raises ValueError if there are no examples.
    """
    moved = np.asarray(first_N, np.float64) - np.asarray(second_N, np.float64)
    if not len(moved):
        raise ValueError("no examples to compare models on")
    with_two = np.append(moved, [1.0, -1.0])
    middle, half = float(with_two.mean()), z * float(with_two.std()) / math.sqrt(len(with_two))
    better, worse = int((moved == 1).sum()), int((moved == -1).sum())
    shares = bool(np.isin(moved, (-1, 0, 1)).all())
    chance = _of_halves(min(better, worse), better + worse) if shares else None
    return Difference(float(moved.mean()), max(-1.0, middle - half), min(1.0, middle + half), chance, len(moved))


def _of_halves(fewer: int, count: int) -> float:
    """Twice the chance of at most so many heads in `count` throws of a coin, or 1."""
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - count * math.log(2)) for log in logs))


class Results:
    """Rows of an evaluation, example by example, and the columns that its settings make of them."""

    def __init__(self, rows: pa.Table, config: EvaluationConfig) -> None:
        self.rows, self.config, self.suite = rows, config, rows_to_run(config)
        self.clean = next(name for name, row in self.suite.items() if isinstance(row, CleanRow))
        self.groups: dict[str, list[str]] = {}
        self._of_groups: dict[tuple[str, str, str], np.ndarray] = {}  # what `correct` has found
        for name, row in self.suite.items():
            if group := group_of(row):
                self.groups.setdefault(group, []).append(name)

    @cached_property
    def models(self) -> list[str]:
        """All models that there are rows of."""
        return sorted(pc.unique(self.rows["model"]).to_pylist())

    @cached_property
    def _own(self) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
        """(model, set, attack) -> ids, sorted, and whether each was right, of attacks on the model itself."""
        return _split(self.rows.filter(pc.equal(self.rows["model"], self.rows["source"])))

    def ids(self, model: str, set_name: str) -> np.ndarray:
        """The examples of a test set."""
        return self._own[model, set_name, self.clean][0]

    def correct(self, model: str, set_name: str, name: str) -> np.ndarray:
        """For each example whether it is right under an attack, or under all of a group and on the clean image, (N) bool.

        Raises UserError for a row of a group, which did not meet every example: see `met`.
        """
        if name not in self.groups:
            self._require_whole(name)
            return self._own[model, set_name, name][1]
        if (model, set_name, name) not in self._of_groups:
            ids, standing = self._own[model, set_name, self.clean]
            for part in self.groups[name]:
                met, right = self.met(model, set_name, part)
                broken = pc.is_in(pa.array(ids, pa.string()), value_set=pa.array(met[~right], pa.string()))
                standing = standing & ~broken.to_numpy(zero_copy_only=False)
            self._of_groups[model, set_name, name] = standing
        return self._of_groups[model, set_name, name]

    def met(self, model: str, set_name: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the examples that a row of a group met, which may be none, and whether each was right."""
        return self._own.get((model, set_name, name), (np.array([], dtype=object), np.array([], dtype=bool)))

    def columns(self, set_name: str) -> list[str]:
        """What the table of a test set shows: rows, each group in place of its rows, and summaries."""
        shown: list[str] = []
        for row in self.config.attacks:
            name = group_of(row) or row.name
            if applies(row, set_name) and name not in shown:
                shown.append(name)
        return [*shown, *(s.name for s in self.config.summaries if any(self._parts(s.of, set_name)))]

    def _parts(self, of: Iterable[str], set_name: str) -> list[str]:
        """Those of some rows and groups that a test set has."""
        return [name for name in of if any(applies(self.suite[part], set_name) for part in self.groups.get(name, [name]))]

    def accuracy(self, model: str, set_name: str, column: str) -> Accuracy:
        """The number in a cell of the table. Raises UserError for a model, a test set or a column that there is not.

        A row of a group is no column.
        """
        self._require(model, set_name, column)
        summary = next((s for s in self.config.summaries if s.name == column), None)
        if summary is None:
            right = self.correct(model, set_name, column)
            return wilson(int(right.sum()), len(right))
        parts = self._parts(summary.of, set_name)
        if summary.how == "worst":
            standing = self.standing(model, set_name, parts)
            return wilson(int(standing.sum()), len(standing))
        found = [self.accuracy(model, set_name, part) for part in parts]
        divisor = float(len(parts))
        if summary.how == "uar":  # arXiv 1908.08016: 1 is as robust as training against each attack makes
            trained = dict(zip(summary.of, summary.trained, strict=True))
            divisor = sum(trained[part] for part in parts)
        middle, low, high = (sum(getattr(a, end) for a in found) / divisor for end in ("value", "low", "high"))
        return Accuracy(middle, low, high, found[0].count)

    def _require_whole(self, name: str) -> None:
        if name in self.suite and (group := group_of(self.suite[name])):
            raise UserError(f"'{name}' met only what the rows of its group before it left; ask for the group '{group}'")

    def _require(self, model: str, set_name: str, column: str) -> None:
        self._require_whole(column)
        if (model, set_name, column) in self._own:
            return
        columns = self.columns(set_name) if set_name in self.config.sets else []
        for what, name, known in (
            ("model", model, self.models), ("set", set_name, self.config.sets), ("column", column, columns)
        ):  # fmt: skip
            if name not in known:
                hint = did_you_mean(str(name), known)
                raise UserError(f"there is no {what} '{name}' in these results; {hint}choose from {', '.join(known)}")

    def per_example(self, model: str, set_name: str, column: str) -> np.ndarray:
        """(N) float64, whose mean is the number in a cell: 0 or 1, of a mean the share of its attacks that an example stood.

        Raises UserError for a row of a group, ValueError for a ratio of means.
        """
        summary = next((s for s in self.config.summaries if s.name == column), None)
        if summary is None:
            return self.correct(model, set_name, column).astype(np.float64)
        parts = self._parts(summary.of, set_name)
        if summary.how == "worst":
            return self.standing(model, set_name, parts).astype(np.float64)
        if summary.how == "uar":
            raise ValueError(f"'{column}' is a ratio of means, not a mean over examples")
        found: np.ndarray = np.mean([self.per_example(model, set_name, part) for part in parts], axis=0)
        return found

    def difference(self, first: str, second: str, set_name: str, column: str) -> Difference:
        """By how much the first model's number in a column is above the second's, on the same examples.

        Raises UserError for a model, a test set or a column that there is not, and like `per_example`.
        """
        for model in (first, second):
            self._require(model, set_name, column)
        if not np.array_equal(self.ids(first, set_name), self.ids(second, set_name)):
            raise UserError(f"'{first}' and '{second}' were evaluated on different images of '{set_name}'")
        one, other = (self.per_example(model, set_name, column) for model in (first, second))
        return paired(one, other)

    def standing(self, model: str, set_name: str, names: Iterable[str]) -> np.ndarray:
        """Which examples are right on the clean image and under every one of some rows and groups, (N) bool."""
        standing = self.correct(model, set_name, self.clean)
        for name in names:
            standing = standing & self.correct(model, set_name, name)
        return standing

    def accuracies(self) -> dict[tuple[str, str, str], Accuracy]:
        """(model, set, column) -> accuracy, of all cells."""
        return {
            (model, set_name, column): self.accuracy(model, set_name, column)
            for model in self.models
            for set_name in self.config.sets
            for column in self.columns(set_name)
        }

    def curves(self, set_name: str) -> dict[str, list[float]]:
        """Rows with a curve, and their eps in order."""
        rows = [row for row in self.config.attacks if getattr(row, "curve", ()) and applies(row, set_name)]
        return {row.name: sorted({row.eps, *row.curve}) for row in rows}  # type: ignore[union-attr]

    def at_eps(self, model: str, set_name: str, name: str, eps: float) -> Accuracy:
        """Accuracy under a row at an eps of its curve."""
        own = self.suite[name].eps == eps  # type: ignore[union-attr]
        return self.accuracy(model, set_name, name if own else curve_name(name, eps))

    def transferred(self, source: str, model: str, set_name: str, name: str) -> np.ndarray:
        """For each example whether `model` is right on the image that an attack on `source` made, (N) bool."""
        wanted = (("source", source), ("model", model), ("set", set_name), ("attack", name))
        rows = _where(self.rows, wanted).sort_by("id")
        right: np.ndarray = rows["correct"].to_numpy(zero_copy_only=False)
        return right

    def transfer(self, set_name: str, attack: str) -> dict[tuple[str, str], Accuracy]:
        """(attacked model, judging model) -> accuracy on the images of that attack."""
        pairs = [(source, model) for source in self.models for model in self.models]
        right = {pair: self.transferred(*pair, set_name, attack) for pair in pairs}
        return {pair: wilson(int(found.sum()), len(found)) for pair, found in right.items()}

    def confusion(self, model: str, set_name: str, attack: str, classes: int | None = None) -> np.ndarray:
        """How often each label (rows) was taken for each class (columns) under an attack, (K, K) int.

        Without `classes` as many as there are labels and answers of.
        """
        rows = _where(self.rows, (("model", model), ("source", model), ("set", set_name), ("attack", attack)))
        pairs = rows["label"].to_numpy(), rows["prediction"].to_numpy()
        classes = 1 + max(int(values.max()) for values in pairs) if classes is None else classes
        counts = np.zeros((classes, classes), int)
        np.add.at(counts, pairs, 1)
        return counts


def _where(rows: pa.Table, wanted: Iterable[tuple[str, str]]) -> pa.Table:
    """The rows with these values."""
    for name, value in wanted:
        rows = rows.filter(pc.equal(rows[name], value))
    return rows


def _split(rows: pa.Table) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Ids and correctness of each (model, set, attack), both in the order of ids."""
    keys = [rows[name].dictionary_encode().combine_chunks() for name in ("model", "set", "attack")]
    ids, right = rows["id"].to_numpy(zero_copy_only=False), rows["correct"].to_numpy(zero_copy_only=False)
    codes = np.stack([key.indices.to_numpy() for key in keys])
    found = {}
    for code in np.unique(codes, axis=1).T if rows.num_rows else ():
        at = np.flatnonzero((codes == code[:, None]).all(axis=0))
        at = at[np.argsort(ids[at])]
        model, set_name, attack = (key.dictionary[int(c)].as_py() for key, c in zip(keys, code, strict=True))
        found[model, set_name, attack] = ids[at], right[at].astype(bool)
    return found
