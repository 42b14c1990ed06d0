"""The on-manifold set as it is opened: what plain pyarrow reads, of the images that are asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from set_rows import MakeSet, edit_manifest, pixels_of, rows_of

from dmat_ray.cluster.shard_tasks import read_examples
from dmat_ray.data import set_format, set_reader, set_writer
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.storage import at


def test_open_set_gives_what_plain_pyarrow_reads(set_folder: Path) -> None:
    for split, count in (("train", 24), ("test", 12)):
        data = open_set(set_folder, split)
        rows = [r for r in rows_of(set_folder) if r["split"] == split]
        assert len(data) == len(rows) == count
        assert data.id == [r["id"] for r in rows]
        assert data.label.tolist() == [r["label"] for r in rows]
        np.testing.assert_array_equal(data.w.reshape(count, -1), np.array([r["w"] for r in rows], np.float32))
        np.testing.assert_array_equal(data.on_manifold, [pixels_of(r["on_manifold"]) for r in rows])
        np.testing.assert_array_equal(data.natural, [pixels_of(r["image"]) for r in rows])


def test_open_set_reads_shards_without_rows_and_with_metadata_of_their_own(make_set: MakeSet) -> None:
    folder = make_set()
    whole = open_set(folder, "train")
    path = folder / "shards" / "part-000001.parquet"
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"dmat_ray_rejected": b'{"x": "is no image"}'}
    pq.write_table(table.schema.empty_table().replace_schema_metadata(metadata), folder / "shards" / "part-000003.parquet")
    edit_manifest(folder, shards={**json.loads((folder / "manifest.json").read_text())["shards"], "part-000003.parquet": 0})
    again = open_set(folder, "train")
    assert again.id == whole.id
    np.testing.assert_array_equal(again.on_manifold, whole.on_manifold)


def test_open_set_does_not_depend_on_the_order_of_rows(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set()
    shuffled = open_set(folder, "train")
    tables = [pq.read_table(path) for path in sorted((folder / "shards").glob("*.parquet"))]
    ordered = pa.concat_tables(tables).sort_by("id")
    for k, path in enumerate(sorted((folder / "shards").glob("*.parquet"))):
        pq.write_table(ordered[12 * k : 12 * k + 12], path, row_group_size=5)
    data = open_set(folder, "train")
    assert data.id == shuffled.id == sorted(shuffled.id)
    for name in ("on_manifold", "natural", "label", "w"):
        np.testing.assert_array_equal(getattr(data, name), getattr(shuffled, name))


@pytest.mark.parametrize(
    ("padding", "group_bytes"),
    [(0, 4_000), pytest.param(64_000_000, set_writer.GROUP_BYTES, marks=[pytest.mark.exhaustive, pytest.mark.slow])],
)
def test_a_shard_of_several_row_groups_is_read_whole(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, padding: int, group_bytes: int
) -> None:
    """Also one of more than 2 GiB of natural images, which are more than one Arrow array holds: zeros follow each."""
    folder = make_set(shards=1)
    before = open_set(folder, "train")
    (path,) = (folder / "shards").iterdir()
    table = pq.read_table(path)
    natural = set_format.to_netpbm(np.stack([pixels_of(value) for value in table["image"].to_pylist()])).to_pylist()
    padded = [{**value, "bytes": value["bytes"] + bytes(padding)} for value in natural]
    image = pa.chunked_array([pa.array(half, set_format.IMAGE) for half in (padded[:18], padded[18:])])
    monkeypatch.setattr(set_writer, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(set_writer, "COMPRESSION", {})  # zeros take no room in the file
    set_writer.write_shard(at(folder), path.name, table.set_column(3, "image", image), {})
    del table, image, padded
    assert 3 < pq.ParquetFile(path).num_row_groups < 12

    manifest = set_reader.read_manifest(folder)
    assert set_reader.read_shard(at(folder), path.name, ["id", "image"], manifest).num_rows == 36
    np.testing.assert_array_equal(open_set(folder, "train", images="natural").natural, before.natural)
    row = pa.table({"shards": [[path.name]]})
    asked = {"place": str(folder), "manifest": manifest, "without": before.id[:5], "twice": before.id[-2:]}
    expected = sorted([*range(5, 24), 22, 23])
    for images in ("natural", "on_manifold"):
        found = read_examples(row, images=images, **asked).sort_by("id")
        assert found["id"].to_pylist() == [before.id[i] for i in expected]
        assert found["label"].to_pylist() == before.label[expected].tolist()
        pixels = set_format.from_lists(found["pixels"], before.natural.shape[1:])
        np.testing.assert_array_equal(pixels, getattr(before, images)[expected])
    np.testing.assert_array_equal(set_format.from_lists(found["w"], before.w.shape[1:]), before.w[expected])
    inspection = inspect_set(folder)
    assert inspection.sound, [check.defects for check in inspection.checks]


def test_open_set_of_some_ids(set_folder: Path) -> None:
    whole = open_set(set_folder, "train")
    wanted = [whole.id[7], whole.id[2]]
    some = open_set(set_folder, "train", only=wanted)
    assert some.id == sorted(wanted)
    taken = whole.take(np.array([2, 7]))
    assert taken.id == some.id
    for name in ("on_manifold", "natural", "label", "w"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[[2, 7]])
        np.testing.assert_array_equal(getattr(taken, name), getattr(whole, name)[[2, 7]])
    with pytest.raises(UserError, match="1 images to read in its train split, asked for were 2"):
        open_set(set_folder, "train", only=[whole.id[0], "another"])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_a_mask_is_its_positions(set_folder: Path, kind: Callable[[np.ndarray], Any]) -> None:
    data = open_set(set_folder, "train")
    mask = data.label == 1
    where = np.flatnonzero(mask)
    assert 1 < len(where) < len(data)
    batch = data.batch(np.arange(len(data)), "on_manifold")
    ids = [data.id[i] for i in where]
    for index in (kind(mask), kind(where)):
        taken = data.take(index)
        assert taken.id == ids
        for name in ("on_manifold", "natural", "label", "w"):
            np.testing.assert_array_equal(getattr(taken, name), getattr(data, name)[where])
        for some in (data.batch(index, "on_manifold"), batch.take(index)):
            assert some.w_BLD is not None
            assert list(some.id) == ids
            assert some.y_B.tolist() == [1] * len(where)
            np.testing.assert_array_equal(some.w_BLD, data.w[where])
            np.testing.assert_array_equal((some.x_BCHW * 255).round(), data.on_manifold[where])
    assert len(data.take([])) == len(batch.take(np.zeros(24, bool))) == 0
    for wrong, message in (
        (kind(mask[:-1]), r"a mask of the shape \(23,\) .* for 24 examples"),
        (slice(2), "neither whole numbers"),
    ):
        for call in (data.take, batch.take, lambda index: data.batch(index, "natural")):
            with pytest.raises(UserError, match=message):
                call(wrong)


def test_open_set_keeps_only_the_images_that_are_asked_for(set_folder: Path) -> None:
    whole = open_set(set_folder, "train")
    for kind, other in (("on_manifold", "natural"), ("natural", "on_manifold")):
        found = open_set(set_folder, "train", images=kind)
        assert np.array_equal(getattr(found, kind), getattr(whole, kind))
        assert getattr(found, other).nbytes == 0
        assert found.id == whole.id
        few = found.take(np.array([3, 1])).batch(np.array([0, 1]), kind)
        assert torch.equal(few.x_BCHW, whole.batch(np.array([3, 1]), kind).x_BCHW)


def test_images_of_no_known_kind_are_refused(set_folder: Path) -> None:
    whole = open_set(set_folder, "train")
    for kind, hint in (("manifold", r"did you mean on_manifold\? "), ("x", ""), (None, "")):
        with pytest.raises(UserError, match=rf"^images is {kind!r}; {hint}choose from on_manifold, natural$"):
            whole.batch(np.arange(2), kind)
    with pytest.raises(UserError, match=r"^images is 'on-manifold'; did you mean on_manifold\? choose from .*, natural, none$"):
        open_set(set_folder, "train", images="on-manifold")
    for opened, other in (("on_manifold", "natural"), ("natural", "on_manifold"), ("none", "natural")):
        with pytest.raises(UserError, match=f"was opened without its {other} images; open it with images=None"):
            open_set(set_folder, "train", images=opened).batch(np.arange(2), other)


def test_w_renders_the_stored_image(set_folder: Path, generator_folder: Path) -> None:
    data = open_set(set_folder, "train")
    batch = data.batch(np.arange(len(data)), "on_manifold")
    assert batch.w_BLD is not None
    x = generators.load_generator(str(generator_folder)).synthesis(batch.w_BLD)
    assert (x - batch.x_BCHW).abs().max() <= 0.5 / 255 + 1e-6


def test_natural_batch_has_the_natural_image_and_no_w(set_folder: Path) -> None:
    data = open_set(set_folder, "test")
    batch = data.batch(np.array([3, 1]), "natural")
    assert batch.w_BLD is None
    assert batch.id == [data.id[3], data.id[1]]
    assert batch.y_B.tolist() == data.label[[3, 1]].tolist()
    content = {r["id"]: r["image"]["bytes"] for r in rows_of(set_folder)}
    with Image.open(pa.BufferReader(content[data.id[3]])) as image:
        np.testing.assert_allclose(batch.x_BCHW[0, 0].numpy() * 255, np.asarray(image), atol=1e-4)


def test_poor_images_are_left_out_unless_asked_for(make_set: MakeSet) -> None:
    folder = make_set()
    path = folder / "shards" / "part-000000.parquet"
    table = pq.read_table(path)
    column = table.schema.get_field_index("status")
    pq.write_table(table.set_column(column, "status", pa.array(["poor"] * table.num_rows)), path)
    poor = {r["id"] for r in table.to_pylist() if r["split"] == "train"}
    assert len(poor) > 0
    edit_manifest(folder, usable={"train": 24 - len(poor), "test": len(poor)})
    assert set(open_set(folder, "train").id).isdisjoint(poor)
    assert poor < set(open_set(folder, "train", include_poor=True).id)
