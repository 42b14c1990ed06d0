"""Natural images from where the user has them.

The embedded digits, a folder with one sub-folder a class, Parquet files, or the files of CIFAR and MNIST as they are published.

Every source yields the same thing: a `Listing` of examples with stable ids, labels and a seeded stratified split, of which
`dmat_ray.data.reading` gives the images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmat_ray.config import DataConfig
from dmat_ray.data import class_lists, packed, parquet_rows, parquet_source, parts
from dmat_ray.data.digits import DIGITS, digits
from dmat_ray.data.folder_source import folder_items, folder_with_more, is_image, text
from dmat_ray.data.items import Items
from dmat_ray.data.source_files import is_parquet, packed_among, tree
from dmat_ray.data.splits import balanced, limited, split_by_class
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at
from dmat_ray.wording import number_of

NAMED: dict[str, Callable[[int], Items]] = {DIGITS: digits}
"""Sources that packages carry, by what `data.source` calls them; made for a resolution. Their `files` are the encoded images."""


def resize_like(source: str, resize: str) -> str:
    """The `data.resize` that makes of images elsewhere such as those of this source are, for which `resize` was set: those of a
    `NAMED` one lie on black, whatever was set.
    """
    return "pad" if source in NAMED else resize


@dataclass(frozen=True)
class Listing:
    """All examples that a source gives under a DataConfig, and the names of the classes.

    `table` is in the source's order (folders: by class, then path; Parquet: by file, then row) and has the columns id (string,
    unique), split (string, 'train' or 'test'), label (int64, 0 .. classes - 1), file (binary: the path relative to the source; of
    a `NAMED` one the image itself), row (int64: in a Parquet file the row, in a file of CIFAR or MNIST the byte at which the
    image begins, else null) and file_digest (int64: of the file as it was listed, null where row is).

    `found` is how many images the source holds, before the limits; `ignored` says which files are no images ('' = none).
    """

    table: pa.Table
    class_names: tuple[str, ...]
    found: int = 0
    ignored: str = ""

    def rows(self, split: str) -> pa.Table:
        """The examples of one split."""
        return self.table.filter(pc.equal(self.table["split"], split))


def list_examples(config: DataConfig, *, labelled: bool = True) -> Listing:
    """All examples of `config.source`, split and limited. Raises UserError for a source that is empty, missing or of one class.

    With `labelled` False one class is enough, and a folder of images without sub-folders or Parquet without labels is one.
    """
    if config.official_split and config.source in NAMED:
        raise UserError(f"data.official_split is true, but '{config.source}' has no test set of its own")
    labelled = labelled or bool(config.classes)
    items = NAMED[config.source](config.resolution) if config.source in NAMED else _items(config, labelled)
    if config.classes:
        items = class_lists.select(items, config.classes, config.source)
    groups = items.labels if items.groups is None else items.groups
    if labelled and len(items.class_names) < 2:
        deeper = "" if config.classes or items.file_digests is not None else folder_with_more(items.ids.to_pylist())
        hint = f"; did you mean '{at(config.source) / deeper}'?" if deeper else ""
        raise UserError(
            f"data.source '{config.source}' has one class only ('{items.class_names[0]}'); a classifier needs two or more{hint}"
        )
    in_test = split_by_class(groups, config.test_share, config.seed) if items.in_test is None else items.in_test
    order = np.random.default_rng([config.seed, len(items.labels)]).permutation(len(items.labels))
    chosen = []
    for split, limit in (("train", config.train_limit), ("test", config.test_limit)):
        members = order[in_test[order] == (split == "test")]
        counts = np.bincount(items.labels[members], minlength=len(items.class_names))
        if not counts.all():
            missing = items.class_names[int(counts.argmin())]
            why = (
                f"its own {split} part has none of it"
                if items.in_test is not None
                else f"it has {np.count_nonzero(items.labels == counts.argmin())}; it needs two or more"
            )
            raise UserError(f"class '{missing}' of '{config.source}' has no image in the {split} split: {why}")
        if config.balanced:
            members = balanced(members, items.labels[members], groups[members])
        chosen.append(limited(members, items.labels[members], limit, len(items.class_names), split))
    taken = np.sort(np.concatenate(chosen))
    table = pa.table(
        {
            "id": items.ids,
            "split": pa.array(["train", "test"]).take(pa.array(in_test.astype(np.int64))),
            "label": pa.array(items.labels, pa.int64()),
            "file": items.files,
            "row": items.rows,
            "file_digest": pa.nulls(len(items.labels), pa.int64()) if items.file_digests is None else items.file_digests,
        }
    )
    _require_unique(table["id"], config)
    found = table.num_rows
    return Listing(table if len(taken) == found else table.take(pa.array(taken)), items.class_names, found, items.ignored)


def _require_unique(ids: pa.ChunkedArray, config: DataConfig) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    found = ids.value_counts()
    twice = found.filter(pc.greater(found.field("counts"), 1))[0]
    where = f"data.id_column '{config.id_column}'" if config.id_column else f"'{config.source}'"
    raise UserError(f"the id '{twice['values']}' occurs {twice['counts']} times in {where}; ids must be unique")


def _items(config: DataConfig, labelled: bool) -> Items:
    """What lies at a path or URL."""
    root = at(config.source)
    try:
        if root.is_file():
            if not is_parquet(root.name):
                raise UserError(f"data.source '{root}' is a file, but not a Parquet file ({parquet_source.SUFFIX})")
            return _parquet(root, [""], config, labelled)
        files, folders, sets = tree(root)
        if not files and not folders and not sets and not root.is_dir():
            names = ", ".join(f"'{name}'" for name in NAMED)
            raise UserError(f"data.source '{root}' is neither {names} nor a folder or Parquet file that exists")
    except OSError as error:
        raise UserError(f"data.source '{root}' cannot be listed: {error.strerror} ('{error.filename}')") from None
    if not sets:
        return _items_of(root, files, folders, config, labelled)
    if not any(is_image(path) or is_parquet(path) or packed.is_packed(path) for path in files):
        raise UserError(
            f"data.source '{root}' holds no images but those of on-manifold sets; give '{root / sets[0]}' to take these"
        )
    items = _items_of(root, files, folders, config, labelled)
    told = f"{number_of(len(sets), 'on-manifold set')} in it, the first: '{text(sets[0])}'"
    return items.without(told)


def _items_of(root: Location, files: list[str], folders: list[str], config: DataConfig, labelled: bool) -> Items:
    """What lies in a folder of these files and folders."""
    if parquet := [path for path in files if is_parquet(path)]:
        images = [path for path in files if is_image(path)]
        try:
            items = _parquet(root, parquet, config, labelled)
        except parquet_rows.ColumnError as error:
            if not images:
                raise
            raise UserError(
                f"{error}; '{root}' has image files, too, such as '{text(images[0])}', which are taken only where there is no "
                "Parquet: move the latter elsewhere if they are the data"
            ) from None
        if not images:
            return items
        told = f"{number_of(len(images), 'image file')} beside Parquet, unless that names them, the first: '{text(images[0])}'"
        return items.without(told)
    if (found := packed_among(files)) is not None:
        return packed.packed_items(root, files, found, config)
    return folder_items(root, files, folders, config, labelled)


def _parquet(root: Location, names: list[str], config: DataConfig, labelled: bool) -> Items:
    names, test, ignored = _parts(root, names, config, labelled)
    found = parquet_source.list_rows(root, names, config, labelled)
    if not len(found.labels):
        raise UserError(f"data.source '{root}' is Parquet without rows")
    files = [pa.repeat(pa.scalar(os.fsencode(name), pa.binary()), n) for name, n in zip(names, found.counts, strict=True)]
    rows = np.concatenate([np.arange(n, dtype=np.int64) for n in found.counts])
    in_test = np.repeat([name in test for name in names], found.counts) if test else None
    return Items(
        found.ids,
        found.labels,
        pa.chunked_array(files, pa.binary()),
        pa.array(rows),
        found.class_names,
        ignored,
        in_test,
        found.also,
        file_digests=np.repeat(np.array(found.digests, np.int64), found.counts),
    )


def _parts(root: Location, names: list[str], config: DataConfig, labelled: bool) -> tuple[list[str], set[str], str]:
    """The files to be read, those of them that are the test part, and what is left aside. Raises UserError where it is not clear
    whether there is one, and for one that is asked for and not there.
    """
    found = parts.by_part(names)
    if found and config.official_split is None and not config.classes:
        first, *others = [part[0] for part in (found.train, found.test, found.validation) if part]
        if others:
            ways = "true to take its own test part, or false to split its training part"
            if found.by_last_words:
                ways = (
                    "true to take its own test part, or false to take and split all of them, as sets that were begun without a "
                    "word of it do; to split one alone, give it as data.source"
                )
            raise UserError(
                f"'{root}' has Parquet files of parts of a data set, such as '{text(first)}' and '{text(others[0])}'; give "
                f"--data.official_split {ways if found.train else 'false to take all of them, or one of them as data.source'}"
            )
    # what such names say was not asked about once: sets of all files are gone on with
    pooled = found and found.by_last_words and config.official_split is False
    if found and (not found.train or pooled or (config.official_split is None and not config.classes)):
        found = None
    test = []
    if found and config.official_split is not False:
        secret = found.test and found.validation and not parquet_source.is_labelled(root, found.test[0], config, labelled)
        test = found.validation if secret else found.test or found.validation
    if config.official_split and not test:
        raise UserError(f"data.official_split is true, but no files of '{root}' are named train... and test... or validation...")
    if found is None:
        return names, set(), ""
    taken = sorted([*found.train, *test], key=names.index)
    unused = [name for name in names if name not in set(taken)]
    told = f"{len(unused)} Parquet files of other parts, the first: '{text(unused[0])}' (data.official_split)" if unused else ""
    return taken, set(test), told
