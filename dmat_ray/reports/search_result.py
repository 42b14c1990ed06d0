"""The result of a search: its file, what it says in a few lines, and its best settings beside those of the start."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dmat_ray.reports import trials
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import shown
from dmat_ray.storage.files import read_json, write_json

FILE = "result.json"
Scores = dict[str, dict[str, float]]  # model -> column -> accuracy


@dataclass(frozen=True)
class SearchResult:
    """What a search gave. Accuracies are shares of 1."""

    name: str
    objective: list[str]
    axes: list[str]
    columns: list[str]
    epochs: int  # of a trial that was not ended early
    trials: list[Trial]
    best: str
    front: list[str]
    tested: Scores = field(default_factory=dict)  # the yardstick on test images
    evaluated: Scores = field(default_factory=dict)  # "set/column" of `evaluation` on test images
    confirmed: dict[str, list[str]] = field(default_factory=dict)  # "best" and "start" -> models, seed by seed
    ended_by: str = ""
    afterwards: dict[str, Any] = field(default_factory=dict)

    def trial(self, name: str) -> Trial:
        """A trial by name."""
        return next(trial for trial in self.trials if trial.name == name)


def write(folder: Path, result: SearchResult) -> None:
    """Leave the result of a finished search in its folder; `read` is the inverse."""
    write_json(folder / FILE, {**asdict(result), "trials": [trial.to_json() for trial in result.trials]})


def read(folder: Path) -> SearchResult | None:
    """What a finished search has left in its folder; None for one that has not finished."""
    if not (folder / FILE).is_file():
        return None
    values = dict(read_json(folder / FILE))
    return SearchResult(**{**values, "trials": [Trial.from_json(t) for t in values["trials"]]})


def comparison(scores: Mapping[str, Mapping[str, float]], confirmed: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """For each column the means of the best and the start settings over seeds, their deviations, and the difference, in per cent.

    `better` in how many of the seeds the best settings were, seed by seed.
    """
    best, start = confirmed["best"], confirmed["start"]
    rows = []
    for column in scores[best[0]]:
        ours, theirs = ([100 * scores[name][column] for name in names] for names in (best, start))
        rows.append(
            {
                "column": column,
                "best": statistics.mean(ours),
                "best_sd": statistics.stdev(ours) if len(ours) > 1 else None,
                "start": statistics.mean(theirs),
                "start_sd": statistics.stdev(theirs) if len(theirs) > 1 else None,
                "difference": statistics.mean(ours) - statistics.mean(theirs),
                "better": sum(a > b for a, b in zip(ours, theirs, strict=True)),
                "seeds": len(ours),
            }
        )
    return rows


def summary(found: SearchResult) -> str:
    """What a search gave, in a few lines for the terminal."""
    best = found.trial(found.best)
    done = sum(len(trial.history) for trial in found.trials)
    lines = [f"{len(found.trials)} trials, {done} epochs of {len(found.trials) * found.epochs} in all"]
    if found.ended_by:
        lines[0] += f"; ended early, since {found.ended_by} was used up"
    lines += [f"best is {best.name}: " + ", ".join(f"{key} = {shown(value)}" for key, value in best.knobs.items())]
    if best.lineage:
        lines.append(
            f"it went on from other trials' weights, {len(best.lineage)} times; the page has the schedule that made, of which "
            "these settings are the end"
        )
    for objective in found.objective:
        tested = 100 * trials.value(objective, found.tested[best.name])
        lines.append(
            f"{objective}: {100 * trials.value(objective, best.scores):.1f} % on held-out, {tested:.1f} % on test images"
        )
    if found.confirmed:
        for objective in found.objective:
            scores = {name: {objective: trials.value(objective, one)} for name, one in found.tested.items()}
            (row,) = comparison(scores, found.confirmed)
            lines.append(
                f"trained anew with {row['seeds']} seeds, {objective} on test images: {row['best']:.1f} % with the best "
                f"settings, {row['start']:.1f} % with those of the start; better in {row['better']} of {row['seeds']}"
            )
    return "\n".join(lines)
