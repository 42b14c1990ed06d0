"""Settings by name: YAML files, each a partial config, layered left to right."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dmat_ray import yaml_file
from dmat_ray.errors import UserError
from dmat_ray.wording import choices

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The presets that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


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


def load(layers: list[str], above: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """Presets by name, or YAML files by path (anything with a dot or a slash), the later over the earlier.

    Those that one names under `include` are layered first, and it over them; files are looked for beside it. Raises UserError
    for one that does not exist, is no YAML of settings, or includes itself.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        is_file = "/" in layer or "." in layer
        path = Path(layer) if is_file else FOLDER / f"{layer}.yaml"
        if not path.is_file():
            hint = "" if is_file else f"; {choices(layer, names())}"
            raise UserError(f"preset '{layer}' does not exist{hint}")
        if (here := path.resolve()) in (above := above or {}):
            raise UserError(f"preset '{layer}' includes itself ({' > '.join([*above.values(), layer])})")
        values = yaml_file.read(path, f"preset '{layer}'")
        if not isinstance(values, dict):
            raise UserError(f"preset '{layer}' holds a {type(values).__name__}, not settings by section")
        if odd := [key for key in values if not isinstance(key, str)]:
            raise UserError(f"preset '{layer}': {odd[0]!r} is no section of settings (YAML reads on and yes as True)")
        others = values.pop("include", None) or []
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise UserError(f"preset '{layer}': include is {others!r}; give a list of presets")
        beside = [str(path.parent / other) if "/" in other or "." in other else other for other in others]
        merged = merge(merge(merged, load(beside, {**above, here: layer})), values)
    return merged
