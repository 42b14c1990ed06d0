"""AutoAttack by parts and in batches is, example by example, what the library gives for the whole set in one go."""

import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from robust_digits import CPU, digits_set, robust_network
from torch import nn

from dmat_ray.attack import autoattack
from dmat_ray.config import AutoAttackRow, EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.metrics import Results
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow

SEED, BATCH, COUNT = 3, 8, 14
PARTS = ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.fixture(scope="module")
def data() -> ManifoldSet:
    return digits_set()


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return robust_network()


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """The library's look for dynamic networks ends whatever traces the interpreter, such as a measurement of coverage."""
    before = sys.gettrace()
    yield
    sys.settrace(before)


def shortened(attack: AutoAttack) -> AutoAttack:
    """Minutes less, on both sides."""
    attack.square.n_queries, attack.fab.n_iter = 100, 10
    attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = 3
    return attack


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), pytest.param("l2", 2.0, marks=pytest.mark.exhaustive)])
def test_batches_are_the_librarys(
    robust: nn.Module,
    data: ManifoldSet,
    generator: StyleGAN2,
    norm: str,
    eps: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_parts = autoattack.library

    monkeypatch.setattr(autoattack, "library", lambda *arguments: shortened(of_parts(*arguments)))
    parts = PARTS if norm == "linf" else PARTS[:2]
    rows = [{"threat": "autoattack", "name": p, "part": p, "norm": norm, "eps": eps, "group": "AutoAttack"} for p in parts]
    config = EvaluationConfig.model_validate(
        {"sets": ["natural"], "batch_size": BATCH, "seed": SEED, "attacks": [{"threat": "clean"}, *rows]}
    )
    part = data.take(np.arange(COUNT))
    found = evaluation.evaluate_here(Evaluator(config, part, generator, lambda _: robust, ["m"], CPU))
    results = Results(found, config)

    library = AutoAttack(robust, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=SEED, version="standard")
    shortened(library).logger = logging.getLogger("quiet")
    library.attacks_to_run = parts
    batch = part.batch(np.arange(COUNT), "natural")
    with torch.random.fork_rng():
        x, _ = library.run_standard_evaluation(batch.x_BCHW, batch.y_B, batch_size=BATCH)
    with torch.no_grad():
        expected = (robust(x).argmax(dim=1) == batch.y_B).numpy()
    assert results.correct("m", "natural", "AutoAttack").tolist() == expected.tolist()
    left = [len(results.met("m", "natural", name)[0]) for name in parts]
    assert left == sorted(left, reverse=True)
    assert 0 < expected.sum() < left[0]
    broken = dict(zip(part.id, (x - batch.x_BCHW).flatten(1).norm(dim=1).tolist(), strict=True))
    for row in found.to_pylist():
        if row["attack"] != "clean" and not row["correct"]:
            assert row["l2"] == pytest.approx(broken[row["id"]], rel=1e-4)
        if row["attack"] != "clean":
            assert row["distance"] <= eps * (1 + 1e-4)
            assert row["distance"] == pytest.approx(row[norm], rel=1e-4)


def test_torchs_random_numbers_go_on_as_if_nothing_had_happened(robust: nn.Module, data: ManifoldSet) -> None:
    row = AutoAttackRow(name="AA", part="apgd-ce", eps=0.1, group="AutoAttack")
    batch = data.batch(np.arange(4), "natural")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = autoattack.run(robust, batch, row, seed=0)
    assert torch.equal(torch.rand(3), expected)
    again, _ = autoattack.run(robust, batch, row, seed=0)
    assert torch.equal(first, again)
    assert all(p.requires_grad for p in robust.parameters())


def test_a_part_that_needs_more_classes_is_named() -> None:
    config = EvaluationConfig.model_validate(
        {"attacks": [{"threat": "autoattack", "name": "AA", "part": "apgd-t", "group": "all"}]}
    )
    few = {"shapes": {"on_manifold": [1, 32, 32]}, "class_names": ["cat", "dog"]}
    with pytest.raises(UserError, match="apgd-t needs 4 classes or more, the set has 2; take of apgd-ce, fab, square"):
        evaluation.require_suite(config, few)
