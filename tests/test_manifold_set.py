"""The on-manifold set: what is written, what is refused, and how epochs are dealt out."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dmat_ray.data import manifold_set
from dmat_ray.data.manifold_set import ManifoldSet, epoch_batches, open_set
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.types import Batch

MakeSet = Callable[..., Path]


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rows_of(folder: Path) -> list[dict[str, object]]:
    """All rows, sorted by id, through plain pyarrow."""
    tables = [pq.read_table(path) for path in (folder / "shards").glob("*.parquet")]
    return pa.concat_tables(tables).sort_by("id").to_pylist()


def test_schema_is_plain_arrow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, w = rng.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8), rng.standard_normal((5, 2, 7)).astype(np.float32)
    columns = {
        "id": list("abcde"),
        "split": ["train"] * 5,
        "label": [0, 1, 2, 3, 4],
        "image": [{"bytes": b"x", "path": "p"}] * 5,
        "on_manifold": manifold_set.fixed_list(images, pa.uint8()),
        "w": manifold_set.fixed_list(w, pa.float32()),
        **{name: np.zeros(5, np.float32) for name in ("lpips", "l1", "l2")},
        "steps": [3] * 5,
        "status": ["ok"] * 5,
    }
    pq.write_table(pa.table(columns, schema=manifold_set.schema(3, 4, 2, 7)), tmp_path / "x.parquet")
    read = pq.read_table(tmp_path / "x.parquet")
    assert read.schema.field("w").type == pa.list_(pa.float32(), 14)
    assert read.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shapes = json.loads(read.schema.metadata[b"dmat_ray"])["shapes"]
    assert shapes == {"on_manifold": [3, 4, 4], "w": [2, 7]}
    for i, row in enumerate(read.to_pylist()):
        np.testing.assert_array_equal(np.array(row["w"], np.float32).reshape(shapes["w"]), w[i])
        np.testing.assert_array_equal(np.array(row["on_manifold"]).reshape(shapes["on_manifold"]), images[i])


def test_open_set_gives_what_plain_pyarrow_reads(set_folder: Path) -> None:
    for split, count in (("train", 24), ("test", 12)):
        data = open_set(set_folder, split)
        rows = [r for r in rows_of(set_folder) if r["split"] == split]
        assert len(data) == len(rows) == count
        assert data.id == [r["id"] for r in rows]
        assert data.label.tolist() == [r["label"] for r in rows]
        np.testing.assert_array_equal(data.w.reshape(count, -1), np.array([r["w"] for r in rows], np.float32))
        np.testing.assert_array_equal(data.on_manifold.reshape(count, -1), [r["on_manifold"] for r in rows])


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
    content = {r["id"]: r["image"]["bytes"] for r in rows_of(set_folder)}  # type: ignore[index]
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


def _truncated_shard(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


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
        (_other_version, "format version 99, this program reads 1"),
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
    manifest = manifold_set.read_manifest(set_folder)
    manifold_set.require_generator(manifest, generators.fingerprint(str(generator_folder)), "the set")
    with pytest.raises(UserError, match=r"the set was made with generator .*generator\.path"):
        manifold_set.require_generator(manifest, "0" * 64, "the set")


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


@given(workers=st.integers(1, 4), size=st.integers(4, 24), batch_size=st.integers(4, 12))
def test_workers_share_the_batches_of_one(set_folder: Path, workers: int, size: int, batch_size: int) -> None:
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
        assert set(extra) <= set(whole[0]), "topped up from the epoch's beginning"


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
            np.testing.assert_array_equal((x * 255).round().flatten(), rows[i]["on_manifold"])


def test_quantise_rounds_and_clips() -> None:
    x = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 254.6 / 255, 1.0, 1.2])
    assert manifold_set.quantise(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    manifold_set.write_json(path, {"a": [1, 2.5, None]})
    with pytest.raises(TypeError):
        manifold_set.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
