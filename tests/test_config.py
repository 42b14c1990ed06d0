"""Settings: what is accepted, that JSON carries them unchanged, and that defaults and presets are what was published."""

import itertools
import json
import pickle
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import dmat_ray.config
from dmat_ray import presets
from dmat_ray.config import (
    ON_MANIFOLD,
    THREATS,
    Config,
    GanConfig,
    ImageThreat,
    ObjectiveConfig,
    Section,
    StyleGAN2Config,
    threats,
)
from dmat_ray.config.attacks import TERMS
from dmat_ray.config.evaluation import ROWS
from dmat_ray.threats import PIXELS

NAMES = presets.names()
COMBINATIONS = [[], *[[name] for name in NAMES], *[list(pair) for pair in itertools.permutations(NAMES, 2)]]


def again(config: Config) -> Config:
    """`config` through real JSON text."""
    return Config.model_validate(json.loads(json.dumps(config.to_json())))


@pytest.mark.parametrize("name", NAMES)
def test_settings_can_be_pickled(name: str) -> None:
    config = Config.model_validate(presets.load([name]))
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_class_of_settings_can_be_imported_by_its_name() -> None:
    for kind in (*TERMS.values(), *ROWS.values()):
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert getattr(dmat_ray.config, kind.__name__) is kind


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Section classes that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (tuple, list, dict, Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        for argument in get_args(annotation):
            yield from sections_in(argument)


def all_sections() -> set[type[Section]]:
    """Config and every section below it."""
    found: set[type[Section]] = set()
    todo: list[type[Section]] = [Config]
    while todo:
        section = todo.pop()
        if section not in found:
            found.add(section)
            todo += [s for field in section.model_fields.values() for s in sections_in(field.annotation)]
    return found


@pytest.mark.parametrize("layers", COMBINATIONS, ids="+".join)
def test_json_round_trip_of_presets(layers: list[str]) -> None:
    values = presets.load(layers)
    # one step, which is for another ball than those of these
    if layers[1:] == ["mixed10_om_fgsm"] and layers[0] in ("demo", "cifar10", "mixed10_own"):
        with pytest.raises(ValidationError, match=r"objective\.latent\n.* a weak attack"):
            Config.model_validate(values)
        return
    config = Config.model_validate(values)
    assert again(config) == config


@pytest.mark.slow
@given(
    eps=st.floats(0, 1),
    seed=st.integers(0, 2**62),
    output=st.text(min_size=1),
    limit=st.none() | st.integers(1, 10**9),
    rates=st.lists(st.floats(0, 10), min_size=2, max_size=6),
)
def test_json_round_trip_of_any_values(eps: float, seed: int, output: str, limit: int | None, rates: list[float]) -> None:
    config = Config.model_validate(
        {
            "output": output,
            "data": {"train_limit": limit},
            "objective": {"image": {"eps": eps}},
            "training": {"lr_values": rates, "lr_epochs": list(range(len(rates))), "seed": seed},
        }
    )
    assert again(config) == config
    assert (config.objective.image.eps, config.training.seed, config.training.lr_values) == (eps, seed, tuple(rates))


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("0.5/2", 0.25), ("0.1", 0.1), (0.2, 0.2), ("0/255", 0.0)]
)
def test_budgets_may_be_fractions(text: Any, value: float) -> None:
    assert ImageThreat.model_validate({"eps": text}).eps == value


@pytest.mark.parametrize("section", sorted(all_sections(), key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_sections_are_frozen_and_described(section: type[Section]) -> None:
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    assert section.__doc__
    for name, field in section.model_fields.items():
        is_section = any(True for _ in sections_in(field.annotation)) and get_origin(field.annotation) is not tuple
        is_tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        assert field.description or is_section or is_tag, f"{section.__name__}.{name} has no description"


def test_walk_finds_sections_at_every_depth() -> None:
    found = {section.__name__ for section in all_sections()}
    assert {"Config", "ImageTerm", "FogRow", "CleanRow", "StyleGAN2Config", "TrackingConfig"} <= found


def test_settings_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.objective.image.eps = 0.5  # type: ignore[misc]


def test_what_an_older_version_recorded_has_what_came_since_at_its_default() -> None:
    now = GanConfig(kimg=3).model_dump(mode="json")
    then = {key: value for key, value in now.items() if key != "mode_seeking"}
    then["architecture"] = {key: value for key, value in now["architecture"].items() if key != "w_dim"}
    assert GanConfig.recorded(then) == now
    for other in ({**now, "of_a_later_version": 1}, {"kimg": "many"}, None, [1]):
        assert GanConfig.recorded(other) == other


def test_fingerprint_changes_with_any_setting() -> None:
    base = ObjectiveConfig()
    other = ObjectiveConfig.model_validate({"fog": {"restarts": 2}})
    assert base.fingerprint() == ObjectiveConfig().fingerprint()
    assert base.fingerprint() != other.fingerprint()


def test_every_threat_is_a_term_a_row_and_built() -> None:
    for threat in THREATS:
        name = threats.named(threat)
        assert issubclass(TERMS[name], threat)
        assert issubclass(ROWS[name], threat)
        assert threat in (*PIXELS, *ON_MANIFOLD)
    assert list(TERMS) == list(ROWS) == [threats.named(threat) for threat in THREATS]


def test_published_shape_of_w_plus() -> None:
    """256x256 takes 14 vectors in the paper (arXiv 2009.02470)."""
    assert StyleGAN2Config(resolution=256).num_ws == 14
    assert StyleGAN2Config(resolution=32).resolutions == [4, 8, 16, 32]


def test_defaults_are_the_published_settings() -> None:
    """The paper's training attacks and schedule, in [0, 1] units."""
    config = Config()
    assert (config.objective.image.eps, config.objective.image.steps) == (4 / 255, 5)
    assert (config.objective.latent.eps, config.objective.latent.scale) == (0.02, "raw")
    assert config.training.lr_epochs == (0, 1, 6, 12, 15, 20)
    assert config.training.lr_values == (0, 0.4, 0.04, 0.004, 0.0004, 0.0001)
    assert (config.projection.steps, config.projection.lr, config.projection.noise) == (1000, 0.1, 0.05)
    assert config.projection.l1 == 2 * 100  # of images in [-1, 1]


def test_presets_of_divergences_and_of_joint_attacks() -> None:
    trades, both, joint = (Config.model_validate(presets.load([name])).objective for name in ("trades", "dmat_trades", "joint"))
    assert (trades.clean.weight, trades.image.weight, trades.image.divergence, trades.image.steps) == (1, 1, "kl", 10)
    assert [t.divergence for t in both.adversarial.values() if t.weight > 0] == ["kl", "kl"]
    assert (both.clean.weight, both.image.weight + both.latent.weight) == (1, 1)
    assert {name: term.weight for name, term in joint.adversarial.items() if term.weight > 0} == {"joint": 1}
    assert joint.clean.weight == 0


def test_dmat_preset_is_the_published_mixture() -> None:
    objective = Config.model_validate(presets.load(["dmat"])).objective
    assert (objective.clean.weight, objective.image.weight, objective.latent.weight) == (0, 0.5, 0.5)
