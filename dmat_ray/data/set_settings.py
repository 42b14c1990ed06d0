"""With which settings an on-manifold set was begun: `settings.json`, and in a finished one the manifest."""

from collections.abc import Sequence
from typing import Any

from dmat_ray.config import ProjectionConfig
from dmat_ray.data import set_format
from dmat_ray.data.set_format import MANIFEST
from dmat_ray.errors import UserError
from dmat_ray.storage import Location

SETTINGS = "settings.json"
MAX_PIXELS_KEY = "data.max_pixels"
LISTING, BY_LISTING = "listing_sha256", {"data.official_split", "data.classes"}  # the former tells all that the latter do
COUNT = "examples"
OF_IMAGES = {LISTING, COUNT, "class_names"}  # what other images of a source are told by
LPIPS_PATH, LPIPS_DIGEST = "projection.lpips_weights", "lpips_sha256"  # the former tells nothing where both have the latter


def begin(folder: Location, settings: dict[str, Any]) -> None:
    """Write the settings into the folder, or check that what is there was begun with the same.

    More `data.max_pixels` than before is no other setting: it takes images that were left out. Nor is what only says how a source
    is to be understood, as long as it gives the same images, splits and labels. Raises UserError that names the settings that
    differ, or says that nothing tells with which settings shards that are there were made.
    """
    path = folder / SETTINGS
    old = _begun_with(folder, settings)
    if old is None:
        path.write_json(settings)
        return
    before, now = _known_alike(_flat(_as_now(old, settings)), _flat(settings))
    then, most = before.get(MAX_PIXELS_KEY), now.get(MAX_PIXELS_KEY)
    if isinstance(then, int) and isinstance(most, int) and then < most:
        before[MAX_PIXELS_KEY] = most
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        raise UserError(f"the on-manifold set '{folder}' was begun with {_told(before, now, changed)}, or remove the folder")
    if old != settings or not path.is_file():
        path.write_json(settings)


def _told(before: dict[str, Any], now: dict[str, Any], changed: Sequence[str]) -> str:
    """What has changed since a set was begun, and what may be done. Images that other settings of the data take are no news."""
    others = [key for key in changed if key not in OF_IMAGES] if LISTING in changed else changed
    told = [f"{key} = {_shown(before, key)}, now it is {_shown(now, key)}" for key in others]
    ways = [f"give the old value{'s'[: len(others) - 1]}"] if others else []
    if LISTING in changed and not any(key.startswith("data.") for key in others):
        then, count = before.get(COUNT), now.get(COUNT)
        many = "as many, but others, or of other splits or classes" if then == count else count
        told.append(f"{then} images of its source, now it would have {many}, and a set cannot be extended")
        ways.append("restore the images")
    return f"{', and with '.join(told)}; {' and '.join(ways)}, {'' if others else 'give '}another --output"


def _begun_with(folder: Location, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the set in a folder, of a finished one that lacks their file by its manifest; None if there is no set."""
    for name in (SETTINGS, MANIFEST):
        try:
            found = (folder / name).read_json()
        except FileNotFoundError:
            continue
        if not isinstance(found, dict):
            raise UserError(f"'{folder / name}' is damaged: it holds a {type(found).__name__}, not an object")
        return found if name == SETTINGS else _settings_in(found, settings)
    if set_format.shard_names(folder):
        raise UserError(
            f"the on-manifold set '{folder}' has shards, but no {SETTINGS} that says how they were made; give another --output, "
            "or remove the folder"
        )
    return None


def are_of(manifest: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a finished set was made with these settings: none that makes another set differs."""
    before, now = _known_alike(_flat(_as_now(_settings_in(manifest, settings), settings)), _flat(settings))
    return before == now


def _settings_in(manifest: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that `settings` say, too."""
    return {key: manifest[key] for key in [*settings, LPIPS_DIGEST] if key in manifest}


def _shown(flat: dict[str, Any], key: str) -> Any:
    """The value of a setting, of which some are recorded only where they are not what they were before they could be set."""
    return flat.get(key, "its default" if key.startswith("data.") else None)


def _as_now(old: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What an older version recorded, with the settings of the projection that have come since at their defaults."""
    was, now = old.get("projection"), settings.get("projection", {})
    if not isinstance(was, dict):
        return old
    filled = ProjectionConfig.recorded(was)
    return {**old, "projection": {key: value for key, value in filled.items() if key in was or key in now}}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Sections and their settings by dotted names."""
    flat: dict[str, Any] = {}
    for section, value in settings.items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return flat


def _known_alike(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both with LPIPS's weights by their content, or, where a set is from before that was recorded, by their path; and without
    what says how the source is to be understood, where both have the same listing.
    """
    left_out = {LPIPS_PATH if LPIPS_DIGEST in old and LPIPS_DIGEST in new else LPIPS_DIGEST}
    if old.get(LISTING) is not None and old[LISTING] == new.get(LISTING):
        left_out |= BY_LISTING
    rest = [{key: value for key, value in flat.items() if key not in left_out} for flat in (old, new)]
    return rest[0], rest[1]
