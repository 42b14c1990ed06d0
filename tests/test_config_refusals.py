"""Settings that are refused: unknown, out of range, of another norm or scale, or such that nothing could come of them."""

import re
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from dmat_ray.attack import require_possible
from dmat_ray.config import (
    ON_MANIFOLD,
    THREATS,
    AutoAttackRow,
    Config,
    EvaluationConfig,
    ImageThreat,
    JointThreat,
    ObjectiveConfig,
    Section,
)
from dmat_ray.config.attacks import TERMS
from dmat_ray.config.evaluation import ROWS
from dmat_ray.config.threats import named
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.types import Batch
from dmat_ray.validated import validate


@pytest.mark.parametrize("text", ["8/0", "a/255", "1/2/3", "/", "8 of 255", "-1/255", "nan/1", "inf/1", None, ""])
def test_wrong_fractions_are_refused(text: Any) -> None:
    with pytest.raises(ValidationError, match="eps"):
        ImageThreat.model_validate({"eps": text})


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"objective": {"image": {"epsilon": 0.1}}},
        {"training": {"learning_rate": 0.1}},
        {"evaluation": {"attacks": [{"threat": "image", "name": "a", "wibble_decay": 2}]}},
    ],
)
def test_unknown_keys_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Config.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"output": ""},
        {"data": {"resolution": 4}},
        {"data": {"channels": 2}},
        {"data": {"test_share": 0}},
        {"data": {"test_share": 1}},
        {"data": {"train_limit": 0}},
        {"data": {"seed": -1}},
        {"objective": {"image": {"eps": -0.1}}},
        {"objective": {"image": {"eps": 8}}},
        {"name": "../elsewhere"},
        {"tracking": {"uri": "http://me:secret@127.0.0.1:5000"}},
        {"methods": []},
        {"objective": {"image": {"eps": float("nan")}}},
        {"objective": {"image": {"eps": float("inf")}}},
        {"objective": {"image": {"steps": 0}}},
        {"objective": {"image": {"step_size": 0}}},
        {"objective": {"image": {"restarts": 0}}},
        {"objective": {"image": {"norm": "l0"}}},
        {"objective": {"latent": {"weight": -1}}},
        {"objective": {"label_smoothing": 1}},
        {"training": {"epochs": 0}},
        {"training": {"epochs": 1.5}},
        {"training": {"momentum": 1}},
        {"training": {"lr_epochs": [0, 1], "lr_values": [0.1]}},
        {"training": {"lr_epochs": [0], "lr_values": [0.1]}},
        {"training": {"lr_epochs": [1, 0], "lr_values": [0.1, 0.2]}},
        {"training": {"lr_epochs": [0, 0], "lr_values": [0.1, 0.2]}},
        {"training": {"lr_epochs": [0, 1], "lr_values": [0.1, -0.2]}},
        {"projection": {"lpips": 0, "l1": 0, "l2": 0}},
        {"projection": {"steps": 0}},
        {"evaluation": {"attacks": []}},
        {"evaluation": {"sets": []}},
        {"evaluation": {"sets": ["train"]}},
        {"evaluation": {"attacks": [{"threat": "clean", "name": "a"}, {"threat": "image", "name": "a"}]}},
        {"evaluation": {"attacks": [{"threat": "rain", "name": "a"}]}},
        {"evaluation": {"attacks": [{"threat": "image"}]}},
        {"gan": {"architecture": {"resolution": 24}}},
        {"gan": {"architecture": {"num_classes": 65, "z_dim": 64}}},
        {"cluster": {"train_workers": 0}},
        {"cluster": {"gpus_per_worker": 1.5}},
        {"data": []},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate(values)


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("training", "epochs", True, "must be a whole number (found 'true')"),
        ("training", "val_examples", False, "must be a whole number (found 'false')"),
        ("training", "clip_norm", True, "must be a number (found 'true')"),
        ("training", "lr_values", [0, True], "must be a number (found 'true')"),
        ("data", "channels", True, "must be 1 or 3 (found 'true')"),
        ("cluster", "gpus_per_worker", True, "must be a number (found 'true')"),
    ],
)
def test_true_and_false_are_no_numbers(section: str, name: str, value: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"^{section}\.{name}(\.1)?: {re.escape(told)}$"):
        validate({section: {name: value}})
    assert validate({"data": {"official_split": True}}).data.official_split is True


def test_all_weights_zero_names_the_choices() -> None:
    with pytest.raises(ValidationError, match="clean, image, latent, fog"):
        ObjectiveConfig.model_validate({"clean": {"weight": 0}})


def test_kl_without_random_start_is_refused() -> None:
    values: dict[str, Any] = {"image": {"weight": 1, "divergence": "kl", "random_start": False}}
    with pytest.raises(ValidationError, match="random_start"):
        ObjectiveConfig.model_validate(values)
    values["image"]["weight"] = 0
    assert ObjectiveConfig.model_validate(values).image.divergence == "kl"


def test_steps_that_do_not_reach_the_border_are_refused() -> None:
    """As a preset's step does that another eps stands beside: a training on it would pass for one at that radius."""
    short = {"eps": 0.2, "steps": 3, "step_size": 0.05}
    told = r"3 steps of step_size 0\.05 end 0\.15 from where they begin, and eps is 0\.2: .* or 0\.0667 or more"
    with pytest.raises(ValidationError, match=told):
        ObjectiveConfig.model_validate({"image": {**short, "weight": 1}})
    with pytest.raises(ValidationError, match=told):
        EvaluationConfig.model_validate({"attacks": [{"threat": "latent", "name": "mine", **short}]})
    for other in ({"weight": 0}, {"step_size": None}, {"step_size": 0.2 / 3}, {"steps": 4}, {"method": "apgd"}):
        ObjectiveConfig.model_validate({"image": {**short, "weight": 1, **other}})
    # joint's steps are shares of both radii, whatever these are
    joint = {"threat": "joint", "eps": 8 / 255, "latent_eps": 0.02, "steps": 10}
    told = r"10 steps of step_size 0\.00392 end 0\.0392 .*, and the radius, of which a step is a share, is 1: .* or 0\.1 or more"
    with pytest.raises(ValidationError, match=told):
        ObjectiveConfig.model_validate({"more": {"joint": {**joint, "weight": 1, "step_size": 1 / 255}}})
    with pytest.raises(ValidationError, match=told):
        EvaluationConfig.model_validate({"attacks": [{**joint, "name": "mine", "step_size": "1/255"}]})
    for step in (None, 0.1):
        ObjectiveConfig.model_validate({"more": {"joint": {**joint, "weight": 1, "step_size": step}}})
    # those of a curve grow with eps
    EvaluationConfig.model_validate({"attacks": [{"threat": "image", "name": "mine", **short, "eps": 0.15, "curve": [0.3]}]})
    # in a unit box they are refused where they would be made, since models have recorded such settings
    blank = Batch(["blank"], torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64))
    least = r"the least that makes sense in a unit box is 0\.4"
    told = rf"20 steps of step_size 0\.00392 end 0\.0784 .* {least}: .*2\.5 boxes / steps\), or 0\.02 or more"
    for threat in ("fog", "snow", "gabor"):
        box = {"threat": threat, "steps": 20, "step_size": 1 / 255}
        term = ObjectiveConfig.model_validate({"more": {"box": {**box, "weight": 1}}}).more["box"]
        row, *others = [
            ROWS[threat].model_validate({**box, "name": "mine", **other})
            for other in (
                {},
                {"step_size": None},
                {"step_size": 0.02},
                {"steps": 103},
                {"steps": 200, "step_size": (0.001 / 200) ** 0.5},
                {"method": "apgd"},
            )
        ]
        for search in (term, row):
            with pytest.raises(UserError, match=told):
                require_possible(search, blank, Draws(0, blank.id, "test"))
        for search in others:
            require_possible(search, blank, Draws(0, blank.id, "test"))


WITH_UNITS = [
    (kind, unit)
    for kind in (*THREATS, *TERMS.values(), *ROWS.values(), AutoAttackRow)
    for unit in ("norm", "scale")
    if unit in kind.model_fields
]
IN_WORDS = {"raw": "raw W", "std": "standard deviations of w"}


@pytest.mark.parametrize(("kind", "unit"), WITH_UNITS, ids=lambda value: getattr(value, "__name__", value))
def test_a_norm_or_a_scale_comes_with_a_radius_of_its_own(kind: type[Section], unit: str) -> None:
    """The default is a radius in the default unit: in another one it is hardly an attack, or one without bounds."""
    needed = {name: "mine" for name, field in kind.model_fields.items() if field.is_required()}
    field = kind.model_fields[unit]
    usual, others = field.default, set(get_args(field.annotation)) - {field.default}
    assert others
    radius = "latent_eps" if unit == "scale" and "latent_eps" in kind.model_fields else "eps"
    assert kind.model_validate({**needed, unit: usual}) == kind.model_validate(needed)
    for other in others:
        before, after = (IN_WORDS.get(value, value) for value in (usual, other))
        with pytest.raises(ValidationError, match=rf"{radius} [\d.]+ is a radius in {before}; give one in {after}"):
            kind.model_validate({**needed, unit: other})
        found = kind.model_validate({**needed, unit: other, radius: 0.5})
        assert kind.model_validate(found.model_dump()) == kind.model_validate_json(found.model_dump_json()) == found
        # as dumped, the default itself is a radius, too: models have recorded such settings
        recorded = {**kind.model_validate(needed).model_dump(), unit: other}
        assert kind.model_validate(recorded).model_dump() == recorded


def test_every_threat_of_w_has_its_radius_held_to_its_scale() -> None:
    scaled = {kind for kind, unit in WITH_UNITS if unit == "scale"}
    assert scaled == {kind for move in ON_MANIFOLD for kind in (move, TERMS[named(move)], ROWS[named(move)])}
    with pytest.raises(ValidationError, match=r"latent_eps 0\.02 is a radius in raw W; .* standard deviations of w "):
        JointThreat.model_validate({"scale": "std", "eps": 0.1})


@pytest.mark.parametrize("name", ["image", "latent"])
def test_attacks_on_held_out_images_reach_the_border_too(name: str) -> None:
    """Whatever their weight: by them the epoch is chosen that is kept."""
    values = {"objective": {name: {"eps": 0.3, "steps": 3, "step_size": 0.05}}, "training": {"val_examples": 100}}
    with pytest.raises(
        ValidationError, match=rf"objective\.{name}, by which held-out images are attacked: 3 steps of step_size 0\.05"
    ):
        Config.model_validate(values)
    Config.model_validate({**values, "training": {"val_examples": 0}})
    if name == "latent":
        Config.model_validate({**values, "training": {"val_examples": 100, "images": "natural"}})


@pytest.mark.parametrize("std", [0.0, -0.5])
def test_a_deviation_that_cannot_divide_is_refused(std: float) -> None:
    with pytest.raises(ValidationError, match="must be above 0"):
        Config.model_validate({"classifier": {"std": [0.5, std, 0.5]}})


@pytest.mark.parametrize("values", [{"threat": "filter", "size": 4}, {"threat": "recolor", "grid": [1, 2, 2]}])
def test_terms_and_rows_are_held_to_what_their_threat_says(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"odd size|two knots or more"):
        ObjectiveConfig.model_validate({"more": {"mine": values}})
    with pytest.raises(ValidationError, match=r"odd size|two knots or more"):
        EvaluationConfig.model_validate({"attacks": [{"name": "mine", **values}]})


@pytest.mark.parametrize(
    ("threat", "curve", "words"),
    [
        ("image", [0.01, 2], r"curve, eps 2: .*pixels are in \[0, 1\]; did you mean 2/255"),
        ("fog", [4], "curve, eps 4: Input should be less than or equal to 1"),
        ("image", ["-4/255"], "curve, eps -0.0157: Input should be greater than or equal to 0"),
        ("image", [0.123412, 0.123414], "0.123412 and 0.123414 are one in the four digits"),
    ],
)
def test_points_of_a_curve_take_no_eps_that_their_row_would_not(threat: str, curve: list[Any], words: str) -> None:
    row = {"threat": threat, "name": "row", "eps": 0.1}
    evaluation = {"attacks": [{"threat": "clean"}, {**row, "curve": [0.05, 0.05, "1/4"]}]}
    assert Config.model_validate({"evaluation": evaluation}).evaluation.attacks[1].curve == (0.05, 0.05, 0.25)
    with pytest.raises(ValidationError, match=words):
        Config.model_validate({"evaluation": {"attacks": [{"threat": "clean"}, {**row, "curve": curve}]}})
