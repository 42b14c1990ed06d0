"""What the evaluation's page shows of its rows: tables, plots, confusions and the course of attacks, ready to be laid out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmat_ray.config import ON_MANIFOLD, AttackRow, AutoAttackRow, CleanRow, ImageRow, LatentRow
from dmat_ray.evaluation.intervals import Accuracy, Difference, Estimate
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import applies
from dmat_ray.reports import charts
from dmat_ray.reports.charts import Axis, Series
from dmat_ray.reports.columns import SET_NAMES, over

UNSEEN = "unseen mean"  # the summary of that name in the suites
MOST_CLASSES = 20  # of a confusion table; of more the most frequent confusions are listed
MOST_PAIRS = 20
MOST_COMPARED = 6  # models of which all pairs are compared
PER_CENT = (0.0, 100.0)


@dataclass(frozen=True)
class Table:
    """Accuracies on one test set; `best` has the largest of each column, as they are printed."""

    set_name: str
    count: int
    columns: list[str]
    models: list[str]
    cells: dict[tuple[str, str], Accuracy]
    best: dict[str, str]

    @property
    def title(self) -> str:
        """For people."""
        return f"Accuracy (%) on {self.count} {SET_NAMES[self.set_name]}"

    def is_best(self, model: str, column: str) -> bool:
        """Whether no other of several models has a larger number."""
        return len(self.models) > 1 and per_cent(self.cells[model, column]) == self.best[column]


def per_cent(accuracy: Accuracy) -> str:
    """As it is printed everywhere."""
    return f"{100 * accuracy.value:.1f}"


def interval(accuracy: Accuracy) -> str:
    """The 95 % interval, as it is printed everywhere."""
    return f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"


def tables(results: Results, models: list[str]) -> list[Table]:
    """The table of each test set."""
    found = []
    for set_name in results.config.sets:
        columns = results.columns(set_name)
        cells = {(m, c): results.accuracy(m, set_name, c) for m in models for c in columns}
        best = {c: per_cent(max((cells[m, c] for m in models), key=lambda a: a.value)) for c in columns}
        found.append(Table(set_name, len(results.ids(models[0], set_name)), columns, models, cells, best))
    return found


def differences(results: Results, table: Table) -> list[dict[str, Any]]:
    """For pairs of models, of many each with the first, the difference in every column that is a mean over images."""
    columns = results.means(table.set_name)
    pairs = [(b, a) for a, b in itertools.combinations(table.models, 2)]
    if len(table.models) > MOST_COMPARED:
        pairs = [(model, table.models[0]) for model in table.models[1:]]
    return [
        {
            "title": f"{first} − {second}",
            "first": first,
            "second": second,
            "cells": {column: results.difference(first, second, table.set_name, column) for column in columns},
        }
        for first, second in pairs
    ]


def differs(found: Difference | Estimate) -> bool:
    """Whether a difference is marked: its interval excludes 0 and, where there is a p beside it, that is below 0.05, too."""
    chance = _chance(found)
    return (found.low > 0 or found.high < 0) and (chance is None or chance < 0.05)


def _chance(found: Difference | Estimate) -> float | None:
    if isinstance(found, Estimate):
        return found.chance() if found.error else None
    return found.chance


def points(found: Difference | Estimate) -> str:
    """A difference in percentage points, as it is printed, with its interval and, if there is one, McNemar's or Student's p."""
    texts = (f"{100 * number:+.1f}".replace("-", "−") for number in (found.value, found.low, found.high))
    value, low, high = ("0.0" if text in ("+0.0", "−0.0") else text for text in texts)
    chance = _chance(found)
    return f"{value} ({low} to {high}{'' if chance is None else f', p {chance:.2g}'})"


def _parts(results: Results, column: str) -> list[AttackRow]:
    return [results.suite[name] for name in results.groups.get(column, [column])]


def _attacks(table: Table, results: Results) -> list[str]:
    """Columns that are rows or groups."""
    return [c for c in table.columns if c in results.suite or c in results.groups]


def _strongest(table: Table, columns: Sequence[str]) -> str | None:
    """The column with the lowest mean accuracy over models, the first of equals."""
    return min(columns, key=lambda c: sum(table.cells[m, c].value for m in table.models), default=None)


def _is_image(row: AttackRow) -> bool:
    return isinstance(row, ImageRow | AutoAttackRow)


def _is_linf(row: AttackRow) -> bool:
    return isinstance(row, ImageRow | AutoAttackRow) and row.norm == "linf"


def trade_offs(results: Results, table: Table) -> list[dict[str, str]]:
    """Clean accuracy against that under the strongest L-infinity column, and under what is neither that nor on the manifold."""
    attacks = _attacks(table, results)
    drawn = []
    linf = _strongest(table, [c for c in attacks if all(map(_is_linf, _parts(results, c)))])
    if linf is not None:
        drawn.append(_trade_off(results, table, [linf], f"under {linf}", "The strongest L∞ attack of the table."))
    known = (CleanRow, *ON_MANIFOLD)
    if UNSEEN in table.columns:
        drawn.append(_trade_off(results, table, [UNSEEN], UNSEEN, f"Column {UNSEEN} of the table."))
    elif unseen := [c for c in attacks if not any(_is_linf(r) or isinstance(r, known) for r in _parts(results, c))]:
        what = f"Neither L∞ nor on the manifold: {', '.join(unseen)}."
        label = f"under {unseen[0]}" if len(unseen) == 1 else f"mean of {len(unseen)} others"
        drawn.append(_trade_off(results, table, unseen, label, what))
    return drawn


def _trade_off(results: Results, table: Table, columns: list[str], label: str, what: str) -> dict[str, str]:
    series, spans = [], []
    for look, model in enumerate(table.models):
        clean = results.accuracy(model, table.set_name, results.clean)
        cells = [table.cells[model, c] for c in columns]
        value, low, high = (100 * sum(getattr(a, end) for a in cells) / len(cells) for end in ("value", "low", "high"))
        series.append(Series(model, look, (100 * clean.value,), (value,), (low,), (high,)))
        spans.append((100 * clean.low, 100 * clean.high))
    title = f"clean accuracy and accuracy {label}"
    x, y = Axis("clean accuracy (%)", within=PER_CENT), Axis(f"accuracy (%), {label}", within=PER_CENT)
    return {"title": title, "what": what, "svg": charts.points(title, x, y, series, spans)}


def curves(results: Results, models: list[str]) -> list[dict[str, str]]:
    """Accuracy over eps of every row with a curve, on every test set it has."""
    drawn = []
    for set_name in results.config.sets:
        for name, every in results.curves(set_name).items():
            series = []
            for look, model in enumerate(models):
                found = [results.at_eps(model, set_name, name, eps) for eps in every]
                ends = ([100 * getattr(a, end) for a in found] for end in ("value", "low", "high"))
                series.append(Series(model, look, every, *ends))
            title = f"{name} on {SET_NAMES[set_name]}"
            x, y = Axis(over(results.suite[name])), Axis("accuracy (%)", (0, 100))
            drawn.append({"title": title, "svg": charts.lines(title, x, y, series, "error under attack (%)")})
    return drawn


def histories(runs: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Loss and held-out accuracies over epochs, of those models that were trained here."""
    wanted = [
        ("train_loss", "training loss (each method its own)", Axis("loss")),
        ("val_clean", "held-out accuracy, clean", Axis("accuracy", (0, 1))),
        ("val_image", "held-out accuracy, image attack", Axis("accuracy", (0, 1))),
        ("val_latent", "held-out accuracy, latent attack", Axis("accuracy", (0, 1))),
    ]
    drawn = []
    for metric, title, y in wanted:
        series = []
        for look, (name, run) in enumerate(runs.items()):
            if noted := [(h["epoch"], h[metric]) for h in run.get("history") or [] if metric in h]:
                series.append(Series(name, look, *zip(*noted, strict=True)))
        if series:
            drawn.append({"title": title, "svg": charts.lines(title, Axis("epoch", whole=True), y, series)})
    return drawn


def courses(measurements: Sequence[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """Mean loss and accuracy over the steps of each attack, as the checks met them."""
    looks = {model: look for look, model in enumerate(models)}
    drawn = []
    for name in dict.fromkeys(name for measured in measurements for name in measured["attacks"]):
        figures = []
        for what, scale, y in (("loss", 1, Axis("mean loss")), ("accuracy", 100, Axis("accuracy (%)", (0, 100)))):
            series = []
            for measured in (m for m in measurements if name in m["attacks"] and m["model"] in looks):
                values = [scale * v for v in measured["attacks"][name][what]]
                series.append(Series(measured["model"], looks[measured["model"]], range(len(values)), values))
            title = f"{what} over the steps of {name}"
            figures.append({"title": title, "svg": charts.lines(title, Axis("step", whole=True), y, series)})
        drawn.append({"name": name, "figures": figures})
    return drawn


def transfers(results: Results, models: list[str]) -> list[dict[str, Any]]:
    """For each row that is transferred: who attacked (rows) and who judged (columns)."""
    found = []
    for name in results.config.transfer if len(models) > 1 else ():
        for set_name in (s for s in results.config.sets if applies(results.suite[name], s)):
            pairs = results.transfer(set_name, name)
            found.append({"name": name, "set": set_name, "title": f"{name} on {SET_NAMES[set_name]}", "pairs": pairs})
    return found


def counted(results: Results, model: str, set_name: str, column: str, classes: int) -> np.ndarray:
    """Confusion under a row or a group, (K, K): of a group what the first of its rows that broke an image made of it."""
    if column not in results.groups:
        return results.confusion(model, set_name, column, classes)
    clean = results.confusion(model, set_name, results.clean, classes)
    counts = sum(results.confusion(model, set_name, name, classes) for name in results.groups[column]) + clean
    np.fill_diagonal(counts, 0)
    np.fill_diagonal(counts, clean.sum(axis=1) - counts.sum(axis=1))
    return counts


def confusions(results: Results, table: Table, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each model: what labels were taken for, on clean images and under the strongest image and latent columns."""
    attacks = _attacks(table, results)
    image = _strongest(table, [c for c in attacks if all(map(_is_image, _parts(results, c)))])
    latent = _strongest(table, [c for c in attacks if all(isinstance(r, LatentRow) for r in _parts(results, c))])
    found, small = [], len(class_names) <= MOST_CLASSES
    for model in table.models:
        shown = []
        for column in filter(None, (results.clean, image, latent)):
            counts = counted(results, model, table.set_name, column, len(class_names))
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            pairs = [(int(counts[k]), k) for k in zip(*np.nonzero(counts), strict=True) if k[0] != k[1]]
            pairs.sort(key=lambda pair: -pair[0])
            most = [{"count": n, "label": class_names[a], "taken": class_names[b]} for n, (a, b) in pairs[:MOST_PAIRS]]
            # of many classes the page shows no more, and all pairs of a thousand, as lists, are gigabytes over a table
            whole = {"counts": counts.tolist(), "shares": shares.tolist()} if small else {"counts": None, "shares": None}
            shown.append({"name": column, **whole, "most": most})
        found.append({"model": model, "tables": shown})
    return found
