"""Is an evaluation to be believed? What a model does to attacks, measured on some images, and what the rows say of each other.

After Athalye et al. (arXiv 1802.00420), Carlini et al. (arXiv 1902.06705) and the flags of AutoAttack: a model that gives one
answer, gradients that vanish or mislead, outputs that are random, no logits, or depend on the rest of the batch, inputs of
another range, attacks that have not converged or are beaten by weaker ones.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from dmat_ray.config import AttackRow, AutoAttackRow, ImageRow, Row
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.probes import LARGE, RESTARTS
from dmat_ray.evaluation.units import applies, group_of
from dmat_ray.networks.classifiers import ROUNDING

STEADY = 1e-4  # of the largest logit: what two passes over the same images may differ by
GRADIENT = ("pgd", "momentum", "apgd")


@dataclass(frozen=True)
class Finding:
    """What a check says of a model: that all is well, or what is not and what that means."""

    model: str
    check: str
    level: Literal["ok", "warning"]
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def judge(results: Results, probes: Sequence[dict[str, Any]]) -> list[Finding]:
    """Findings of every check on every model, from measurements and rows."""
    found = [finding for measured in probes for finding in _judge_probe(measured)]
    for model in results.models:
        found += [*_judge_answers(results, model), *_judge_order(results, model)]
        found += [*_judge_black_box(results, model), *_judge_transfer(results, model)]
    return found


def _finding(model: str, check: str, wrong: list[str], fine: str) -> list[Finding]:
    return [Finding(model, check, "warning", text) for text in wrong] or [Finding(model, check, "ok", fine)]


def _judge_probe(measured: dict[str, Any]) -> list[Finding]:
    model, n, where = measured["model"], measured["examples"], f"on {measured['examples']} images"
    resolution = max(0.02, 2 / n)
    found = []
    wrong = []
    if measured["zero_gradient"] > 0:
        only = " (of the margin it is not: use loss dlr)" if measured["zero_margin_gradient"] == 0 else ""
        wrong.append(
            f"the gradient of the loss is exactly zero, or not finite, for {measured['zero_gradient']:.0%} {where}{only}: "
            "attacks see nothing"
        )
    truth = measured["truth"]
    if truth is not None and not 0.5 < truth < 2:
        wrong.append(
            f"a small step along the gradient gains {truth:.2f} times what the gradient says: it is masked or misleading"
        )
    gained = "" if truth is None else f", a step gains {truth:.2f} times what they say"
    found += _finding(model, "gradients", wrong, f"none is zero{gained}, {where}")
    wrong = [f"two passes over the same images differ by {measured['random']:.1e}"] if measured["random"] > STEADY else []
    found += _finding(model, "deterministic", wrong, "two passes over the same images agree")
    found += _judge_others(measured)
    wrong = ["it puts out probabilities, not logits: losses saturate and attacks fail"] if measured["probabilities"] else []
    found += _finding(model, "logits", wrong, "outputs are no probabilities")
    name, accuracy = max(measured["ranges"].items(), key=lambda item: item[1])
    wrong = []
    if accuracy > measured["clean"] + max(0.05, resolution):
        wrong.append(
            f"accuracy is {accuracy:.1%} on images in {name} and {measured['clean']:.1%} in [0, 1]: was it made for {name}?"
        )
    found += _finding(model, "input range", wrong, "images in [-1, 1] or [0, 255] do not suit it better than in [0, 1]")
    wrong, steps = [], []
    for name, course in measured["attacks"].items():
        end = course["accuracy"][-1]
        if course["noise"] < end - resolution:
            wrong.append(f"{name} leaves {end:.1%}, mere noise in its budget {course['noise']:.1%} ({RESTARTS} draws)")
        before = course["accuracy"][int(0.75 * (len(course["accuracy"]) - 1))]
        if len(course["accuracy"]) > 4 and before - end > resolution:
            fell = f"accuracy from {before:.1%} to {end:.1%} on the few images of this check"
            steps.append(f"{name} has not converged: its last quarter of steps took {fell}")
        again = course.get("restarts", [])
        if again and again[-2] - again[-1] > resolution:
            steps.append(f"{name}: restart {len(again)} still took accuracy from {again[-2]:.1%} to {again[-1]:.1%}")
    found += _finding(model, "noise", wrong, "no attack is weaker than noise in its budget")
    found += _finding(model, "converged", steps, "more steps or restarts would change little")
    wrong = []
    if measured["large"] > 0.05:
        wrong.append(
            f"{measured['large']:.1%} stand under APGD with eps {LARGE:g}, which can make every image grey: it fails to attack"
        )
    return found + _finding(model, "large eps", wrong, f"accuracy is {measured['large']:.1%} at eps {LARGE:g}")


def _judge_others(measured: dict[str, Any]) -> list[Finding]:
    others = measured.get("others")
    if others is None or measured["random"] > STEADY:  # as of earlier versions; or it moves in any case
        return []
    wrong = [
        f"an image's logits move by {others:.1%} of the largest as the other images of its batch change (batch norm without "
        "track_running_stats?): images that are attacked together break each other"
    ]
    fine = "an image's logits do not depend on the other images of its batch"
    return _finding(measured["model"], "each by itself", wrong if others > ROUNDING else [], fine)


def _judge_answers(results: Results, model: str) -> list[Finding]:
    wrong = []
    for set_name in results.config.sets:
        counts = results.confusion(model, set_name, results.clean)
        total, of_label, of_answer = counts.sum(), counts.sum(axis=1), counts.sum(axis=0)
        if (of_label > 0).sum() < 2:
            continue
        right, constant, most = counts.trace() / total, of_label.max() / total, int(of_answer.argmax())
        if right <= constant:
            wrong.append(
                f"{right:.1%} of clean images are right, no more than if all were said to be of class {of_label.argmax()} "
                f"({set_name})"
            )
        elif of_answer[most] > 0.9 * total and of_label[most] < 0.6 * total:
            wrong.append(
                f"{of_answer[most] / total:.1%} of clean images are said to be of class {most}, which "
                f"{of_label[most] / total:.1%} are ({set_name})"
            )
    return _finding(model, "answers", wrong, "more clean images are right than any one answer would give")


REDRAWN = ("fog", "gabor", "kaleidoscope")
"""Threats whose pictures at a larger eps are not those at a smaller one and more: scaled anew, or drawn for each row."""


def _contains(strong: AttackRow, weak: AttackRow) -> bool:
    """Whether every image that `weak` may find is within reach of `strong`, which searches at least as hard."""
    if strong is weak or not (isinstance(strong, Row) and isinstance(weak, Row)):
        return False
    a, b = strong.model_dump(), weak.model_dump()
    if (a["threat"], b["threat"]) == ("joint", "image"):
        larger = b["norm"] == "linf" and a["eps"] >= b["eps"]
    elif (a["threat"], b["threat"]) == ("joint", "latent"):
        larger = b["norm"] == "linf" and a["scale"] == b["scale"] and a["latent_eps"] >= b["eps"]
    else:
        radii = [name for name in ("eps", "latent_eps") if name in a]
        fixed = a.keys() - Row.model_fields.keys() - set(radii)
        same = a.keys() == b.keys() and all(a[name] == b[name] for name in fixed)
        reaches = operator.eq if a["threat"] in REDRAWN else operator.ge
        larger = same and all(reaches(a[name], b[name]) for name in radii)
    harder = strong.steps >= weak.steps and strong.restarts >= weak.restarts and strong.targets == weak.targets
    better = strong.method == weak.method or (strong.method, weak.method) == ("apgd", "pgd")
    return larger and harder and better and strong.loss == weak.loss


def significantly_fewer(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether fewer examples are right in `b` than in `a`, paired, by more than a point and than chance (McNemar at 5 %)."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a - only_b > 0.01 * len(a) and only_a - only_b > 1.96 * math.sqrt(only_a + only_b)


def _judge_order(results: Results, model: str) -> list[Finding]:
    wrong, pairs = [], 0
    for set_name in results.config.sets:
        rows = [row for row in results.suite.values() if applies(row, set_name) and not group_of(row)]
        for strong, weak in ((s, w) for s in rows for w in rows if _contains(s, w)):
            pairs += 1
            under = [results.correct(model, set_name, row.name) for row in (strong, weak)]
            if significantly_fewer(*under):
                a, b = (f"{right.mean():.1%}" for right in under)
                wrong.append(f"{strong.name} leaves {a}, and {weak.name}, which it contains, {b} ({set_name})")
    return (
        _finding(model, "stronger attacks", wrong, f"none of {pairs} attacks is beaten by one that it contains") if pairs else []
    )


def _is_black_box(row: AttackRow) -> bool:
    return (isinstance(row, AutoAttackRow) and row.part == "square") or getattr(row, "method", "") == "square"


def _judge_black_box(results: Results, model: str) -> list[Finding]:
    wrong, looked = [], False
    for group, parts in results.groups.items():
        at = next((k for k, name in enumerate(parts) if _is_black_box(results.suite[name])), 0)
        for set_name in results.config.sets if at else ():
            looked, standing = True, results.correct(model, set_name, results.clean)
            for k, name in enumerate(parts[: at + 1]):
                before = standing
                standing = standing & ~results.broken(model, set_name, name)
                if k == at and (before.sum() - standing.sum()) > 0.002 * len(standing):
                    wrong.append(
                        f"{name}, which sees no gradient, took {group} from {before.mean():.1%} to {standing.mean():.1%}"
                    )
    rows = [row for row in results.suite.values() if isinstance(row, ImageRow) and not row.group]
    pairs = [
        (b, g) for b in rows for g in rows if _is_black_box(b) and g.method in GRADIENT and b.norm == g.norm and b.eps <= g.eps
    ]
    for blind, seeing in pairs:
        looked = True
        for set_name in results.config.sets:
            under = [results.correct(model, set_name, row.name) for row in (seeing, blind)]
            if significantly_fewer(*under):
                a, b = (f"{right.mean():.1%}" for right in under)
                wrong.append(f"{blind.name}, which sees no gradient, leaves {b}, and {seeing.name} {a} ({set_name})")
    return _finding(model, "black box", wrong, "Square breaks nothing that gradients have left") if looked else []


def _judge_transfer(results: Results, model: str) -> list[Finding]:
    wrong, looked = [], False
    for name in results.config.transfer:
        for set_name in (s for s in results.config.sets if applies(results.suite[name], s)):
            own = results.correct(model, set_name, name)
            for source in results.models:
                if source != model:
                    looked = True
                    theirs = results.transferred(source, model, set_name, name)
                    if significantly_fewer(own, theirs):
                        wrong.append(
                            f"images of {name} against {source} leave {theirs.mean():.1%}, those against itself {own.mean():.1%}"
                        )
    return _finding(model, "transfer", wrong, "its own attacks break it more than those on other models") if looked else []
