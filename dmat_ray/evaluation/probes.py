"""What models do to attacks, measured on some images: the numbers that `checks` judges and the page draws."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack, cross_entropy, frozen, losses_of, margin
from dmat_ray.attack.search import STRAYS
from dmat_ray.config import EvaluationConfig, ImageRow, LatentRow, Row
from dmat_ray.devices import tf32
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.units import Unit, applies, is_on_curve, rows_to_run
from dmat_ray.networks.classifiers import moved_by_others
from dmat_ray.rng import Draws, derive
from dmat_ray.types import Batch

RESTARTS = 4  # starts that are compared, and draws of noise
STEP = 1e-4  # of the finite difference along the gradient's sign
LARGE = 0.5  # every pixel can become grey
LARGE_ATTACK = ImageRow(name="large", eps=LARGE, steps=30, method="apgd")
RANGES = {"[-1, 1]": (2.0, -1.0), "[0, 255]": (255.0, 0.0)}


def units(models: Sequence[str], config: EvaluationConfig, positions: np.ndarray) -> list[Unit]:
    """What is to be measured: each model, and each attack on it, on `examples` of the first test set."""
    some, names = examples(config, positions), ["", *attacks(config)]
    return [Unit(model, config.sets[0], name, some, checks=True) for model in models for name in names if some]


def examples(config: EvaluationConfig, positions: np.ndarray) -> tuple[int, ...]:
    """Which of some positions are looked at, drawn by lot."""
    count = min(config.check_examples, config.batch_size)
    order = np.random.default_rng(derive(config.seed, "checks/examples")).permutation(len(positions))
    return tuple(sorted(positions[order[:count]].tolist()))


def attacks(config: EvaluationConfig) -> dict[str, Row]:
    """The rows that are looked at, by name."""
    rows = rows_to_run(config).items()
    found = {name: row for name, row in rows if isinstance(row, Row) and applies(row, config.sets[0])}
    return {name: row for name, row in found.items() if not is_on_curve(name)}


def has_restarts(row: Row) -> bool:
    """Whether several starts of a row are compared."""
    return isinstance(row, ImageRow | LatentRow) and row.steps > 1 and not row.group


@tf32(False)
def probe(evaluator: Evaluator, unit: Unit) -> dict[str, Any]:
    """Measurements of a model, or of one attack on it, as plain values."""
    batch = evaluator.batch(unit.positions, unit.set)
    if unit.attack:
        row = evaluator.rows[unit.attack]
        assert isinstance(row, Row)
        found = _of_attack(evaluator, unit, row, batch)
        if has_restarts(row):
            found["restarts"] = _of_restarts(evaluator, unit, row, batch)
        return found
    network = evaluator.network(unit.model)
    with frozen(network):
        found = {"examples": len(batch), **_of_outputs(evaluator, unit.model, batch), **_of_gradients(network, batch)}
    threat = threats.build(LARGE_ATTACK, None)
    standing = ~attack(network, threat, batch, LARGE_ATTACK, seed=evaluator.config.seed, purpose="checks/large").broken_B
    return {**found, "large": standing.float().mean().item()}


def joined(measured: Iterable[tuple[Unit, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The measurements of each model in one piece, for `judge` and the page: of its attacks under `attacks`, by name."""
    found: dict[str, dict[str, Any]] = {}
    for unit, values in measured:
        of_model = found.setdefault(unit.model, {"model": unit.model, "set": unit.set, "attacks": {}})
        of_model["attacks"] |= {unit.attack: values} if unit.attack else {}
        of_model |= {} if unit.attack else values
    return list(found.values())


def _accuracy(logits_BK: Tensor, batch: Batch) -> float:
    return (logits_BK.argmax(dim=1) == batch.y_B).float().mean().item()


def _of_outputs(evaluator: Evaluator, model: str, batch: Batch) -> dict[str, Any]:
    first, second = (evaluator.logits(model, batch.x_BCHW) for _ in range(2))
    size = first.abs().amax().clamp_min(1e-12)
    network = evaluator.network(model)
    ranges = {}
    with torch.no_grad():
        for name, (scale, shift) in RANGES.items():
            ranges[name] = _accuracy(network(batch.x_BCHW * scale + shift).float(), batch)
    sums = first.sum(dim=1)
    return {
        "clean": _accuracy(first, batch),
        "random": ((first - second).abs().amax() / size).item(),
        "probabilities": bool(first.min() >= 0 and first.max() <= 1 and (sums - 1).abs().max() < 1e-4),
        "ranges": ranges,
        "others": moved_by_others(network, batch.x_BCHW, first) if len(batch) > 1 else None,
    }


def _of_gradients(network: nn.Module, batch: Batch) -> dict[str, Any]:
    """Shares of images without a gradient, or with one that is not finite; and how true the gradient is, the median of what the
    loss gained by a small step along its sign, over what the gradient said; None where there is none.
    """
    x = batch.x_BCHW.clone().requires_grad_(True)
    logits = network(x)
    loss = cross_entropy(batch.y_B)
    (of_loss,) = torch.autograd.grad(loss(logits).sum(), x, retain_graph=True)
    beyond = margin(batch.y_B)
    (of_margin,) = torch.autograd.grad(beyond(logits).sum(), x)
    with torch.no_grad():
        of_margin = of_margin.nan_to_num(0.0, 0.0, 0.0)
        ahead, behind = (network(batch.x_BCHW + sign * STEP * of_margin.sign()) for sign in (1, -1))
        said = of_margin.abs().flatten(1).sum(dim=1) * 2 * STEP
        ratio = (beyond(ahead) - beyond(behind))[said > 0] / said[said > 0]
    return {
        "zero_gradient": _blind(of_loss).float().mean().item(),
        "zero_margin_gradient": _blind(of_margin).float().mean().item(),
        "truth": ratio.median().item() if len(ratio) else None,
    }


def _blind(gradient: Tensor) -> Tensor:
    """Of which images (B) a gradient tells nothing: it is zero, or not finite."""
    size = gradient.flatten(1).abs().amax(dim=1)
    return ~((size > 0) & size.isfinite())


def _of_attack(evaluator: Evaluator, unit: Unit, row: Row, batch: Batch) -> dict[str, Any]:
    """The course of one search, and what noise of the same budget does."""
    threat = threats.build(row, evaluator.generator)
    losses, rights, last, render = [], [], [batch.x_BCHW], threat.render
    network = evaluator.seen_by_attacks(unit.model)
    with frozen(network):
        raised = losses_of(network, batch, row)[0]

    def watched(batch: Batch, theta: Tensor) -> Tensor:
        last[0] = theta.detach()
        return render(batch, theta)

    def noted(logits: Tensor) -> Tensor:
        value = raised(logits)
        losses.append(value.detach().mean())
        right = logits.detach().argmax(dim=1) == batch.y_B
        if row.method in STRAYS:  # what breaks an image outside of the budget has not broken it
            with torch.no_grad():
                right = right | (threat.distance(batch, last[0]) > threat.limit * (1 + 1e-4))
        rights.append(right)
        return value

    threat.render = watched  # type: ignore[method-assign]  # of this one threat, which is made anew for each row

    once = row.model_copy(update={"restarts": 1})
    purpose = f"evaluation/{unit.set}/{row.name}"
    attack(network, threat, batch, once, seed=evaluator.config.seed, purpose=purpose, loss=noted)
    standing = torch.stack(rights).cummin(dim=0).values.float().mean(dim=1)
    noise = []
    for k in range(RESTARTS):
        theta = threat.start(batch, Draws(evaluator.config.seed, batch.id, f"checks/noise/{row.name}/{k}"))
        with torch.no_grad():
            noise.append(evaluator.logits(unit.model, threat.render(batch, theta)).argmax(dim=1) == batch.y_B)
    return {
        "loss": [round(float(value), 6) for value in torch.stack(losses)],
        "accuracy": [round(float(value), 6) for value in standing],
        "noise": torch.stack(noise).all(dim=0).float().mean().item(),
    }


def _of_restarts(evaluator: Evaluator, unit: Unit, row: Row, batch: Batch) -> list[float]:
    """Accuracy after one search, two, ... of the row, each from a start of its own."""
    threat = threats.build(row, evaluator.generator)
    once = row.model_copy(update={"restarts": 1, "random_start": True})
    broken = []
    for k in range(RESTARTS):
        purpose = f"checks/restarts/{row.name}/{k}"
        view, judge = evaluator.seen_by_attacks(unit.model), evaluator.network(unit.model)
        found = attack(view, threat, batch, once, seed=evaluator.config.seed, purpose=purpose, judge=judge)
        broken.append(found.broken_B)
    return [1 - torch.stack(broken[: k + 1]).any(dim=0).float().mean().item() for k in range(RESTARTS)]
