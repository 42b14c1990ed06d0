"""What a job writes does not lie among the images that it reads, where the next job would list it with them."""

from dmat_ray.config import Config
from dmat_ray.data.source_files import is_packed
from dmat_ray.data.sources import NAMED
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at, set_folder


def require_apart(config: Config, *, makes_set: bool) -> None:
    """Raise UserError for an output that would be listed with the images; of a job that `makes_set`, also for such a set, and for
    images in the folder of the set.
    """
    if config.data.source in NAMED:
        return
    source, places = at(config.data.source), {"output": at(config.output)}
    if makes_set:
        places["manifold_set"] = ours = set_folder(config)
        if _below(source, ours) is not None:
            raise UserError(
                f"data.source '{source}' is in '{ours}', where the set that is made of it goes; give another --output, "
                "or another --manifold_set"
            )
    for name, place in places.items():
        # a set beside files of CIFAR or MNIST is no data of theirs, unlike the Parquet file that a generator has
        if _is_listed(place, source) and not (makes_set and is_packed(source)):
            raise UserError(
                f"{name} '{place}' is in data.source '{source}', so that what is written there would be listed with its images; "
                f"give another --{name}"
            )


def _is_listed(place: Location, source: Location) -> bool:
    """Whether a listing of the source looks into this folder: it is there, and nothing of the way to it is hidden."""
    way = _below(place, source)
    return way is not None and not any(part.startswith(".") for part in way.split("/"))


def _below(place: Location, folder: Location) -> str | None:
    """The way from a folder to what lies in it ('' to itself); None to what does not."""
    key, above = f"{place.key}/", f"{folder.key.rstrip('/')}/"
    return key[len(above) :] if place.scheme == folder.scheme and key.startswith(above) else None
