"""Numbers from evaluation rows."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Accuracy:
    """A share of correct answers with its 95 % Wilson interval; all in [0, 1]."""

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


def accuracies(rows: pa.Table) -> dict[tuple[str, str, str], Accuracy]:
    """(model, set, attack) -> accuracy."""
    grouped = rows.group_by(["model", "set", "attack"]).aggregate([("correct", "sum"), ("correct", "count")])
    return {
        (r["model"], r["set"], r["attack"]): wilson(int(r["correct_sum"]), int(r["correct_count"])) for r in grouped.to_pylist()
    }


def worst_case(rows: pa.Table, model: str, set_name: str, attacks: list[str]) -> Accuracy:
    """Share of examples that stand under every one of `attacks`."""
    standing: dict[str, bool] = {}
    columns = [rows[name].to_pylist() for name in ("model", "set", "attack", "id", "correct")]
    for m, s, a, i, correct in zip(*columns, strict=True):
        if m == model and s == set_name and a in attacks:
            standing[i] = standing.get(i, True) and correct
    return wilson(int(np.sum(list(standing.values()))), len(standing))
