"""What attacks do to images: clean, attacked, and the difference, amplified; with what each model says of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dmat_ray.config import AttackRow, CleanRow, EvaluationConfig
from dmat_ray.data.pixels import quantise
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.units import Unit, applies, group_of
from dmat_ray.reports import figures

EXAMPLES = 8
ATTACKS = 12  # of a model
PIXELS = 96  # larger images are scaled down
TITLES = {"on_manifold": "on-manifold g(w)", "natural": "natural x"}


def one_of_each_class(labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The first position of each of up to EXAMPLES classes."""
    return np.array([positions[labels[positions] == c][0] for c in np.unique(labels[positions])[:EXAMPLES]])


def rows_to_show(config: EvaluationConfig) -> tuple[list[AttackRow], list[str]]:
    """The rows of a gallery, one of each group, and the names of those that there is no room for."""
    seen: set[str] = set()
    rows: list[AttackRow] = []
    for row in config.attacks:
        group = group_of(row)
        if applies(row, _set_of(config)) and not isinstance(row, CleanRow) and not (group and group in seen):
            rows.append(row)
        seen.add(group)
    return rows[:ATTACKS], [row.name for row in rows[ATTACKS:]]


def _set_of(config: EvaluationConfig) -> str:
    """The test set that all attacks suit, if it is evaluated."""
    return "on_manifold" if "on_manifold" in config.sets else "natural"


def units(models: Sequence[str], config: EvaluationConfig, labels: np.ndarray, positions: np.ndarray) -> list[Unit]:
    """What is to be drawn on some of the images at `positions`: of each model the test sets, and each attack that is shown."""
    shown = tuple(one_of_each_class(labels, positions).tolist())
    drawn = [*((name, "") for name in sorted(config.sets)), *((_set_of(config), row.name) for row in rows_to_show(config)[0])]
    return [Unit(model, set_name, attack, shown, gallery=True) for model in models for set_name, attack in drawn]


def draw(evaluator: Evaluator, unit: Unit) -> dict[str, Any]:
    """The line of images of a unit, as plain values: a test set, or an attack on it with its differences."""
    batch = evaluator.batch(unit.positions, unit.set)
    if not unit.attack:
        return _line(evaluator, TITLES[unit.set], batch.x_BCHW, evaluator.logits(unit.model, batch.x_BCHW), unit)
    seen = evaluator.attacked(unit.model, unit.set, evaluator.rows[unit.attack], batch)
    moved = seen.x_BCHW - batch.x_BCHW
    largest = moved.abs().amax().item()
    times = 0.5 / largest if largest > 0 else 1.0
    pictures = [figures.png(quantise(image), PIXELS) for image in (0.5 + times * moved).cpu()]
    line = _line(evaluator, unit.attack, seen.x_BCHW, seen.logits_BK, unit)
    return line | {"differences": pictures, "times": f"{times:.3g}" if largest > 0 else ""}


def joined(
    drawn: Iterable[tuple[Unit, dict[str, Any]]], config: EvaluationConfig, listed: pa.Table, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """The gallery of a page, of units and their lines; `listed` are the ids and labels of the test images, by position."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    positions: tuple[int, ...] = ()
    for unit, line in drawn:
        blocks.setdefault(unit.model, []).append(line)
        positions = unit.positions
    ids, labels, names = listed["id"].to_pylist(), listed["label"].to_pylist(), manifest["class_names"]
    return {
        "blocks": [{"model": model, "lines": lines} for model, lines in blocks.items()],
        "examples": [{"id": ids[p], "label": names[labels[p]]} for p in positions],
        "left_out": rows_to_show(config)[1],
        "set": TITLES[_set_of(config)],
        "small": max(manifest["shapes"]["on_manifold"][1:]) <= PIXELS // 2,
    }


def _line(evaluator: Evaluator, title: str, x_BCHW: Tensor, logits_BK: Tensor, unit: Unit) -> dict[str, Any]:
    data = evaluator.data
    guess, label = logits_BK.argmax(dim=1).cpu(), torch.from_numpy(data.label[list(unit.positions)])
    images = [
        {"src": figures.png(quantise(image), PIXELS), "label": data.class_names[int(g)], "right": bool(g == y)}
        for image, g, y in zip(x_BCHW.cpu(), guess, label, strict=True)
    ]
    return {"title": title, "images": images}
