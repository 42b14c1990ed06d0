"""Evaluation rows: the same for any split of the work, and true to the images they stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
import torch
from pydantic import ValidationError
from torch import nn

from dmat_ray.config import ClassifierConfig, EvaluationConfig
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation, units
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.units import Unit
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import classifiers
from dmat_ray.storage import at

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
SORT = [(name, "ascending") for name in ("model", "source", "set", "attack", "id")]
GROUP = [
    {"threat": "image", "name": "weak", "eps": 0.02, "steps": 1, "group": "both"},
    {"threat": "image", "name": "strong", "eps": 0.1, "steps": 5, "group": "both"},
]


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


Make = Callable[..., Evaluator]


@pytest.fixture(scope="module")
def make(network: nn.Module, generator: StyleGAN2, data: ManifoldSet) -> Make:
    """make(**changes of the suite's settings): an evaluator of the network, called tiny."""

    def made(**changes: Any) -> Evaluator:
        suite = EvaluationConfig.model_validate({**SUITE.model_dump(), **changes})
        return Evaluator(suite, data, generator, lambda name: network, ["tiny"], CPU)

    return made


@pytest.fixture(scope="module")
def rows(make: Make) -> pa.Table:
    """The whole suite on both test sets, all examples in one batch."""
    return evaluation.evaluate_here(make(batch_size=100))


def select(rows: pa.Table, set_name: str, attack: str) -> dict[str, np.ndarray]:
    keep = pa.compute.and_(pa.compute.equal(rows["set"], set_name), pa.compute.equal(rows["attack"], attack))
    return {name: rows.filter(keep)[name].to_numpy() for name in rows.column_names}


def test_images_that_are_left_out_are_told(write_any_set: Any, tmp_path: Path) -> None:
    assert evaluation.left_out(read_manifest(at(write_any_set(tmp_path / "fine", noise=1)))) == ""
    poor = write_any_set(tmp_path / "poor", noise=46)
    rows = pa.concat_tables([pq.read_table(path) for path in (poor / "shards").glob("*.parquet")]).to_pylist()
    test = [row["status"] for row in rows if row["split"] == "test"]
    assert 0 < test.count("poor") < len(test)
    manifest = read_manifest(at(poor))
    told = evaluation.left_out(manifest)
    assert told.startswith(f"{test.count('poor')} of {len(test)} test images were projected poorly")
    lost = evaluation.left_out({**manifest, "classes_without_usable": {"train": ["2"], "test": ["0", "3"]}})
    assert lost == f"{told}; no number says anything of '0', '3', of which no test image is usable"


def test_rows_do_not_depend_on_the_split_of_the_work(make: Make, rows: pa.Table) -> None:
    evaluator = make()
    parts = units.units(["tiny"], [*evaluator.rows], SUITE, lambda *_: np.arange(12))
    assert [u.positions for u in parts if (u.set, u.attack) == ("natural", "PGD")] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11)]
    split = pa.concat_tables([evaluator.table(unit) for unit in reversed(parts)]).sort_by(SORT)
    whole = rows.sort_by(SORT)
    for name in rows.column_names:
        if name == "seconds":
            continue
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


def test_images_come_with_their_rows(network: nn.Module, make: Make) -> None:
    evaluator = make()
    batch = evaluator.batch(range(4), "on_manifold")
    for row in evaluator.rows.values():
        table = evaluator.table(Unit("tiny", "on_manifold", row.name, (0, 1, 2, 3)))
        x = evaluator.attacked("tiny", "on_manifold", row, batch).x_BCHW
        with torch.no_grad():
            assert network(x).argmax(dim=1).tolist() == table["prediction"].to_pylist()
        moved = (x - batch.x_BCHW).flatten(1).numpy()
        np.testing.assert_allclose(table["l2"].to_numpy(), np.linalg.norm(moved, axis=1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(table["linf"].to_numpy(), np.abs(moved).max(axis=1), rtol=1e-5, atol=1e-7)


def test_the_seed_moves_random_starts(make: Make, rows: pa.Table) -> None:
    found = evaluation.evaluate_here(make(seed=1, sets=["natural"]))
    assert select(found, "natural", "clean")["loss"].tolist() == select(rows, "natural", "clean")["loss"].tolist()
    assert select(found, "natural", "PGD")["loss"].tolist() != select(rows, "natural", "PGD")["loss"].tolist()
    assert set(found["seed"].to_pylist()) == {1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_puts_out_no_numbers_is_named(generator: StyleGAN2, data: ManifoldSet, value: float) -> None:
    broken = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3).eval()
    with torch.no_grad():
        broken.network[-1].bias.fill_(value)
    with pytest.raises(UserError, match="model 'broken' puts out values that are not finite"):
        evaluation.evaluate_here(Evaluator(SUITE, data, generator, lambda name: broken, ["broken"], CPU))


def test_a_model_of_other_outputs_is_named(generator: StyleGAN2, data: ManifoldSet) -> None:
    other = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=5)
    with pytest.raises(UserError, match=r"model 'other' puts out \[5, 5\] for 5 images of 3 classes"):
        evaluation.evaluate_here(Evaluator(SUITE, data, generator, lambda name: other, ["other"], CPU))


def test_a_row_of_a_group_meets_what_stands(make: Make, data: ManifoldSet) -> None:
    suite = {"sets": ["natural"], "attacks": [{"threat": "clean", "name": "as it is"}, *GROUP]}
    assert units.rounds(EvaluationConfig.model_validate(suite)) == [["as it is"], ["weak"], ["strong"]]
    found = evaluation.evaluate_here(make(**suite))
    right = {
        name: dict(zip(part["id"], part["correct"], strict=True))
        for name in ("as it is", "weak", "strong")
        for part in [select(found, "natural", name)]
    }
    standing = [id for id in data.id if right["as it is"][id]]
    assert 0 < len(standing) < len(data)
    assert sorted(right["weak"]) == standing
    assert sorted(right["strong"]) == [id for id in standing if right["weak"][id]]
    alone = evaluation.evaluate_here(make(sets=["natural"], attacks=[{**row, "group": ""} for row in GROUP]))
    assert "clean" in alone["attack"].to_pylist(), "what all is compared with is missing"
    for name in ("weak", "strong"):
        part = select(alone, "natural", name)
        expected = {id: ok for id, ok in zip(part["id"], part["correct"], strict=True) if id in right[name]}
        assert right[name] == expected


def test_a_curve_is_the_attack_at_other_radii(make: Make) -> None:
    plain = {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 3, "step_size": 0.04}
    found = evaluation.evaluate_here(make(sets=["natural"], attacks=[{**plain, "curve": [0, 0.05, 0.2]}]))
    for eps in (0.05, 0.2):
        largest = select(found, "natural", f"PGD @ {eps:g}")["linf"].max()
        assert largest == pytest.approx(eps, rel=0.3)
        other = evaluation.evaluate_here(make(sets=["natural"], attacks=[{**plain, "eps": eps, "step_size": 0.04 * eps / 0.1}]))
        np.testing.assert_allclose(
            select(found, "natural", f"PGD @ {eps:g}")["loss"], select(other, "natural", "PGD")["loss"], rtol=1e-4
        )
    assert (select(found, "natural", "PGD @ 0")["linf"] == 0).all()


def test_a_step_in_the_threats_own_units_is_as_long_at_every_eps() -> None:
    rows = [
        {"threat": "fog", "name": "fog", "eps": 0.5, "step_size": 0.05, "curve": [0.1]},
        {"threat": "joint", "name": "joint", "eps": 0.1, "step_size": 0.2, "curve": [0.02]},
        {"threat": "elastic", "name": "elastic", "eps": 0.5, "step_size": 0.1, "curve": [0.1]},
    ]
    found = units.rows_to_run(EvaluationConfig.model_validate({"attacks": rows}))
    steps = {name: row.step_size for name, row in found.items() if "@" in name}  # type: ignore[union-attr]
    assert steps == {"fog @ 0.1": 0.05, "joint @ 0.02": 0.2, "elastic @ 0.1": pytest.approx(0.02)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attacks": [{"threat": "image", "name": "clean"}]}, "'clean' is the name of the row without an attack"),
        ({"attacks": [{"threat": "image", "name": "a", "group": "clean"}]}, "choose another for the group"),
        ({"summaries": [{"name": "s", "of": ["clean"], "trained": [0.5]}]}, "belongs to uar"),
        ({"attacks": [{"threat": "image", "name": "a", "restarts": 2, "random_start": False}]}, "copies of one search"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationConfig.model_validate(settings)


def test_the_model_itself_judges_what_its_copy_is_attacked_with(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes every image for broken after one search: the model says that most stand, and they are searched again."""
    row = {"threat": "image", "name": "PGD", "eps": 0.003, "steps": 2, "early_exit": True}

    def losses(restarts: int) -> np.ndarray:
        evaluator = make(sets=["natural"], batch_size=100, attacks=[{**row, "restarts": restarts}])
        network = evaluator.network("tiny")

        class Wrong(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = network(x)
                worst = nn.functional.one_hot((labels[: len(x)] + 1) % 3, 3) * 1000.0
                return logits + worst

        labels = evaluator.batch(range(len(evaluator.data)), "natural").y_B
        monkeypatch.setattr(evaluator, "seen_by_attacks", lambda model: Wrong().eval())
        return select(evaluation.evaluate_here(evaluator), "natural", "PGD")["loss"]

    assert (losses(4) != losses(1)).any()


def test_images_that_fool_one_model_are_shown_to_the_others(network: nn.Module, generator: StyleGAN2, data: ManifoldSet) -> None:
    torch.manual_seed(1)
    networks = {"tiny": network, "other": classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3)}
    suite = SUITE.model_copy(update={"transfer": ("PGD",), "sets": ("natural",)})
    evaluator = Evaluator(suite, data, generator, networks.__getitem__, list(networks), CPU)
    found = evaluation.evaluate_here(evaluator)
    crossed = found.filter(pa.compute.not_equal(found["model"], found["source"]))
    assert set(crossed["attack"].to_pylist()) == {"PGD"}
    assert crossed.num_rows == 2 * len(data)
    batch = evaluator.batch(range(len(data)), "natural")
    for source, judge in (("tiny", "other"), ("other", "tiny")):
        x = evaluator.attacked(source, "natural", evaluator.rows["PGD"], batch).x_BCHW
        with torch.no_grad():
            expected = networks[judge](x).argmax(dim=1).tolist()
        mine = crossed.filter(pa.compute.equal(crossed["source"], source)).sort_by("id")
        assert sum(a == b for a, b in zip(mine["prediction"].to_pylist(), expected, strict=True)) >= len(data) - 1


def test_a_limit_takes_the_same_examples_every_time(make: Make, data: ManifoldSet) -> None:
    few, more = (units.chosen(data.id, SUITE.model_copy(update={"limit": n})) for n in (4, 7))
    assert (len(few), len(more)) == (4, 7)
    assert set(few) < set(more)
    assert set(units.chosen(data.id, SUITE.model_copy(update={"limit": 4, "seed": 1}))) != set(few)
    found = evaluation.evaluate_here(make(limit=4, sets=["natural"]))
    assert sorted(select(found, "natural", "PGD")["id"]) == sorted(data.id[i] for i in few)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"threat": "latent", "loss": "dlr", "targets": 2}, "dlr with targets needs 4 classes or more"),
        ({"threat": "snow", "method": "square"}, "square"),
        ({"threat": "joint", "method": "square"}, "square"),
        ({"threat": "fog", "method": "lagrange"}, "lagrange"),
        ({"threat": "image", "method": "random", "random_start": False}, "random"),
        ({"threat": "corruption", "kind": "fog", "severity": 1}, "16"),
        ({"threat": "perceptual", "weights": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_a_row_that_cannot_run_is_named_before_anything_runs(data: ManifoldSet, row: dict[str, Any], words: str) -> None:
    config = EvaluationConfig.model_validate({"attacks": [{"threat": "clean"}, {"name": "mine", **row}]})
    with pytest.raises(UserError, match=f"attack 'mine' on 1 x 8 x 8 images of 3 classes: .*{words}"):
        evaluation.require_suite(config, data.manifest)


def test_a_summary_of_what_is_no_whole_column_is_refused_when_it_is_run(data: ManifoldSet) -> None:
    """Not before: the settings of a model that was trained earlier may have one, and it can still be loaded."""
    rows = [{"threat": "clean"}, {"threat": "image", "name": "DLR", "loss": "dlr", "group": "both"}]
    summary = {"name": "mean", "how": "mean", "of": ["DLR"]}
    config = EvaluationConfig.model_validate({"attacks": rows, "summaries": [summary]})
    with pytest.raises(UserError, match=r"evaluation\.summaries: mean names 'DLR', which .*; name the group 'both'"):
        evaluation.require_suite(config, data.manifest)


def test_lpips_of_images_that_it_cannot_take_is_refused_before_anything_runs(data: ManifoldSet) -> None:
    suite = {"attacks": [{"threat": "clean"}], "lpips": "alex", "lpips_weights": "random"}
    with pytest.raises(UserError, match=r"LPIPS needs images of 32 pixels or more, the set's have 8; set evaluation\.lpips none"):
        evaluation.require_suite(EvaluationConfig.model_validate(suite), data.manifest)


def test_a_units_key_changes_with_the_weights_it_needs(tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    weights = tmp_path / "alex.pth"
    config = SUITE.model_copy(update={"lpips": "alex", "lpips_weights": str(weights)})
    keys = []
    with s3.serving(tmp_path / "s3") as server:
        server.put("bucket", {})
        for place in (str(weights), "s3://bucket/alex.pth"):
            config = SUITE.model_copy(update={"lpips": "alex", "lpips_weights": place})
            for content in (b"1", b"2"):
                at(place).write_bytes(content)
                facts = {"set": "a", "models": {"tiny": "b"}, "weights": units.weights_of(config)}
                keys.append(units.key_of(Unit("tiny", "natural", "PGD", (0, 1)), config, facts))
    assert len(set(keys)) == 4


def test_a_units_key_changes_with_what_its_rows_depend_on() -> None:
    facts = {"set": "a", "models": {"tiny": "b", "other": "c"}, "generator_precision": "fast"}
    unit = Unit("tiny", "natural", "PGD", (0, 1))
    key = units.key_of(unit, SUITE, facts)
    harder = [row.model_copy(update={"steps": 9}) if row.name == "PGD" else row for row in SUITE.attacks]
    same = [
        SUITE.model_copy(update={"batch_size": 50, "check_examples": 3}),
        SUITE.model_copy(update={"attacks": SUITE.attacks[:2]}),
    ]
    assert {units.key_of(unit, config, facts) for config in same} == {key}
    assert units.key_of(unit, SUITE, {**facts, "models": {"tiny": "b", "other": "d"}}) == key
    changed = [
        units.key_of(Unit("tiny", "natural", "PGD", (0, 2)), SUITE, facts),
        units.key_of(unit, SUITE.model_copy(update={"attacks": tuple(harder)}), facts),
        units.key_of(unit, SUITE.model_copy(update={"seed": 1}), facts),
        units.key_of(unit, SUITE.model_copy(update={"precision": "bf16"}), facts),
        units.key_of(unit, SUITE.model_copy(update={"lpips": "alex"}), facts),
        units.key_of(unit, SUITE.model_copy(update={"transfer": ("PGD",)}), facts),
        *(units.key_of(unit, SUITE, {**facts, name: "z"}) for name in ("set", "generator_precision")),
        units.key_of(unit, SUITE, {**facts, "models": {"tiny": "z", "other": "c"}}),
    ]
    assert len({key, *changed}) == 1 + len(changed)


def test_a_suite_that_leaves_natural_images_without_an_attack_is_refused() -> None:
    latent: dict[str, Any] = {"attacks": [{"threat": "latent", "name": "OM-PGD"}]}
    with pytest.raises(ValidationError, match="natural"):
        EvaluationConfig.model_validate(latent)
    assert EvaluationConfig.model_validate({**latent, "sets": ["on_manifold"]}).sets == ("on_manifold",)


def test_models_of_other_classes_or_shapes_are_refused(data: ManifoldSet) -> None:
    run = {"class_names": list(data.class_names), "channels": 1, "resolution": 8}
    evaluation.require_fit(run, data.manifest, "tiny", SUITE)
    with pytest.raises(UserError, match="model 'tiny' knows the classes cat, dog, the set has dark, light"):
        evaluation.require_fit({**run, "class_names": ["cat", "dog"]}, data.manifest, "tiny", SUITE)
    with pytest.raises(UserError, match="model 'tiny' takes 3x8x8 images"):
        evaluation.require_fit({**run, "channels": 3}, data.manifest, "tiny", SUITE)
