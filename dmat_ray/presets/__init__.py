"""Settings by name: YAML files, each a partial config, layered left to right."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from dmat_ray import yaml_file
from dmat_ray.config.threats import THREATS, default_unit, named, radii, unit_in_words
from dmat_ray.errors import UserError

FOLDER = Path(__file__).parent
KINDS = {named(threat): threat for threat in THREATS}


def names() -> list[str]:
    """The presets that ship with the package."""
    return yaml_file.names(FOLDER)


def name_of(layers: Iterable[str]) -> str:
    """What a model of these presets is called: their names, of letters and signs that a name may have."""
    joined = "_".join(layer.rsplit("/", 1)[-1].removesuffix(".yaml") for layer in layers)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", joined).lstrip("_.-")


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def require_own_eps(below: Mapping[str, Any], above: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError where `above` changes a threat, its norm or its scale but not the radius, which is one of those `below`."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(old := below.get(key), Mapping):
            require_own_eps(old, value, f"{where}.{key}" if where else key)
    threat = below.get("threat", where.rpartition(".")[2])
    if "eps" in below and "eps" not in above and (now := above.get("threat", threat)) != threat:
        raise UserError(f"{where}: eps {below['eps']} is a radius of threat {threat}; give one of {now} beside the threat")
    if (kind := KINDS.get(str(threat))) is None:
        return
    for name, radius in radii(kind).items():
        usual, given = str(below.get(name, default_unit(kind, name))), str(above.get(name))
        known = {usual, given} <= {*get_args(kind.model_fields[name].annotation)}  # what is none, pydantic refuses
        if radius in below and radius not in above and known and given != usual:
            raise UserError(
                f"{where}: {radius} {below[radius]} is a radius in {unit_in_words(usual)}; give one in {unit_in_words(given)} "
                f"beside the {name}"
            )


def load(layers: list[str], above: Mapping[Path, str] | None = None, *, shipped: bool = True) -> dict[str, Any]:
    """Presets by name, or YAML files by path (anything with a dot or a slash), the later over the earlier.

    Those that one names under `include` are layered first, and it over them; files are looked for beside it. Without `shipped`
    only what the user's own files say counts. Raises UserError for one that does not exist, is no YAML of settings, includes
    itself, or changes a norm or a scale and not its radius.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        file = yaml_file.named(layer, "preset", FOLDER, above)
        values = file.values
        if not isinstance(values, dict):
            raise UserError(f"preset '{layer}' holds a {type(values).__name__}, not settings by section")
        if odd := [key for key in values if not isinstance(key, str)]:
            raise UserError(f"preset '{layer}': {odd[0]!r} is no section of settings (YAML reads on and yes as True)")
        others = values.pop("include", None) or []
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise UserError(f"preset '{layer}': include is {others!r}; give a list of presets")
        included = load(file.beside(others), file.chain, shipped=shipped)
        own = values if shipped or file.path.resolve().parent != FOLDER.resolve() else {}
        try:
            require_own_eps(included, own)
            require_own_eps(merged, merge(included, own))
        except UserError as error:
            raise UserError(f"preset '{layer}': {error}") from None
        merged = merge(merge(merged, included), own)
    return merged
