"""The images that a generator was trained on: a table beside its weights, which tells later which of them are test images, and
whether they have changed since.
"""

import hashlib
import operator
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from dmat_ray.config import Config, DataConfig
from dmat_ray.data import sources
from dmat_ray.data.first_look import early
from dmat_ray.data.folder_source import text
from dmat_ray.data.reading import read_pixels, versions_of_images
from dmat_ray.data.sources import Listing
from dmat_ray.errors import DmatRayError
from dmat_ray.manifold import generators
from dmat_ray.storage import Location, at
from dmat_ray.storage.files import sha256, text_digest
from dmat_ray.wording import be

IMAGES = "images.parquet"
# by what was asked: a projection asks before it begins and at its end, and of many images decoding takes minutes
_compared: dict[str, int] = {}
LOOKED_AT = 1000  # test images whose pixels are looked for where no id tells which they are
CHUNK = 64  # images that a thread reads and decodes at a time
# settings of the data that say how an image is decoded
DECODING = ("resolution", "channels", "resize", "image_column", "max_pixels", "grey_levels")
# settings of the data that say which images the test split is drawn from and which go there; others take fewer of either split
SPLIT = ("seed", "test_share", "official_split", "classes", "label_column")


def listed(data: DataConfig, *, labelled: bool) -> tuple[pa.Table, str, str]:
    """The training split as in a `Listing` with a column `version`, a digest that changes with it and how it is decoded, and what
    the listing says that it ignored.
    """
    listing = sources.list_examples(data, labelled=labelled)
    rows = listing.rows("train")
    rows = rows.append_column("version", pa.array(versions_of_images(rows, data), pa.string()))
    return rows, digest_of(rows, data), listing.ignored


def digest_of(rows: pa.Table, data: DataConfig) -> str:
    """Of the id, label and version of images, and of how `data` decodes them."""
    columns = (rows[name].to_pylist() for name in ("id", "label", "version"))
    lines = [f"{id}\t{label}\t{version}" for id, label, version in zip(*columns, strict=True)]
    # without a word for what is as it was before it could be set
    resize = "" if data.resize == "crop" else f" {data.resize}"
    decoded = {name: getattr(data, name) for name in ("image_column", "max_pixels", "grey_levels")}
    others = "".join(f" {name}={value}" for name, value in decoded.items() if value != DataConfig.model_fields[name].default)
    return text_digest("\n".join([f"{data.resolution} {data.channels}{resize}{others}", *lines]))


def pixels_digest(image: np.ndarray | str) -> bytes | None:
    """sha256 of a decoded image as `read_pixels` gives it; None for one that cannot be read."""
    return None if isinstance(image, str) else hashlib.sha256(image.tobytes()).digest()


def write(folder: Path, rows: pa.Table, digests: list[bytes | None]) -> None:
    """Write the table of the `rows` of `listed`, of which `digests` are the pixels'."""
    known = rows.select(["id", "label", "version"]).append_column("pixels_sha256", pa.array(digests, pa.binary(32)))
    pq.write_table(known, folder / IMAGES, compression="zstd")


def described(folder: Path) -> dict[str, str]:
    """For a generator's card: digests of the table in `folder`, and of the ids, labels and pixels in it, whatever their files'
    times.
    """
    table = _usable(pq.read_table(folder / IMAGES))
    columns = (table[name].to_pylist() for name in ("id", "label", "pixels_sha256"))
    lines = [f"{id}\t{label}\t{digest.hex()}" for id, label, digest in zip(*columns, strict=True)]
    return {"images_file_sha256": sha256(folder / IMAGES), "images_pixels_sha256": text_digest("\n".join(lines))}


def _usable(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_valid(table["pixels_sha256"]))


def read(folder: Path, card: dict[str, Any]) -> pa.Table | None:
    """The table that the card is about, also of images that could not be read (null as pixels_sha256); None if there is none."""
    said = card.get("images_file_sha256")
    if said is None or not (folder / IMAGES).is_file() or sha256(folder / IMAGES) != said:
        return None
    return pq.read_table(folder / IMAGES)


def changes(known: pa.Table, rows: pa.Table, data: DataConfig) -> dict[str, int]:
    """How many of the `rows` of `listed` are more, fewer and changed since `known` was written, where any are.

    Another label or other pixels are a change, another time of a file is none: such an image is decoded to compare it.
    """
    place = pc.index_in(rows["id"], value_set=known["id"].combine_chunks())
    here = rows.filter(pc.is_valid(place))
    then = known.take(place.drop_null())
    relabelled = pc.not_equal(here["label"], then["label"])
    touched = pc.and_(pc.not_equal(here["version"], then["version"]), pc.invert(relabelled))
    before = then.filter(touched)["pixels_sha256"].to_pylist()
    other = sum(now != was for now, was in zip(_digests(here.filter(touched), data), before, strict=True))
    more, fewer = rows.num_rows - here.num_rows, known.num_rows - here.num_rows
    counts = {"more": more, "fewer": fewer, "changed": (pc.sum(relabelled).as_py() or 0) + other}
    return {word: count for word, count in counts.items() if count}


def _digests(rows: pa.Table, data: DataConfig) -> Iterator[bytes | None]:
    def of(start: int) -> list[bytes | None]:
        return [pixels_digest(image) for image in read_pixels(rows.slice(start, CHUNK), data)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(of, range(0, rows.num_rows, CHUNK)):
            yield from found


def warning_of_seen(config: Config, listing: Listing) -> str:
    """What is to be said of test images that the generator was trained on; empty if there are none."""
    seen, names = seen_in_training(config, listing)
    if seen == 0:
        return ""
    many = "test images may be" if seen is None else f"{seen} of {listing.rows('test').num_rows} test images {be(seen)}"
    way_out = (
        f"give {' and '.join(names)} as under data in its {generators.CARD}"
        if names
        else "images have come or gone since, so that it is split otherwise: train it anew, or give data.official_split"
    )
    return (
        f"warning: {many} among those that generator '{config.generator.path}' was trained on, which flatters what is measured "
        f"on them; {way_out}"
    )


def seen_in_training(config: Config, listing: Listing) -> tuple[int | None, list[str]]:
    """How many test images the generator was trained on, as far as its folder tells, and the settings that split them otherwise.

    None for images of the same source that cannot be listed any more as they were then, and for those elsewhere that cannot be
    compared. The card of an imported generator says nothing of its images.
    """
    card = generators.read_card(config.generator.path)
    try:
        theirs = DataConfig.model_validate(card.get("data"))
    except ValidationError:
        return 0, []
    names = [f"data.{name}" for name in SPLIT if getattr(theirs, name) != getattr(config.data, name)]
    named = {theirs.source, config.data.source} & sources.NAMED.keys()
    if theirs.source != config.data.source and (named or str(at(theirs.source)) != str(at(config.data.source))):
        seen, renamed = _seen_elsewhere(config, listing, card, theirs)
        return seen, (["data.source"] * renamed + names if seen != 0 else [])
    try:
        known = _known_ids(config, card, theirs)
        if known is None or not len(known):
            return (None if known is None else 0), names
        test = _named_as(config, listing, theirs).rows("test")["id"]
    except DmatRayError:
        return None, names
    return pc.sum(pc.is_in(test, value_set=known)).as_py() or 0, names


def _named_as(config: Config, listing: Listing, theirs: DataConfig) -> Listing:
    """The listing by the names that the generator's table has for its images."""
    if theirs.id_column == config.data.id_column:
        return listing
    return sources.list_examples(config.data.model_copy(update={"id_column": theirs.id_column}))


def _seen_elsewhere(config: Config, listing: Listing, card: dict[str, Any], theirs: DataConfig) -> tuple[int | None, bool]:
    """How many test images have the id and the pixels of one that the generator was trained on, which lay elsewhere or under
    another name then, and whether they go by other ids here; 0 if no table tells of those, None if the pixels cannot be compared.

    Test images of a known id are decoded for it, as they were for the generator. Where no image of the source has one, LOOKED_AT
    test images are, and all of them if that finds any.
    """
    if (table := read(generators.folder_of(config.generator.path), card)) is None:
        return 0, False
    try:
        rows = _named_as(config, listing, theirs).table
    except DmatRayError:  # without the column of the ids, it is another source
        return 0, False
    known = _usable(table)
    place, renamed = _places(rows["id"], known["id"], at(config.data.source), at(theirs.source))
    in_test = pc.equal(rows["split"], "test")
    if place.null_count < len(place):
        wanted = pc.and_(in_test, pc.is_valid(place))
        here, then = rows.filter(wanted), known.take(place.filter(wanted))["pixels_sha256"].to_pylist()
        return _same(config, card, theirs, here, then), renamed
    test, digests = rows.filter(in_test), set(known["pixels_sha256"].to_pylist())
    found = _same(config, card, theirs, early(test, config.data, LOOKED_AT), digests) if digests else 0
    if not found:
        return found, True
    return _same(config, card, theirs, test, digests), True


def _places(ids: pa.ChunkedArray, known: pa.ChunkedArray, here: Location, there: Location) -> tuple[pa.ChunkedArray, bool]:
    """Where each id is among those that are `known`, null for one that is not; and whether any is by the way between the sources
    alone, of which one lies inside the other: `n01/1.png` here is `train/n01/1.png` there.
    """
    known = known.combine_chunks()
    place = pc.index_in(ids, value_set=known)
    outer, inner = _base(there, known), _base(here, ids)
    if way := _way(outer, inner):
        other = pc.binary_join_element_wise(pa.scalar(way), ids, "")
    elif way := _way(inner, outer):
        other = pc.if_else(pc.starts_with(ids, way), pc.utf8_slice_codeunits(ids, len(way)), None)
    else:
        return place, False
    others = pc.index_in(other, value_set=known, skip_nulls=True)
    return pc.coalesce(place, others), bool(pc.any(pc.and_(pc.is_null(place), pc.is_valid(others))).as_py())


def _base(source: Location, ids: Any) -> Location:
    """The folder that ids name files in: of a Parquet file the one that it lies in."""
    return source.parent if len(ids) and ids[0].as_py().startswith(f"{source.name}#") else source


def _way(outer: Location, inner: Location) -> str:
    """The way from one folder to another inside it, with a slash at its end; empty if it is not."""
    inside = outer.scheme == inner.scheme and inner.key.startswith(f"{outer.key}/")
    return f"{text(inner.key[len(outer.key) + 1 :])}/" if inside else ""


def _same(config: Config, card: dict[str, Any], theirs: DataConfig, rows: pa.Table, then: list[bytes] | set[bytes]) -> int | None:
    """How many of these images have the pixels that they had `then`, each its own, or, of a set, any; None if they cannot be
    compared, such as those of which none can be read as they were for the generator.
    """
    versions = zip(rows["id"].to_pylist(), versions_of_images(rows, config.data), strict=True)
    lines = [f"{id}\t{version}" for id, version in versions]
    here = [str(at(config.data.source)), config.data.image_column]
    compared = [*here, theirs.source, type(then).__name__, str(card["images_file_sha256"])]
    asked = text_digest("\n".join([*compared, *lines]))
    if asked not in _compared:
        # but for the column, which is called as it is here
        how = {name: getattr(theirs, name) for name in DECODING if name != "image_column"}
        how["resize"] = sources.resize_like(theirs.source, theirs.resize)
        as_theirs = config.data.model_copy(update=how)
        try:
            now = list(_digests(rows, as_theirs))
        except DmatRayError:
            return None
        if now and not any(now):
            return None
        _compared[asked] = sum(one in then for one in now) if isinstance(then, set) else sum(map(operator.eq, now, then))
    return _compared[asked]


def _known_ids(config: Config, card: dict[str, Any], theirs: DataConfig) -> pa.ChunkedArray | None:
    """Ids of the images that a generator was trained on; empty if no test image can be among them, None if they are not known.

    Raises DmatRayError if they are to be listed again and cannot be.
    """
    if (known := read(generators.folder_of(config.generator.path), card)) is not None:
        return _usable(known)["id"]
    if "images_sha256" in card:
        architecture = card.get("architecture")
        labelled = isinstance(architecture, dict) and bool(architecture.get("num_classes"))
        rows, digest, _ = listed(theirs, labelled=labelled)
        return rows["id"] if digest == card["images_sha256"] else None
    if all(getattr(theirs, name) == getattr(config.data, name) for name in SPLIT):
        return pa.chunked_array([], pa.string())
    here = {"resolution": config.data.resolution}
    return sources.list_examples(theirs.model_copy(update=here), labelled=False).rows("train")["id"]
