"""Images as a set stores them: rounded to bytes, and as netpbm in Arrow, which comes back from any rows."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from set_rows import pixels_of

from dmat_ray.data import set_format, set_writer
from dmat_ray.data.pixels import quantise
from dmat_ray.errors import UserError
from dmat_ray.storage import at


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


def test_quantise_rounds_and_clips() -> None:
    x = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 254.6 / 255, 1.0, 1.2])
    assert quantise(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
