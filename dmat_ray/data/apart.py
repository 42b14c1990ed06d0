"""What a job writes does not lie among the images that it reads, where the next job would list it with them."""

from dmat_ray.config import Config
from dmat_ray.data.sources import NAMED
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at, set_folder


def require_apart(config: Config) -> None:
    """Raise UserError for an output or set in the folder of the images, or images in the folder of the set."""
    if config.data.source in NAMED:
        return
    source, ours = at(config.data.source), set_folder(config)
    if _is_in(source, ours):
        raise UserError(
            f"data.source '{source}' is in '{ours}', where the set that is made of it goes; give another --output, "
            "or another --manifold_set"
        )
    for name, place in (("output", at(config.output)), ("manifold_set", ours)):
        if _is_in(place, source):
            raise UserError(
                f"{name} '{place}' is in data.source '{source}', so that what is written there would be listed with its images; "
                f"give another --{name}"
            )


def _is_in(place: Location, folder: Location) -> bool:
    return place.scheme == folder.scheme and f"{place.key}/".startswith(f"{folder.key.rstrip('/')}/")
