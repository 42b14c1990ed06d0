"""Which settings a trained model depends on, and what of them is recorded and compared."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from dmat_ray.config import Config, DataConfig
from dmat_ray.errors import UserError
from dmat_ray.storage import Place

# settings, and sections of them, that may differ between a checkpoint and the run that goes on from it
HARMLESS = (
    *("output", "manifold_set", "name", "methods", "evaluation", "tune", "cluster", "tracking", "gan", "encoder"),
    *("data", "projection", "generator.path"),  # what they name is known by its content: the set's digest, the generator's
    *("generator.recompute", "training.compile", "training.checkpoint_every", "training.checkpoint_minutes"),
)
SEED = "training.seed"
# keys of a run.json: what a model was trained on, and what it was made of
GIVEN = ("set_sha256", "generator_sha256", "class_names", "channels", "resolution", "network")
MORE_WEIGHT = re.compile(r"objective\.more\..+\.weight")


def of_set(config: Config, manifest: Mapping[str, Any]) -> Config:
    """The settings with `data` as the set of this manifest was made: a training takes the set as it is, whatever its own say."""
    try:
        return config.model_copy(update={"data": DataConfig.model_validate(manifest["data"])})
    except ValidationError:  # of a later version, or another program's
        return config


def require_same_config(old: dict[str, Any], new: Config, folder: Place) -> None:
    """Raise UserError naming the first setting that differs and that would change what is trained.

    What `old` does not say came later, with what was done before as its default.
    """
    before, now = _recorded(old), relevant(new)
    for name in dict.fromkeys([*now, *before]):
        if before.get(name, "absent") != now.get(name, "absent"):
            raise UserError(
                f"'{folder}' was trained with {name} = {before.get(name, 'absent')}, now it is {now.get(name, 'absent')}; go on "
                "with the old value, or train under another --name"
            )


def _recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """`relevant` of the settings in a run.json, which say less if they are of an older version."""
    return _relevant(_flat(Config().to_json()) | _flat(dict(config)))


def seed_of(run: Mapping[str, Any]) -> int:
    """The seed of the training that a run.json is of."""
    return int(_recorded(run["config"])[SEED])


def but_for_seed(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run.json says that its weights depend on beside the seed: the same of all trainings of one method.

    Nor does the seed count of those whose weights it went on from, which they name only where it is another than its own.
    """
    lineage = [{**before, "name": "", "settings": _but_seed(before["settings"])} for before in run.get("lineage", [])]
    return {"settings": _but_seed(_recorded(run["config"])), "given": {key: run.get(key) for key in GIVEN}, "lineage": lineage}


def _but_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != SEED}


def ancestor(run: dict[str, Any], config: Config) -> dict[str, Any]:
    """For a run's lineage: whose checkpoint it went on from, after which epoch, and what was set otherwise until then."""
    before, now = _flat(run["config"]), relevant(config)
    changed = {name: before.get(name) for name, value in now.items() if before.get(name) != value}
    return {"name": run["config"]["name"], "epoch": run["epoch"], "settings": changed}


def relevant(config: Config, drawn: Collection[str] = ()) -> dict[str, Any]:
    """Dotted name -> value of the settings that change what is trained, where those in `drawn` may have any value."""
    return _relevant(_flat(config.to_json()), drawn)


def _relevant(flat: dict[str, Any], drawn: Collection[str] = ()) -> dict[str, Any]:
    # a term of no weight may lie ready in a preset
    weights = [name for name in flat if MORE_WEIGHT.fullmatch(name) and name not in drawn]
    idle = tuple(name.removesuffix("weight") for name in weights if not flat[name])
    return {k: v for k, v in flat.items() if k not in HARMLESS and k.split(".")[0] not in HARMLESS and not k.startswith(idle)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def flatten_config(config: Config) -> dict[str, Any]:
    """Dotted name -> value, for tracking."""
    return _flat(config.to_json())
