"""Which files of a source's folder a listing takes."""

from dmat_ray.data import packed, parquet_source
from dmat_ray.data.folder_source import is_image
from dmat_ray.storage import Location


def tree(root: Location) -> tuple[list[str], list[str], list[str]]:
    """The files and folders below the source without those of on-manifold sets of ours, and the folders of these sets."""
    files, folders = root.tree()
    # in the order of their parts: no character comes before the one that separates them
    files.sort(key=lambda path: path.replace("/", "\0"))
    sets = parquet_source.sets_below(root, files)
    ours = tuple(f"{folder}/" for folder in sets)
    files, folders = ([path for path in paths if not f"{path}/".startswith(ours)] for paths in (files, folders))
    return files, folders, sets


def is_packed(root: Location) -> bool:
    """Whether a listing of this source takes files of CIFAR or MNIST. False for one that cannot be looked into."""
    try:
        files = tree(root)[0]
    except OSError:
        return False
    return not any(map(is_parquet, files)) and packed_among(files) is not None


def packed_among(files: list[str]) -> packed.Published | None:
    """The files of CIFAR or MNIST among these, if there is no folder of images. Raises UserError for several data sets."""
    return None if any("/" in path and is_image(path) for path in files) else packed.find(files)


def is_parquet(path: str) -> bool:
    """True for data in Parquet; what begins with an underscore is what a writer left on its way."""
    return path.lower().endswith(parquet_source.SUFFIX) and not any(part.startswith("_") for part in path.split("/"))
