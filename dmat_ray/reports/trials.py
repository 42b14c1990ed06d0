"""Trials of a search: what each tried and gave, which are best, and which settings mattered."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dmat_ray.config.tuning import parse_objective
from dmat_ray.errors import UserError

Knobs = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One trial. `knobs` are the settings that were drawn, by dotted name; `scores` the columns after its last epoch."""

    name: str
    status: Literal["running", "finished", "stopped", "diverged", "failed"]
    knobs: Knobs
    epochs: int
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    history: tuple[dict[str, float], ...] = ()  # the columns after every epoch, with "epoch"
    lineage: tuple[dict[str, Any], ...] = ()  # what it went on from, see trained_settings.ancestor
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `Trial.from_json` is the inverse."""
        return dict(json.loads(json.dumps(asdict(self))))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Trial":
        return Trial(**{**values, "history": tuple(values["history"]), "lineage": tuple(values["lineage"])})


def value(objective: str, scores: Mapping[str, float]) -> float:
    """A column, or the weighted sum of columns that an objective names."""
    return sum(weight * scores[name] for name, weight in parse_objective(objective).items())


def metric(number: int) -> str:
    """What a trial reports the value of an objective as."""
    return f"objective_{number}"


def require_columns(objectives: Iterable[str], columns: Sequence[str], suites: Sequence[str]) -> None:
    """Raise UserError for an objective of a column that no trial reports."""
    for objective in objectives:
        for name in parse_objective(objective):
            if name not in columns:
                raise UserError(
                    f"tune.objective names '{name}', which no trial reports; suite {', '.join(suites)} has {', '.join(columns)}"
                )


def axes(objectives: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """What trials are traded off by: the objectives, or a single one beside clean accuracy (beside the last column for clean)."""
    if len(objectives) > 1:
        return tuple(objectives)
    other = columns[0] if objectives[0] != columns[0] else columns[-1]
    return (other, objectives[0]) if other != objectives[0] else (other,)


def ranked(trials: Iterable[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Those that have scores and neither failed nor diverged, best first: by the objective, or of several by their sum."""
    scored = [trial for trial in trials if trial.scores and trial.status not in ("diverged", "failed")]
    return sorted(scored, key=lambda t: (-sum(value(o, t.scores) for o in objectives), t.name))


def front(trials: Iterable[Trial], by: Sequence[str]) -> list[Trial]:
    """The Pareto front: those that none beats in one of `by` without being worse in another; of equals the first."""
    points: list[tuple[tuple[float, ...], Trial]] = []
    for trial in ranked(trials, by):
        point = tuple(value(o, trial.scores) for o in by)
        if not any(all(a >= b for a, b in zip(other, point, strict=True)) for other, _ in points):
            points.append((point, trial))
    # one of a larger sum may have come in before, but none of a smaller sum beats one of a larger
    return [trial for _, trial in points]


def spread(front: Sequence[Trial], most: int, axis: str) -> list[Trial]:
    """At most so many of a front, both ends and evenly between them along an axis."""
    along = sorted(front, key=lambda trial: value(axis, trial.scores))
    if len(along) <= most:
        return list(front)
    return [along[round(k * (len(along) - 1) / (most - 1))] for k in range(most)]


def importance(trials: Iterable[Trial], objective: str) -> dict[str, float]:
    """Share of the objective's variance that each knob explains (fANOVA, Hutter et al. 2014, as Optuna has it), largest first.

    Empty where nothing can be told: fewer than four trials, no knob that varies, or the same value for all.
    """
    import optuna

    scored = ranked(trials, [objective])
    values = [value(objective, trial.scores) for trial in scored]
    names = [n for n in (scored[0].knobs if scored else ()) if len({json.dumps(t.knobs.get(n)) for t in scored}) > 1]
    if len(scored) < 4 or not names or max(values) - min(values) < 1e-9:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: _distribution([trial.knobs[name] for trial in scored]) for name in names}
    study = optuna.create_study(direction="maximize")
    for trial, found in zip(scored, values, strict=True):
        parameters = {name: _plain(trial.knobs[name]) for name in names}
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=distributions, value=found))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found_by_name = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(found_by_name.items(), key=lambda item: -item[1]))


def _plain(knob: Any) -> Any:
    """A value as Optuna takes it: lists are categories, too."""
    return knob if isinstance(knob, bool | int | float | str) or knob is None else json.dumps(knob)


def _distribution(knobs: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if all(isinstance(k, int) and not isinstance(k, bool) for k in knobs):
        return IntDistribution(min(knobs), max(knobs))
    if all(isinstance(k, int | float) and not isinstance(k, bool) and math.isfinite(k) for k in knobs):
        return FloatDistribution(float(min(knobs)), float(max(knobs)))
    return CategoricalDistribution(list(dict.fromkeys(map(_plain, knobs))))
