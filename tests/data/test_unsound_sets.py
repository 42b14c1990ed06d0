"""Sets that are damaged, not whole or of another generator are refused, where what is damaged is read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from set_rows import MakeSet, edit_manifest

from dmat_ray.data import set_reader
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators


def test_no_images_are_read_but_those_that_are_asked_for(make_set: MakeSet) -> None:
    """Those of a shard are damaged: whoever reads them notices."""
    folder = make_set()
    whole = open_set(folder, "train")
    _flipped_bit(folder)
    hit = set(pq.read_table(folder / "shards" / "part-000001.parquet", columns=["id"])["id"].to_pylist())
    for wanted in ({"only": [i for i in whole.id if i not in hit]}, {"images": "natural"}, {"images": "none"}):
        found = open_set(folder, "train", **wanted)  # type: ignore[arg-type]
        there = [whole.id.index(i) for i in found.id]
        assert len(there) == len(wanted.get("only", whole.id))
        np.testing.assert_array_equal(found.w, whole.w[there])
        assert len(found.natural) == (0 if wanted.get("images") == "none" else len(there))
    with pytest.raises(UserError, match="checksum"):
        open_set(folder, "train", images="on_manifold")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _damaged_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"version": 1, ')


def _no_shard(folder: Path) -> None:
    (folder / "shards" / "part-000001.parquet").unlink()


def _short_shard(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    pq.write_table(pq.read_table(path)[:-1], path)


def _other_columns(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(6, "lpips", table["lpips"].cast(pa.float64())), path)


def _other_shape(folder: Path) -> None:
    edit_manifest(folder, shapes={"on_manifold": [1, 8, 8], "w": [1, 8]})


def _natural_image_damaged(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    table = pq.read_table(path)
    images = [{"bytes": b"no image", "path": "x"}] * table.num_rows
    pq.write_table(table.set_column(3, table.schema.field("image"), pa.array(images, table.schema.field("image").type)), path)


def _other_count(folder: Path) -> None:
    edit_manifest(folder, usable={"train": 23, "test": 12})


def _list_as_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


def _no_shapes(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "shapes"}))


def _usable_is_a_text(folder: Path) -> None:
    edit_manifest(folder, usable="x", count=-1)


def _two_channels(folder: Path) -> None:
    edit_manifest(folder, shapes={"on_manifold": [2, 8, 8], "w": [1, 8]})


def _flipped_bit(folder: Path) -> None:
    """In the pixels of a shard that was written with checksums."""
    path = folder / "shards" / "part-000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    where = content.index(table["on_manifold"][3]["bytes"].as_py()) + 40
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])


def _truncated_shard(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _shard_elsewhere(folder: Path) -> None:
    """A whole one, of the same rows, that is not the set's."""
    name = "part-000001.parquet"
    (folder / "shards" / name).rename(folder.parent / name)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    edit_manifest(folder, shards={f"../../{name}" if key == name else key: rows for key, rows in shards.items()})


def _natural_image_null(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    table = pq.read_table(path)
    files = table["image"].to_pylist()
    files[0]["bytes"] = None
    column = pa.array(files, table.schema.field("image").type)
    pq.write_table(table.set_column(table.column_names.index("image"), table.schema.field("image"), column), path)


def _other_version(folder: Path) -> None:
    edit_manifest(folder, version=99)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_manifest, "unfinished: it has no manifest.json"),
        (_damaged_manifest, "manifest.json' is damaged"),
        (_no_shard, "lacks its shard part-000001.parquet"),
        (_short_shard, "has 11 rows, its manifest says 12"),
        (_truncated_shard, "part-000001.parquet of .* is damaged"),
        (_flipped_bit, "part-000001.parquet of .* is damaged .*checksum"),
        (_other_columns, "has other columns than its manifest says: lpips is double, not float"),
        (_other_shape, r"has other columns than its manifest says: w is fixed_size_list<.*>\[\d+\], not .*\[8\]"),
        (_natural_image_damaged, "part-000001.parquet of .*: the natural image of 'example-.*' cannot be read"),
        (_natural_image_null, "part-000001.parquet of .*: the natural image of 'example-.*' cannot be read"),
        (_other_count, "24 images to read in its train split, its manifest says 23"),
        (_list_as_manifest, "is damaged: it holds a list, not an object"),
        (_no_shapes, r"manifest\.json' is damaged: shapes: is missing; run jobs/project\.py again"),
        (_usable_is_a_text, r"manifest\.json' is damaged: count: must be 0 or more \(found -1\) \(and 1 more\); run"),
        (_two_channels, r"damaged: shapes\.on_manifold: \[2, 8, 8\] is no shape of square grey or RGB images; run"),
        (_shard_elsewhere, r"names a shard '\.\./\.\./part-000001\.parquet', which is no file of its own"),
        (_other_version, "format version 99, this program reads 2"),
    ],
)
def test_sets_that_are_not_whole(make_set: MakeSet, damage: Callable[[Path], None], message: str) -> None:
    folder = make_set()
    assert len(open_set(folder, "train")) == 24
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_set(folder, "train")


def test_no_set_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no on-manifold set"):
        open_set(tmp_path / "absent", "train")


def test_split_without_images(make_set: MakeSet) -> None:
    with pytest.raises(UserError, match=r"no usable image in its test split: all were rejected, or are poor; jobs/inspect_set"):
        open_set(make_set(test=0), "test")


def test_other_generator(set_folder: Path, generator_folder: Path) -> None:
    manifest = set_reader.read_manifest(set_folder)
    set_reader.require_generator(manifest, generators.fingerprint(str(generator_folder)), "the set")
    with pytest.raises(UserError, match=r"the set was made with generator .*generator\.path"):
        set_reader.require_generator(manifest, "0" * 64, "the set")
    told = {**manifest, "generator": "/models/mine"}
    with pytest.raises(
        UserError, match=r"the set was made with generator '/models/mine' \(\w{12}\), but the one given is another \(0{12}\)"
    ):
        set_reader.require_generator(told, "0" * 64, "the set")
    assert set_reader.digest(told) == set_reader.digest(manifest), "the same set, wherever its generator lies"
