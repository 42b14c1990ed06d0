"""Evaluation rows: the same for any split of the work, and true to the images they stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dmat_ray import classifiers, evaluation
from dmat_ray.config import ClassifierConfig, EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.errors import UserError
from dmat_ray.evaluation import Chunk
from dmat_ray.manifold.stylegan2 import StyleGAN2

CPU = torch.device("cpu")
SUITE = EvaluationConfig.model_validate(
    {
        "batch_size": 5,
        "attacks": [
            {"threat": "clean"},
            {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 3},
            {"threat": "image", "name": "PGD L2", "norm": "l2", "eps": 0.8, "steps": 3, "restarts": 2},
            {"threat": "latent", "name": "OM-PGD", "eps": 0.3, "steps": 3},
            {"threat": "fog", "name": "fog", "eps": 0.5, "steps": 3},
        ],
    }
)


@pytest.fixture(scope="module")
def data(set_folder: Path) -> ManifoldSet:
    return open_set(set_folder, "test")


@pytest.fixture(scope="module")
def network(data: ManifoldSet) -> nn.Module:
    """Random weights; batch norm has seen the set, so that predictions differ between images."""
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3)
    x = data.batch(np.arange(len(data)), "natural").x_BCHW
    with torch.no_grad():
        for _ in range(50):
            network(x)
        network.network[-1].bias -= network.eval()(x).mean(dim=0)
    return network


@pytest.fixture(scope="module")
def rows(network: nn.Module, generator: StyleGAN2, data: ManifoldSet) -> pa.Table:
    """The whole suite on both test sets, a chunk of all examples each."""
    whole = [Chunk("tiny", name, 0, len(data)) for name in ("on_manifold", "natural")]
    return pa.concat_tables([evaluation.evaluate_chunk(network, generator, data, c, SUITE, CPU) for c in whole])


def select(rows: pa.Table, set_name: str, attack: str) -> dict[str, np.ndarray]:
    keep = pa.compute.and_(pa.compute.equal(rows["set"], set_name), pa.compute.equal(rows["attack"], attack))
    return {name: rows.filter(keep)[name].to_numpy() for name in rows.column_names}


def test_rows_do_not_depend_on_the_split_of_the_work(
    network: nn.Module, generator: StyleGAN2, data: ManifoldSet, rows: pa.Table
) -> None:
    parts = evaluation.chunks(["tiny"], SUITE, len(data))
    assert [(c.start, c.stop) for c in parts if c.set == "natural"] == [(0, 5), (5, 10), (10, 12)]
    tables = [evaluation.evaluate_chunk(network, generator, data, c, SUITE, CPU) for c in reversed(parts)]
    split = pa.concat_tables(tables).sort_by(evaluation.SORT)
    whole = rows.sort_by(evaluation.SORT)
    for name in rows.column_names:
        if pa.types.is_floating(rows.schema.field(name).type):
            np.testing.assert_allclose(split[name].to_numpy(), whole[name].to_numpy(), atol=1e-4)
        else:
            assert split[name].to_pylist() == whole[name].to_pylist()


def test_there_is_one_row_for_each_attack_that_applies(rows: pa.Table, data: ManifoldSet) -> None:
    found = {(s, a) for s, a in zip(rows["set"].to_pylist(), rows["attack"].to_pylist(), strict=True)}
    names = {"clean", "PGD", "PGD L2", "fog"}
    assert found == {("natural", n) for n in names} | {("on_manifold", n) for n in {*names, "OM-PGD"}}
    assert rows.num_rows == 9 * len(data)
    assert rows.schema.equals(evaluation.SCHEMA)
    assert select(rows, "natural", "PGD")["id"].tolist() == data.id


@pytest.mark.parametrize("set_name", ["on_manifold", "natural"])
def test_clean_rows_are_the_networks_plain_answers(network: nn.Module, data: ManifoldSet, rows: pa.Table, set_name: str) -> None:
    clean = select(rows, set_name, "clean")
    batch = data.batch(np.arange(len(data)), set_name)
    with torch.no_grad():
        logits = network(batch.x_BCHW).numpy()
    assert [clean[name].tolist() for name in ("distance", "linf", "l2")] == [[0.0] * len(data)] * 3
    assert clean["prediction"].tolist() == logits.argmax(axis=1).tolist() == clean["clean_prediction"].tolist()
    assert clean["correct"].tolist() == (logits.argmax(axis=1) == data.label).tolist()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(clean["loss"], -np.log(softmax[np.arange(len(data)), data.label]), rtol=1e-4)
    assert len(set(clean["prediction"])) > 1


def test_distances_are_within_budgets(rows: pa.Table) -> None:
    for set_name in ("on_manifold", "natural"):
        linf, l2 = select(rows, set_name, "PGD"), select(rows, set_name, "PGD L2")
        assert 0.05 < linf["linf"].max() <= 0.1 + 1e-6
        assert 0.4 < l2["l2"].max() <= 0.8 + 1e-5
        np.testing.assert_allclose(linf["distance"], linf["linf"], atol=1e-6)
        np.testing.assert_allclose(l2["distance"], l2["l2"], rtol=1e-5)
    latent = select(rows, "on_manifold", "OM-PGD")
    assert 0.15 < latent["distance"].max() <= 0.3 + 1e-6
    assert latent["linf"].min() > 0
    assert select(rows, "natural", "fog")["distance"].max() <= 1 + 1e-6


def test_margin_says_what_correct_says(rows: pa.Table) -> None:
    correct, margin = rows["correct"].to_numpy(), rows["margin"].to_numpy()
    assert (correct == (margin > 0)).all()
    assert 0 < correct.mean() < 1
    prediction, label = rows["prediction"].to_numpy(), rows["label"].to_numpy()
    assert (correct == (prediction == label)).all()


def test_attacks_raise_the_loss(rows: pa.Table) -> None:
    for set_name, names in (("on_manifold", ("PGD", "PGD L2", "OM-PGD")), ("natural", ("PGD", "PGD L2"))):
        clean = select(rows, set_name, "clean")["loss"]
        for name in names:
            assert (select(rows, set_name, name)["loss"] > clean).mean() > 0.9


def test_images_come_with_their_rows(network: nn.Module, generator: StyleGAN2, data: ManifoldSet) -> None:
    batch = data.batch(np.arange(4), "on_manifold")
    for table, x in evaluation.rows_of(network, generator, batch, SUITE, "tiny", "on_manifold"):
        with torch.no_grad():
            assert network(x).argmax(dim=1).tolist() == table["prediction"].to_pylist()
        moved = (x - batch.x_BCHW).flatten(1).numpy()
        np.testing.assert_allclose(table["l2"].to_numpy(), np.linalg.norm(moved, axis=1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(table["linf"].to_numpy(), np.abs(moved).max(axis=1), rtol=1e-5, atol=1e-7)


def test_the_seed_moves_random_starts(network: nn.Module, generator: StyleGAN2, data: ManifoldSet, rows: pa.Table) -> None:
    chunk, other = Chunk("tiny", "natural", 0, len(data)), SUITE.model_copy(update={"seed": 1})
    found = evaluation.evaluate_chunk(network, generator, data, chunk, other, CPU)
    assert select(found, "natural", "clean")["loss"].tolist() == select(rows, "natural", "clean")["loss"].tolist()
    assert select(found, "natural", "PGD")["loss"].tolist() != select(rows, "natural", "PGD")["loss"].tolist()
    assert set(found["seed"].to_pylist()) == {1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_puts_out_no_numbers_is_named(generator: StyleGAN2, data: ManifoldSet, value: float) -> None:
    broken = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3).eval()
    with torch.no_grad():
        broken.network[-1].bias.fill_(value)
    with pytest.raises(UserError, match="model 'broken' puts out values that are not finite"):
        evaluation.evaluate_chunk(broken, generator, data, Chunk("broken", "natural", 0, 3), SUITE, CPU)


def test_a_suite_that_leaves_natural_images_without_an_attack_is_refused() -> None:
    latent: dict[str, Any] = {"attacks": [{"threat": "latent", "name": "OM-PGD"}]}
    with pytest.raises(ValidationError, match="natural"):
        EvaluationConfig.model_validate(latent)
    assert EvaluationConfig.model_validate({**latent, "sets": ["on_manifold"]}).sets == ("on_manifold",)


def test_models_of_other_classes_or_shapes_are_refused(data: ManifoldSet) -> None:
    run = {"class_names": list(data.class_names), "channels": 1, "resolution": 8}
    evaluation.require_fit(run, data, "tiny")
    with pytest.raises(UserError, match="model 'tiny' knows the classes cat, dog, the set has dark, light"):
        evaluation.require_fit({**run, "class_names": ["cat", "dog"]}, data, "tiny")
    with pytest.raises(UserError, match="model 'tiny' takes 3x8x8 images"):
        evaluation.require_fit({**run, "channels": 3}, data, "tiny")
