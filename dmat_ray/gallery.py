"""What attacks do to images: clean, attacked, and the difference, amplified; with what each model says of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmat_ray import figures
from dmat_ray.config import AttackRow, CleanRow
from dmat_ray.data.pixels import quantise
from dmat_ray.evaluation import Evaluator
from dmat_ray.units import applies, group_of

EXAMPLES = 8
ATTACKS = 12  # of a model
PIXELS = 96  # larger images are scaled down


def one_of_each_class(labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The first position of each of up to EXAMPLES classes."""
    return np.array([positions[labels[positions] == c][0] for c in np.unique(labels[positions])[:EXAMPLES]])


def rows_to_show(evaluator: Evaluator, set_name: str) -> tuple[list[AttackRow], list[str]]:
    """The rows of a gallery, one of each group, and the names of those that there is no room for."""
    seen: set[str] = set()
    rows: list[AttackRow] = []
    for row in evaluator.config.attacks:
        group = group_of(row)
        if applies(row, set_name) and not isinstance(row, CleanRow) and not (group and group in seen):
            rows.append(row)
        seen.add(group)
    return rows[:ATTACKS], [row.name for row in rows[ATTACKS:]]


def blocks(evaluator: Evaluator, positions: Sequence[int], models: Sequence[str]) -> dict[str, Any]:
    """Lines of images for each model: the test sets, and every attack on the one that all attacks suit, with its difference."""
    config, data = evaluator.config, evaluator.data
    set_name = "on_manifold" if "on_manifold" in config.sets else "natural"
    rows, left_out = rows_to_show(evaluator, set_name)
    titles = {"on_manifold": "on-manifold g(w)", "natural": "natural x"}
    found = []
    for model in models:
        lines = []
        for name in sorted(config.sets):
            batch = evaluator.batch(positions, name)
            lines.append(_line(evaluator, titles[name], batch.x_BCHW, evaluator.logits(model, batch.x_BCHW), positions))
        batch = evaluator.batch(positions, set_name)
        for row in rows:
            seen = evaluator.attacked(model, set_name, row, batch)
            line = _line(evaluator, row.name, seen.x_BCHW, seen.logits_BK, positions)
            moved = seen.x_BCHW - batch.x_BCHW
            largest = moved.abs().amax().item()
            times = 0.5 / largest if largest > 0 else 1.0
            pictures = [figures.png(quantise(image), PIXELS) for image in (0.5 + times * moved).cpu()]
            lines.append(line | {"differences": pictures, "times": f"{times:.3g}" if largest > 0 else ""})
        found.append({"model": model, "lines": lines})
    examples = [{"id": data.id[p], "label": data.class_names[data.label[p]]} for p in positions]
    small = max(data.natural.shape[2:]) <= PIXELS // 2
    return {"blocks": found, "examples": examples, "left_out": left_out, "set": titles[set_name], "small": small}


def _line(evaluator: Evaluator, title: str, x_BCHW: Tensor, logits_BK: Tensor, positions: Sequence[int]) -> dict[str, Any]:
    data = evaluator.data
    guess, label = logits_BK.argmax(dim=1).cpu(), torch.from_numpy(data.label[list(positions)])
    images = [
        {"src": figures.png(quantise(image), PIXELS), "label": data.class_names[int(g)], "right": bool(g == y)}
        for image, g, y in zip(x_BCHW.cpu(), guess, label, strict=True)
    ]
    return {"title": title, "images": images}
