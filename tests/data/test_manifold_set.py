"""The on-manifold set: what is written, what is refused, and how epochs are dealt out."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dmat_ray.cluster.shard_tasks import read_examples
from dmat_ray.data import manifold_set, set_format, set_reader, set_writer
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import ManifoldSet, epoch_batches, open_set
from dmat_ray.data.pixels import quantise
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.storage import at
from dmat_ray.storage.files import write_json
from dmat_ray.types import Batch

MakeSet = Callable[..., Path]


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows, sorted by id, through plain pyarrow."""
    tables = [pq.read_table(path) for path in (folder / "shards").glob("*.parquet")]
    return pa.concat_tables(tables).sort_by("id").to_pylist()


def pixels_of(value: Any) -> np.ndarray:
    """A stored image as Pillow reads it: (C, H, W)."""
    with Image.open(io.BytesIO(value["bytes"])) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@given(
    count=st.integers(0, 6),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 5),
    width=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 6), max_size=4),
)
def test_netpbm_is_what_pillow_reads_and_comes_back_from_any_chunks(
    count: int, channels: int, height: int, width: int, cuts: list[int]
) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    column = set_format.to_netpbm(images)
    for value, image in zip(column.to_pylist(), images, strict=True):
        np.testing.assert_array_equal(pixels_of(value), image)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    chunks = pa.chunked_array([column[a:b] for a, b in pairwise(edges)], column.type)
    np.testing.assert_array_equal(set_format.from_netpbm(chunks, images.shape[1:]), images)


def test_netpbm_comes_back_from_filtered_and_taken_rows() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), dtype=np.uint8)
    w = np.arange(9 * 6, dtype=np.float32).reshape(9, 2, 3)
    table = pa.table({"g": set_format.to_netpbm(images), "w": set_format.fixed_list(w, pa.float32())})[2:8]
    for index, part in (
        ([3, 5], table.filter(pa.array([False, True, False, True, False, False]))),
        ([7, 2], table.take([5, 0])),
        ([4, 5, 2, 3], pa.concat_tables([table[2:4], table[:2]])),
    ):
        np.testing.assert_array_equal(set_format.from_netpbm(part["g"], (3, 4, 4)), images[index])
        np.testing.assert_array_equal(set_format.from_lists(part["w"], (2, 3)), w[index])


@pytest.mark.parametrize(
    "content", [None, b"", b"P5\n2 2\n255\n123", b"P5\n2 2\n255\n12345", b"P6\n2 2\n255\n1234", b"P5\n4 1\n255\n1234"]
)
def test_what_is_no_image_of_the_set_is_refused(content: bytes | None) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    good = {"bytes": b"P5\n2 2\n255\n1234", "path": None}
    assert set_format.from_netpbm(pa.chunked_array([pa.array([good], kind)]), (1, 2, 2)).ravel().tolist() == list(b"1234")
    for bad in ({"bytes": content, "path": None}, None):
        with pytest.raises(UserError, match="no netpbm image of 2x2 pixels and 1 channels"):
            set_format.from_netpbm(pa.chunked_array([pa.array([good, bad, good], kind)]), (1, 2, 2))


def test_more_images_than_a_binary_column_holds_are_refused() -> None:
    """Arrow counts the bytes of a binary array in 32 bits, and Parquet's readers cannot cut a struct in two."""
    images = np.broadcast_to(np.zeros((), np.uint8), (700, 3, 1024, 1024))
    with pytest.raises(UserError, match=r"set projection\.shard_size to 682 or less"):
        set_format.to_netpbm(images)


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


def test_row_groups_are_cut_by_the_size_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All large images of a shard may lie together, as those of a class do."""
    monkeypatch.setattr(set_writer, "GROUP_BYTES", 1 << 20)
    sizes = [10] * 300 + [1 << 18] * 20 + [10] * 300
    shape = set_format.schema(1, 4, 1, 2, ["a"])
    columns = {
        **{"id": [str(i) for i in range(620)], "split": ["train"] * 620, "label": [0] * 620, "status": ["ok"] * 620},
        "image": [{"bytes": bytes(size), "path": None} for size in sizes],
        "on_manifold": set_format.to_netpbm(np.zeros((620, 1, 4, 4), np.uint8)),
        "w": set_format.fixed_list(np.zeros((620, 1, 2), np.float32), pa.float32()),
        **{name: np.zeros(620, np.float32) for name in set_format.ERRORS},
        "steps": np.zeros(620, np.int32),
    }
    set_writer.write_shard(at(tmp_path), "part-000000.parquet", pa.table(columns, schema=shape), {})
    file = pq.ParquetFile(tmp_path / "shards" / "part-000000.parquet")
    groups = [file.read_row_group(k) for k in range(file.num_row_groups)]
    assert max(group["image"].nbytes for group in groups) < 2 << 20
    assert [int(id) for group in groups for id in group["id"].to_pylist()] == list(range(620))


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
    with pytest.raises(UserError, match="no usable image in its test split"):
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


def batches(data: ManifoldSet, index: np.ndarray, **how: int) -> list[Batch]:
    return list(epoch_batches(data, index, images="on_manifold", **{"batch_size": 5, "epoch": 0, "seed": 0, **how}))


def ids(found: list[Batch]) -> list[list[str]]:
    return [list(batch.id) for batch in found]


@given(size=st.integers(1, 24), batch_size=st.integers(1, 30), epoch=st.integers(0, 5), seed=st.integers(0, 5))
def test_an_epoch_holds_every_example_once(set_folder: Path, size: int, batch_size: int, epoch: int, seed: int) -> None:
    data = open_set(set_folder, "train")
    index = np.random.default_rng(seed).permutation(24)[:size]
    found = batches(data, index, batch_size=batch_size, epoch=epoch, seed=seed)
    assert len(found) == manifold_set.steps_per_epoch(size, batch_size)
    assert sorted(chain(*ids(found))) == sorted(data.id[i] for i in index)
    sizes = [len(batch) for batch in found]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1, "no short last batch"


@given(workers=st.integers(1, 8), size=st.integers(3, 24), batch_size=st.integers(4, 12), first_step=st.integers(0, 2))
@example(workers=8, size=3, batch_size=4, first_step=0)
def test_workers_share_the_batches_of_one(set_folder: Path, workers: int, size: int, batch_size: int, first_step: int) -> None:
    data, index = open_set(set_folder, "train"), np.arange(size)
    whole = ids(batches(data, index, batch_size=batch_size))
    parts = [ids(batches(data, index, batch_size=batch_size, rank=r, world_size=workers)) for r in range(workers)]
    for step, expected in enumerate(whole):
        mine = [part[step] for part in parts]
        assert len({len(ids) for ids in mine}) == 1, "DDP needs equal parts"
        together = Counter(chain(*mine))
        extra = together - Counter(expected)
        assert Counter(expected) <= together
        assert extra.total() == -len(expected) % workers
        assert min(len(ids) for ids in mine) >= 1, "of no image there is no loss"
    often = Counter(chain(*chain(*parts))).values()
    assert max(often) - min(often) <= 1, "no example weighs much more than another"
    for r, part in enumerate(parts):
        again = batches(data, index, batch_size=batch_size, rank=r, world_size=workers, first_step=first_step)
        assert ids(again) == part[first_step:], "what is left of an epoch is what would have come"


def test_order_changes_by_epoch_and_repeats_by_seed(set_folder: Path) -> None:
    data, index = open_set(set_folder, "train"), np.arange(24)
    assert ids(batches(data, index)) == ids(batches(data, index))
    assert ids(batches(data, index, epoch=1)) != ids(batches(data, index))
    assert ids(batches(data, index, seed=1)) != ids(batches(data, index))


def test_a_batch_keeps_images_labels_and_codes_together(set_folder: Path) -> None:
    data = open_set(set_folder, "train")
    rows = {r["id"]: r for r in rows_of(set_folder)}
    for batch in batches(data, np.arange(24)):
        assert batch.w_BLD is not None
        for i, x, y, w in zip(batch.id, batch.x_BCHW, batch.y_B, batch.w_BLD, strict=True):
            assert y == rows[i]["label"]
            np.testing.assert_array_equal(w.flatten(), np.array(rows[i]["w"], np.float32))
            np.testing.assert_array_equal((x * 255).round(), pixels_of(rows[i]["on_manifold"]))


def test_quantise_rounds_and_clips() -> None:
    x = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 254.6 / 255, 1.0, 1.2])
    assert quantise(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
