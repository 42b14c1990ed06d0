"""Rows of several models, each attacked and judged by itself, and the LPIPS of rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dmat_ray.config import ClassifierConfig, EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.units import Unit
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import classifiers
from dmat_ray.networks.perceptual import Perceptual

CPU = torch.device("cpu")
Evaluated = Callable[..., list[dict[str, Any]]]


def random_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3).eval()


@pytest.fixture(scope="module")
def data(set_folder: Path) -> ManifoldSet:
    return open_set(set_folder, "test")


@pytest.fixture(scope="module")
def evaluated(data: ManifoldSet, generator: StyleGAN2) -> Evaluated:
    """evaluated(names, steps, **settings): rows of PGD and of clean images, of two random networks that know several classes."""
    x, networks = data.batch(np.arange(len(data)), "natural").x_BCHW, {}
    for seed, name in enumerate(("tiny", "other")):
        network: Any = random_network(seed)
        network.network[-1].bias.data -= network(x).mean(0).detach()
        networks[name] = network

    def rows(names: list[str], steps: int, **settings: Any) -> list[dict[str, Any]]:
        attacks = [{"threat": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.1, "steps": steps}]
        suite = EvaluationConfig.model_validate({"sets": ["natural"], "attacks": attacks, **settings})
        return evaluation.evaluate_here(Evaluator(suite, data, generator, networks.__getitem__, names, CPU)).to_pylist()

    return rows


def test_every_model_is_attacked_through_its_own_copy(evaluated: Evaluated) -> None:
    def losses(*names: str) -> list[float]:
        return [row["loss"] for row in evaluated(list(names), 5) if (row["model"], row["attack"]) == ("other", "PGD")]

    assert losses("tiny", "other") == pytest.approx(losses("other"), rel=1e-5)


def test_transferred_rows_have_the_judges_own_clean_answers(evaluated: Evaluated, data: ManifoldSet) -> None:
    found = evaluated(["tiny", "other"], 2, transfer=["PGD"])
    plain = {(row["model"], row["id"]): row["prediction"] for row in found if row["attack"] == "clean"}
    assert len({plain["tiny", id] == plain["other", id] for id in data.id}) == 2, "they agree on some images, not on all"
    assert all(row["clean_prediction"] == plain[row["model"], row["id"]] for row in found)


@pytest.mark.slow
def test_the_lpips_of_a_row_is_that_of_its_two_images(generator: StyleGAN2) -> None:
    """Of images of 32 pixels a side: the network takes none that are smaller."""
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    levels, w = (images * 255).round().to(torch.uint8).numpy(), np.zeros((3, 1, 1), np.float32)
    data = ManifoldSet(["a", "b", "c"], levels[:0], levels, np.array([0, 1, 2]), w, ("x", "y", "z"), {})
    rows = [{"threat": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.2, "steps": 2}]
    suite = EvaluationConfig.model_validate({"sets": ["natural"], "attacks": rows, "lpips": "alex", "lpips_weights": "random"})
    network = random_network(0)
    evaluator = Evaluator(suite, data, generator, lambda _: network, ["m"], CPU)
    batch, metric = evaluator.batch((0, 1, 2), "natural"), Perceptual("alex", "random").metric
    for row in evaluator.rows.values():
        found = evaluator.table(Unit("m", "natural", row.name, (0, 1, 2)))["lpips"].to_pylist()
        x = evaluator.attacked("m", "natural", row, batch).x_BCHW
        with torch.no_grad():
            expected = metric(x * 2 - 1, batch.x_BCHW * 2 - 1).flatten().tolist()
        assert found == pytest.approx(expected, abs=1e-5)
    assert min(found) > 1e-3, "PGD's are not zero"
