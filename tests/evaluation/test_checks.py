"""Every check finds the defect that it is for, in a model that has it, and passes one that has none."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from robust_digits import COUNT, CPU, digits_set, robust_network
from torch import Tensor, nn

from dmat_ray.config import EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.evaluation import checks, evaluation, probes
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import Unit
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws

pytestmark = pytest.mark.slow

SUITE: dict[str, Any] = {
    "sets": ["natural"],
    "check_examples": COUNT,
    "attacks": [
        {"threat": "clean"},
        {"threat": "image", "name": "FGSM", "eps": 0.1, "steps": 1},
        {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 10},
    ],
}


@pytest.fixture(scope="module")
def data() -> ManifoldSet:
    return digits_set()


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return robust_network()


class Around(nn.Module):
    """A network with something done to its input or output."""

    def __init__(self, network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.function(self.network, x_BCHW)


def rounded(x: Tensor) -> Tensor:
    """Sixteen levels of grey, with the gradient of the identity: what it says is not so."""
    return x + ((x * 15).round() / 15 - x).detach()


def of_the_batch(network: nn.Module, x: Tensor) -> Tensor:
    """The network, with batch norm by the statistics of what is in the batch, in eval mode, too."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return network(x)


DEFECTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "no gradient": (lambda f, x: f(x.detach()) + 0 * x.sum(), ["gradients", "large eps"]),
    "saturated": (lambda f, x: 1e4 * f(x), ["gradients"]),
    "rounded": (lambda f, x: f(rounded(x)), ["gradients"]),
    "random": (lambda f, x: f(x) + torch.randn(10), ["deterministic"]),
    "of the batch": (of_the_batch, ["each by itself"]),
    "probabilities": (lambda f, x: f(x).softmax(dim=1), ["logits"]),
    "made for [-1, 1]": (lambda f, x: f((x + 1) / 2), ["input range"]),
    "made for [0, 255]": (lambda f, x: f(x / 255), ["input range"]),
}


def measured(network: nn.Module, data: ManifoldSet, generator: StyleGAN2, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """Measurements of a network, and findings that need no rows but these."""
    evaluator = Evaluator(EvaluationConfig.model_validate({**SUITE, **changes}), data, generator, lambda _: network, ["m"], CPU)
    work = probes.units(["m"], evaluator.config, np.arange(COUNT))
    (found,) = probes.joined((unit, probes.probe(evaluator, unit)) for unit in work)
    rows = evaluation.evaluate_here(
        Evaluator(EvaluationConfig(sets=("natural",)), data, generator, lambda _: network, ["m"], CPU)
    )
    return found, checks.judge(Results(rows, EvaluationConfig(sets=("natural",))), [found])


def warned(findings: list[Any]) -> dict[str, str]:
    return {finding.check: finding.text for finding in findings if finding.level == "warning"}


class Constant(nn.Module):
    """One answer, whatever it is shown."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(10.0) + 0 * x.sum(dim=(1, 2, 3))[:, None]


def test_what_has_no_gradient_is_said_in_words_and_in_json(data: ManifoldSet, generator: StyleGAN2) -> None:
    found, findings = measured(Constant(), data, generator)
    assert "the gradient of the loss is exactly zero, or not finite, for 100%" in warned(findings)["gradients"]
    assert not any("nan" in finding.text for finding in findings)
    assert found["truth"] is None
    json.dumps(found, allow_nan=False)


def test_a_sound_model_passes(robust: nn.Module, data: ManifoldSet, generator: StyleGAN2) -> None:
    found, findings = measured(robust, data, generator)
    assert warned(findings) == {}
    assert {f.check for f in findings} >= {
        "gradients",
        "deterministic",
        "each by itself",
        "logits",
        "input range",
        "noise",
        "converged",
        "large eps",
    }
    assert found["truth"] == pytest.approx(1, abs=0.05)
    assert found.pop("others") == 0
    earlier = checks.judge(Results(evaluation.SCHEMA.empty_table(), EvaluationConfig()), [found])
    assert {f.check for f in earlier} == {f.check for f in findings} - {"each by itself", "answers"}
    pgd = found["attacks"]["PGD"]
    assert len(pgd["loss"]) == len(pgd["accuracy"]) == 11
    assert pgd["loss"][-1] > pgd["loss"][0]
    assert pgd["accuracy"] == sorted(pgd["accuracy"], reverse=True)
    assert pgd["restarts"] == sorted(pgd["restarts"], reverse=True)
    assert pgd["noise"] > pgd["accuracy"][-1]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(robust: nn.Module, data: ManifoldSet, generator: StyleGAN2, name: str) -> None:
    function, expected = DEFECTS[name]
    torch.manual_seed(0)
    _, findings = measured(Around(robust, function), data, generator)
    assert set(expected) <= warned(findings).keys()
    assert all(finding.model == "m" for finding in findings)
    if name.startswith("made for"):
        assert f"was it made for {name.removeprefix('made for ')}?" in warned(findings)["input range"]


def test_too_few_steps_are_said_so(robust: nn.Module, data: ManifoldSet, generator: StyleGAN2) -> None:
    slow = {"threat": "image", "name": "slow", "eps": 0.3, "steps": 8, "step_size": 0.04, "random_start": False}
    _, findings = measured(robust, data, generator, attacks=[{"threat": "clean"}, slow])
    assert "slow has not converged" in warned(findings)["converged"]


@pytest.mark.parametrize("method", [pytest.param("lagrange", marks=pytest.mark.exhaustive), "lpa"])
def test_a_course_counts_nothing_outside_of_the_budget(
    robust: nn.Module, data: ManifoldSet, generator: StyleGAN2, method: str
) -> None:
    """Where these searches go on their way, and come back from."""
    row = {"threat": "image", "name": "strays", "norm": "l2", "eps": 0.3, "steps": 10, "step_size": 3, "method": method}
    inside = {**row, "name": "inside", "step_size": None, "method": "apgd", "steps": 30}
    found, _ = measured(robust, data, generator, attacks=[row, inside])
    strays, held = (found["attacks"][name]["accuracy"][-1] for name in ("strays", "inside"))
    assert strays >= held - 0.05 > 0.5


def test_noise_and_restarts_are_drawn_anew_each_time(
    robust: nn.Module, data: ManifoldSet, generator: StyleGAN2, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, purposes, init = EvaluationConfig.model_validate(SUITE), list[str](), Draws.__init__
    evaluator = Evaluator(suite, data, generator, lambda _: robust, ["m"], CPU)

    def noted(self: Draws, seed: int, ids: Any, purpose: str) -> None:
        purposes.append(purpose)
        init(self, seed, ids, purpose)

    monkeypatch.setattr(Draws, "__init__", noted)
    probes.probe(evaluator, Unit("m", "natural", "PGD", (0, 1, 2), checks=True))
    for kind in ("checks/noise", "checks/restarts"):
        assert len({purpose for purpose in purposes if purpose.startswith(kind)}) == probes.RESTARTS


def probe_of(**course: Any) -> dict[str, Any]:
    """What is measured of a model in which nothing is wrong, but for the course of its attack."""
    plain = {"loss": [1.0] * 4, "accuracy": [0.9, 0.8, 0.8, 0.8], "noise": 0.95, "restarts": [0.8, 0.79, 0.79, 0.79]}
    zeros = dict.fromkeys(("zero_gradient", "zero_margin_gradient", "random", "others", "large"), 0.0)
    about = {"model": "m", "examples": 200, "truth": 1.0, "probabilities": False, "ranges": {"[-1, 1]": 0.1}, "clean": 0.95}
    return {**about, **zeros, "attacks": {"PGD": {**plain, **course}}}


def warned_of(probe: dict[str, Any]) -> dict[str, str]:
    return warned(checks.judge(Results(evaluation.SCHEMA.empty_table(), EvaluationConfig()), [probe]))


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ({}, {}),
        ({"noise": 0.7}, {"noise": "PGD leaves 80.0%, mere noise in its budget 70.0% (4 draws)"}),
        ({"restarts": [0.8, 0.75, 0.75, 0.7]}, {"converged": "PGD: restart 4 still took accuracy from 75.0% to 70.0%"}),
        ({"restarts": [0.8, 0.6, 0.6, 0.6]}, {}),
    ],
    ids=["neither", "noise", "the last restart", "an early restart"],
)
def test_what_noise_and_more_restarts_do_is_judged(course: dict[str, Any], expected: dict[str, str]) -> None:
    assert warned_of(probe_of(**course)) == expected


@pytest.mark.parametrize("of_margin", [0.0, 0.5])
def test_that_the_margin_has_a_gradient_is_said_where_it_has_one(of_margin: float) -> None:
    (text,) = warned_of({**probe_of(), "zero_gradient": 0.5, "zero_margin_gradient": of_margin}).values()
    assert ("use loss dlr" in text) == (of_margin == 0)


def rows_of(answers: dict[tuple[str, str, str], list[bool]]) -> pa.Table:
    """(model, source, attack) -> right or not, in the order of ids."""
    parts = [
        {"model": m, "source": s, "set": "natural", "attack": a, "id": f"{i:03}", "correct": ok}
        | {"label": i % 3, "prediction": (i + (not ok)) % 3}
        for (m, s, a), right in answers.items()
        for i, ok in enumerate(right)
    ]
    return pa.Table.from_pylist(parts)


def judged(attacks: list[dict[str, Any]], answers: dict[str, list[bool]], **changes: Any) -> dict[str, str]:
    config = EvaluationConfig.model_validate({"sets": ["natural"], "attacks": [{"threat": "clean"}, *attacks], **changes})
    rows = rows_of({("m", "m", name): right for name, right in answers.items()})
    return warned(checks.judge(Results(rows, config), []))


ALL, HALF = [True] * 100, [True] * 50 + [False] * 50
PAIRS = [
    ({"threat": "image", "eps": 0.1, "steps": 20}, {"threat": "image", "eps": 0.1, "steps": 1}),
    ({"threat": "image", "eps": 0.2, "steps": 20}, {"threat": "image", "eps": 0.1, "steps": 20}),
    ({"threat": "image", "eps": 0.1, "steps": 20, "method": "apgd"}, {"threat": "image", "eps": 0.1, "steps": 20}),
    ({"threat": "image", "eps": 0.1, "steps": 20, "restarts": 3}, {"threat": "image", "eps": 0.1, "steps": 20}),
    ({"threat": "joint", "eps": 0.1, "latent_eps": 0.1, "steps": 20}, {"threat": "image", "eps": 0.1, "steps": 20}),
    ({"threat": "snow", "eps": 0.5, "steps": 20}, {"threat": "snow", "eps": 0.4, "steps": 20}),
    ({"threat": "fog", "eps": 0.5, "steps": 20}, {"threat": "fog", "eps": 0.5, "steps": 10}),
]


@pytest.mark.parametrize(
    ("labels", "predictions", "words"),
    [
        ([0, 1, 2, 1] * 25, [1] * 100, "50.0% of clean images are right, no more than if all were said to be of class 1"),
        ([0, 1, 2, 1] * 25, [2, 1, 1, 0] * 25, "25.0% of clean images are right, no more than if all were said to be of class 1"),
        ([0, 1, 2, 3] * 25, [0, *[1] * 99], "99.0% of clean images are said to be of class 1, which 25.0% are"),
        ([0, 1, 2, 3] * 25, [0, 1, 1, 1] * 25, None),
        ([1] * 97 + [0] * 3, [1] * 99 + [0], None),
        ([2] * 100, [2] * 100, None),
    ],
    ids=["one", "fewer than one", "nearly one", "two", "as the images are", "of one class"],
)
def test_a_model_of_one_answer_is_named(labels: list[int], predictions: list[int], words: str | None) -> None:
    row = {"model": "m", "source": "m", "set": "natural", "attack": "clean"}
    pairs = enumerate(zip(labels, predictions, strict=True))
    rows = [{**row, "id": f"{i:03}", "correct": a == b, "label": a, "prediction": b} for i, (a, b) in pairs]
    found = warned(checks.judge(Results(pa.Table.from_pylist(rows), EvaluationConfig(sets=("natural",))), []))
    assert found.keys() == ({"answers"} if words else set())
    assert words is None or words in found["answers"]


@pytest.mark.parametrize(("strong", "weak"), PAIRS)
def test_an_attack_that_is_beaten_by_one_it_contains_is_named(strong: dict[str, Any], weak: dict[str, Any]) -> None:
    rows = [{**strong, "name": "strong"}, {**weak, "name": "weak"}]
    sets: dict[str, Any] = {"sets": ["on_manifold"]} if strong["threat"] == "joint" else {}
    config = EvaluationConfig.model_validate({"sets": ["natural"], "attacks": [{"threat": "clean"}, *rows], **sets})

    def found(strongs: list[bool], weaks: list[bool]) -> dict[str, str]:
        table = rows_of({("m", "m", "clean"): ALL, ("m", "m", "strong"): strongs, ("m", "m", "weak"): weaks})
        table = table.set_column(2, "set", pa.array([config.sets[0]] * table.num_rows))
        return warned(checks.judge(Results(table, config), []))

    assert "strong leaves 100.0%, and weak, which it contains, 50.0%" in found(ALL, HALF)["stronger attacks"]
    assert found(HALF, ALL) == found(HALF, HALF) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"threat": "joint", "eps": 0.05, "latent_eps": 0.1, "steps": 20}, {"threat": "image", "eps": 0.1, "steps": 20}),
        ({"threat": "joint", "eps": 0.1, "latent_eps": 0.05, "steps": 20}, {"threat": "latent", "eps": 0.1, "steps": 20}),
        ({"threat": "image", "eps": 0.2, "steps": 20, "loss": "dlr"}, {"threat": "image", "eps": 0.1, "steps": 20}),
        ({"threat": "image", "eps": 0.2, "steps": 5}, {"threat": "image", "eps": 0.1, "steps": 20}),
        ({"threat": "fog", "eps": 0.5, "wibble_decay": 3, "steps": 20}, {"threat": "fog", "eps": 0.5, "steps": 20}),
        ({"threat": "fog", "eps": 0.5, "steps": 20}, {"threat": "fog", "eps": 0.4, "steps": 20}),  # whose range is another
    ],
)
def test_neither_contains_the_other(one: dict[str, Any], other: dict[str, Any]) -> None:
    rows = EvaluationConfig.model_validate(
        {"sets": ["on_manifold"], "attacks": [{"threat": "clean"}, {**one, "name": "one"}, {**other, "name": "other"}]}
    )
    for beaten, better in (("one", "other"), ("other", "one")):
        table = rows_of({("m", "m", "clean"): ALL, ("m", "m", beaten): ALL, ("m", "m", better): HALF})
        table = table.set_column(2, "set", pa.array(["on_manifold"] * table.num_rows))
        assert warned(checks.judge(Results(table, rows), [])) == {}


def test_attacks_that_do_not_contain_each_other_are_not_compared() -> None:
    rows = [{"threat": "image", "name": "l2", "norm": "l2", "eps": 1}, {"threat": "image", "name": "linf", "eps": 0.1}]
    assert judged(rows, {"clean": ALL, "l2": ALL, "linf": HALF}) == judged(rows, {"clean": ALL, "l2": HALF, "linf": ALL}) == {}


def test_accuracy_that_rises_with_eps_is_named() -> None:
    row = {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 20, "curve": [0.05, 0.2]}
    under = {"clean": ALL, "PGD @ 0.05": HALF, "PGD": HALF, "PGD @ 0.2": ALL}
    assert "PGD @ 0.2 leaves 100.0%" in judged([row], under)["stronger attacks"]


def test_square_that_breaks_what_gradients_left_is_named() -> None:
    rows = [
        {"threat": "autoattack", "name": part, "part": part, "eps": 0.1, "group": "AutoAttack"} for part in ("apgd-ce", "square")
    ]
    left = {"clean": ALL, "apgd-ce": HALF, "square": [True] * 40 + [False] * 10}
    assert "from 50.0% to 40.0%" in judged(rows, left)["black box"]
    assert judged(rows, {**left, "square": [True] * 50}) == {}


def test_square_that_is_stronger_than_gradients_is_named() -> None:
    rows = [
        {"threat": "image", "name": "APGD", "eps": 0.1, "method": "apgd", "steps": 20},
        {"threat": "image", "name": "Square", "eps": 0.1, "method": "square", "steps": 500},
        {"threat": "image", "name": "small", "eps": 0.05, "method": "apgd", "steps": 20},
    ]
    assert (
        "Square, which sees no gradient, leaves 50.0%, and APGD 100.0%"
        in judged(rows, {"clean": ALL, "APGD": ALL, "Square": HALF, "small": ALL})["black box"]
    )
    assert judged(rows, {"clean": ALL, "APGD": HALF, "Square": HALF, "small": ALL}) == {}


def test_images_of_other_models_that_break_more_than_ones_own_are_named() -> None:
    config = EvaluationConfig.model_validate(
        {"sets": ["natural"], "attacks": [{"threat": "clean"}, {"threat": "image", "name": "PGD"}], "transfer": ["PGD"]}
    )
    answers = {(m, m, a): ALL if m == "hides" or a == "clean" else HALF for m in ("hides", "plain") for a in ("clean", "PGD")}
    answers |= {("hides", "plain", "PGD"): HALF, ("plain", "hides", "PGD"): ALL}
    findings = checks.judge(Results(rows_of(answers), config), [])
    assert {f.model: f.level for f in findings if f.check == "transfer"} == {"hides": "warning", "plain": "ok"}


@pytest.mark.parametrize(("first", "second"), [(30, 10), (20, 12), (12, 10), (5, 0), (1, 0), (60, 35)])
def test_fewer_is_mcnemars(first: int, second: int) -> None:
    a = np.array([True] * first + [False] * second + [True] * (200 - first - second))
    b = np.array([False] * first + [True] * second + [True] * (200 - first - second))
    p = scipy.stats.chi2.sf((first - second) ** 2 / (first + second), 1)
    assert checks.significantly_fewer(a, b) == (p < 0.05 and first - second > 2)
