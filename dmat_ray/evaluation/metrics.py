"""Numbers from evaluation rows: accuracies with intervals, worst cases, means, curves over eps, transfer, confusion."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmat_ray.config import CleanRow, EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation.intervals import Accuracy, Difference, Estimate, estimate, estimate_apart, paired, wilson
from dmat_ray.evaluation.row_order import Ordered, ordered
from dmat_ray.evaluation.units import applies, curve_name, group_of, rows_to_run
from dmat_ray.wording import did_you_mean

NONE = slice(0, 0)  # the rows of an attack that there are none of


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
    def _ordered(self) -> Ordered:
        return ordered(self.rows)

    @cached_property
    def _right(self) -> np.ndarray:
        """Whether each row is right, (N) bool, in order."""
        right: np.ndarray = self.rows["correct"].to_numpy(zero_copy_only=False).astype(bool)[self._ordered.order]
        return right

    def _of(self, model: str, set_name: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples that an attack on the model itself met, ascending, and whether each was right."""
        span = self._ordered.spans[model, model, set_name, name]
        return self._ordered.examples[span], self._right[span]

    def ids(self, model: str, set_name: str) -> np.ndarray:
        """The examples of a test set."""
        ids: np.ndarray = self._ordered.ids[self._of(model, set_name, self.clean)[0]]
        return ids

    def correct(self, model: str, set_name: str, name: str) -> np.ndarray:
        """For each example whether it is right under an attack, or under all of a group and on the clean image, (N) bool.

        Raises UserError for a row of a group, which did not meet every example: see `met`.
        """
        if name not in self.groups:
            self._require_whole(name)
            return self._of(model, set_name, name)[1]
        if (model, set_name, name) not in self._of_groups:
            standing = self._of(model, set_name, self.clean)[1]
            for part in self.groups[name]:
                standing = standing & ~self.broken(model, set_name, part)
            self._of_groups[model, set_name, name] = standing
        return self._of_groups[model, set_name, name]

    def met(self, model: str, set_name: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the examples that a row of a group met, which may be none, and whether each was right."""
        if (model, model, set_name, name) not in self._ordered.spans:
            return np.array([], dtype=object), np.array([], dtype=bool)
        examples, right = self._of(model, set_name, name)
        return self._ordered.ids[examples], right

    def broken(self, model: str, set_name: str, name: str) -> np.ndarray:
        """For each example whether a row of a group met it and it was not right, (N) bool."""
        every, _ = self._of(model, set_name, self.clean)
        if (model, model, set_name, name) not in self._ordered.spans:
            return np.zeros(len(every), bool)
        examples, right = self._of(model, set_name, name)
        return np.isin(every, examples[~right])

    def columns(self, set_name: str) -> list[str]:
        """What the table of a test set shows: rows, each group in place of its rows, and summaries."""
        shown: list[str] = []
        for row in self.config.attacks:
            name = group_of(row) or row.name
            if applies(row, set_name) and name not in shown:
                shown.append(name)
        return [*shown, *(s.name for s in self.config.summaries if any(self._parts(s.of, set_name)))]

    def means(self, set_name: str) -> list[str]:
        """Those of `columns` that are means over images, of which differences can be taken image by image."""
        ratios = {s.name for s in self.config.summaries if s.how == "uar"}
        return [column for column in self.columns(set_name) if column not in ratios]

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
        if (model, model, set_name, column) in self._ordered.spans:
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
        one, other = self._of_same_images((first, second), set_name, column)
        return paired(one, other)

    def _of_same_images(self, models: Sequence[str], set_name: str, column: str) -> list[np.ndarray]:
        """`per_example` of models, once for each; raises UserError if they were evaluated on different images."""
        for model in models:
            self._require(model, set_name, column)
            if not np.array_equal(self._of(models[0], set_name, self.clean)[0], self._of(model, set_name, self.clean)[0]):
                raise UserError(f"'{models[0]}' and '{model}' were evaluated on different images of '{set_name}'")
        return [self.per_example(model, set_name, column) for model in models]

    def over_trainings(self, models: Sequence[str], set_name: str, column: str) -> Estimate:
        """The mean of a column over models that are trainings of one method with other seeds, with an interval over both draws.

        Those are of images and of trainings: see `intervals.estimate`. Raises UserError for no model or one that is named twice,
        and like `difference`.
        """
        _require_trainings(models)
        return estimate(self._of_same_images(models, set_name, column), share=True)

    def difference_over_trainings(
        self, first: Sequence[str], second: Sequence[str], set_name: str, column: str, *, paired: bool = True
    ) -> Estimate:
        """By how much the mean of a column over trainings of one method is above that of another, with such an interval.

        `paired`: the k-th model of `first` has the seed of the k-th of `second`. Without it there may be more of one, two of each
        at least. Raises UserError for numbers of models that do not fit this, and like `over_trainings`.
        """
        _require_trainings(first)
        _require_trainings(second)
        if paired and len(first) != len(second):
            raise UserError(
                f"{len(first)} and {len(second)} trainings are no pairs; give those of the same seeds, or paired=False"
            )
        if not paired and min(len(first), len(second)) < 2:
            raise UserError("trainings that are not paired must be two or more of each method")
        every = self._of_same_images([*first, *second], set_name, column)
        one, other = every[: len(first)], every[len(first) :]
        return estimate([a - b for a, b in zip(one, other, strict=True)]) if paired else estimate_apart(one, other)

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
        return self._right[self._ordered.spans.get((model, source, set_name, name), NONE)]

    def transfer(self, set_name: str, attack: str) -> dict[tuple[str, str], Accuracy]:
        """(attacked model, judging model) -> accuracy on the images of that attack."""
        pairs = [(source, model) for source in self.models for model in self.models]
        right = {pair: self.transferred(*pair, set_name, attack) for pair in pairs}
        return {pair: wilson(int(found.sum()), len(found)) for pair, found in right.items()}

    def confusion(self, model: str, set_name: str, attack: str, classes: int | None = None) -> np.ndarray:
        """How often each label (rows) was taken for each class (columns) under an attack, (K, K) int.

        Without `classes` as many as there are labels and answers of.
        """
        where = pa.array(self._ordered.order[self._ordered.spans.get((model, model, set_name, attack), NONE)])
        pairs = tuple(self.rows[name].take(where).to_numpy() for name in ("label", "prediction"))
        classes = 1 + max(int(values.max()) for values in pairs) if classes is None else classes
        counts = np.zeros((classes, classes), int)
        np.add.at(counts, pairs, 1)
        return counts


def _require_trainings(models: Sequence[str]) -> None:
    if isinstance(models, str):
        raise UserError(f"'{models}' is one name; give the trainings of a method as a list of names")
    if not models or len(set(models)) < len(models):
        raise UserError(f"{', '.join(models) or 'nothing'} is no list of trainings, each of them once")
