"""What a search shows: one self-contained HTML page of its trials, in the report's style."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dmat_ray.config import Config
from dmat_ray.reports import charts, figures, trials, trials_charts
from dmat_ray.reports.charts import Axis, Series
from dmat_ray.reports.search_result import SearchResult, comparison
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import short, shown
from dmat_ray.storage import at

CURVES = 6  # trials whose course is drawn
ACCURACY = "{} (%)"


def write(path: Path, found: SearchResult, config: Config) -> Path:
    """Write the page of a search's result."""
    every, objectives, axes = found.trials, found.objective, found.axes
    ranked = trials.ranked(every, objectives)
    rows = [*ranked, *(trial for trial in every if trial not in ranked)]
    best = found.trial(found.best)
    knobs = list(dict.fromkeys(name for trial in every for name in trial.knobs))
    figures.write_page(
        at(path),
        "search.html",
        title=f"Search {found.name}",
        found=found,
        best=best,
        rows=[_row(trial, objectives, found.columns, knobs) for trial in rows],
        heads=[
            *(*objectives, *(c for c in found.columns if c not in objectives)),
            *("epochs", *(short(name, knobs) for name in knobs), "seconds", "status"),
        ],
        best_knobs=[(name, shown(value)) for name, value in best.knobs.items()],
        values=[(o, 100 * trials.value(o, best.scores), _tested(found, best.name, o)) for o in objectives],
        parallel=_parallel(ranked, objectives, knobs, best),
        trade_off=_trade_off(ranked, axes, found.front, best.name),
        importances=[_importance(every, o, knobs) for o in objectives],
        courses=_courses(ranked, objectives, found.columns),
        course_names=[(charts.swatch(look), t.name) for look, t in enumerate(ranked[:CURVES]) if t.history],
        confirmed=comparison(found.tested, found.confirmed) if found.confirmed else [],
        evaluated=found.evaluated,
        epochs=sum(len(trial.history) for trial in every),
        most=found.epochs * len(every),
        seconds=sum(trial.seconds for trial in every),
        settings=yaml.safe_dump(config.to_json(), sort_keys=False, allow_unicode=True),
    )
    return path


def _tested(found: SearchResult, name: str, objective: str) -> float | None:
    return 100 * trials.value(objective, found.tested[name]) if name in found.tested else None


def _row(trial: Trial, objectives: Sequence[str], columns: Sequence[str], knobs: Sequence[str]) -> dict[str, Any]:
    names = [*objectives, *(c for c in columns if c not in objectives)]
    numbers = [f"{100 * trials.value(name, trial.scores):.1f}" if trial.scores else "" for name in names]
    drawn = [shown(trial.knobs[name]) if name in trial.knobs else "" for name in knobs]
    return {"trial": trial, "cells": [*numbers, str(trial.epochs), *drawn, f"{trial.seconds:.0f}", trial.status]}


def _parallel(ranked: Sequence[Trial], objectives: Sequence[str], knobs: Sequence[str], best: Trial) -> str:
    scales = [trials_charts.Scale(short(name, knobs), [t.knobs[name] for t in ranked]) for name in knobs]
    scales += [trials_charts.Scale(ACCURACY.format(o), [100 * trials.value(o, t.scores) for t in ranked]) for o in objectives]
    strengths = [1 - k / max(len(ranked) - 1, 1) for k in range(len(ranked))]
    names = [trial.name for trial in ranked]
    return trials_charts.parallel("trials across their knobs", scales, strengths, names, names.index(best.name))


def _trade_off(ranked: Sequence[Trial], axes: Sequence[str], front: Sequence[str], best: str) -> str:
    if len(axes) < 2:
        return ""
    points = [(t.name, 100 * trials.value(axes[0], t.scores), 100 * trials.value(axes[1], t.scores)) for t in ranked]
    x, y = (Axis(ACCURACY.format(axis), within=(0, 100)) for axis in axes[:2])
    return trials_charts.trade_off(f"{axes[1]} against {axes[0]}", x, y, points, front, best)


def _importance(every: Sequence[Trial], objective: str, knobs: Sequence[str]) -> dict[str, str]:
    shares = trials.importance(every, objective)
    if not shares:
        return {"title": objective, "svg": ""}
    named = [(short(name, knobs), share) for name, share in shares.items()]
    return {"title": f"{objective}: share of its variance", "svg": trials_charts.bars(f"importance for {objective}", named)}


def _courses(ranked: Sequence[Trial], objectives: Sequence[str], columns: Sequence[str]) -> list[dict[str, str]]:
    """Objectives and clean accuracy over epochs, of the best trials."""
    drawn = []
    for name in dict.fromkeys((*objectives, columns[0])):
        series = [
            Series(t.name, look, [h["epoch"] for h in t.history], [100 * trials.value(name, h) for h in t.history])
            for look, t in enumerate(ranked[:CURVES])
            if t.history
        ]
        title = f"{name} over epochs, the best {len(series)}"
        svg = charts.lines(title, Axis("epoch", whole=True), Axis(ACCURACY.format(name), within=(0, 100)), series)
        drawn.append({"title": title, "svg": svg})
    return drawn
