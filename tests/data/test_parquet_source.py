"""Natural images in Parquet as others write it (plain pyarrow, pandas, Hugging Face datasets)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_sources import STRUCT, images, listed, refused, write
from PIL import Image

from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read, read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), STRUCT, pa.struct([("bytes", pa.binary())])])
@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
def test_any_part_of_a_file_is_read_in_any_order(tmp_path: Path, kind: pa.DataType, row_group_size: int) -> None:
    contents = images(200)
    values = [{"bytes": content} for content in contents] if pa.types.is_struct(kind) else contents
    columns = {"other": ["x" * 50] * 200, "image": pa.array(values, kind), "label": [i % 3 for i in range(200)]}
    file = write(tmp_path / "x.parquet", columns, row_group_size=row_group_size)
    listing, config = listed(file)
    assert listing.table["id"].to_pylist() == [f"x.parquet#{i:06d}" for i in range(200)]
    assert listing.table["label"].to_pylist() == [i % 3 for i in range(200)]
    assert listing.class_names == ("0", "1", "2")
    assert read(listing.table, config) == contents
    order = np.random.default_rng(0).integers(0, 200, 50)
    assert read(listing.table.take(pa.array(order)), config) == [contents[i] for i in order]
    assert read(listing.table.slice(63, 3), config) == contents[63:66]
    assert read(listing.table.slice(0, 0), config) == []
    assert all((pixels == i).all() for i, pixels in enumerate(read_pixels(listing.table.slice(0, 9), config)))


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (pa.array([0, 1, 2, 1] * 3, pa.uint8()), [0, 1, 2, 1], ("0", "1", "2")),
        (pa.array([7, -1, 100, 7] * 3, pa.int16()), [1, 0, 2, 1], ("-1", "7", "100")),
        (pa.array([9, 10, 11, 9] * 3, pa.int64()), [0, 1, 2, 0], ("9", "10", "11")),
        (pa.array(["b", "a", "é", "b"] * 3), [1, 0, 2, 1], ("a", "b", "é")),
        (pa.array(["b", "a", "", "b"] * 3, pa.large_string()), [2, 1, 0, 2], ("", "a", "b")),
        (pa.array(["b", "a", "c", "b"] * 3).dictionary_encode(), [1, 0, 2, 1], ("a", "b", "c")),
        (pa.array([b"b", b"a", b"c", b"b"] * 3), [1, 0, 2, 1], ("a", "b", "c")),
    ],
    ids=["uint8", "gaps", "numbers in order of size", "text", "large text", "dictionary", "bytes"],
)
def test_labels_are_numbers_or_names(tmp_path: Path, labels: pa.Array, numbers: list[int], names: tuple[str, ...]) -> None:
    listing, _ = listed(write(tmp_path / "x.parquet", {"image": images(12), "label": labels}))
    assert listing.table["label"].to_pylist() == numbers * 3
    assert listing.class_names == names


def test_pandas_categories(tmp_path: Path) -> None:
    frame = pd.DataFrame({"picture": images(12), "what": pd.Categorical(["dog", "cat", "dog"] * 4, ["dog", "unused", "cat"])})
    frame.index = pd.Index([*range(100, 111), 200], name="number")
    frame.to_parquet(tmp_path / "x.parquet")
    listing, config = listed(tmp_path / "x.parquet", image_column="picture", label_column="what", id_column="number")
    assert listing.class_names == ("cat", "dog")
    assert listing.table["label"].to_pylist() == [1, 0, 1] * 4
    assert listing.table["id"].to_pylist() == [*(str(i) for i in range(100, 111)), "200"]
    assert read(listing.table, config) == images(12)


@pytest.mark.slow
def test_hugging_face_datasets(tmp_path: Path) -> None:
    import datasets

    names = ["zebra", "ant", "never"]
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [0, 1, 1] * 4}
    for k in range(2):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / f"train-{k:05d}-of-00002.parquet"))
    listing, config = listed(tmp_path)
    assert listing.class_names == ("zebra", "ant"), "in their order; what has no image is no class"
    assert listing.table["label"].to_pylist() == [0, 1, 1] * 8
    np.testing.assert_array_equal(np.concatenate(read_pixels(listing.table, config)), np.concatenate([pixels, pixels]))


def test_class_names_of_files_must_agree(tmp_path: Path) -> None:
    def make(name: str, label: list[int], names: object) -> None:
        table = pa.table({"image": images(12), "label": label * 4})
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), tmp_path / name
        )

    make("a.parquet", [0, 1, 1], ["x", "y"])
    write(tmp_path / "b.parquet", {"image": images(12), "label": [0, 1, 1] * 4})
    assert listed(tmp_path)[0].class_names == ("x", "y")
    make("c.parquet", [0, 1, 1], ["y", "x"])
    refused(tmp_path, r"metadata of 'c\.parquet' name other classes for 'label' than those of 'a\.parquet'")
    (tmp_path / "c.parquet").unlink()
    make("a.parquet", [0, 1, -1], ["x", "y"])
    refused(tmp_path, r"label -1 occurs in column 'label', but the metadata of 'a\.parquet' name 2 classes \(0 to 1\)")
    for damaged in ([1, 2], "x", None):
        make("a.parquet", [0, 1, 1], damaged)
        assert listed(tmp_path)[0].class_names == ("0", "1")
    pq.write_table(
        pa.table({"image": images(12), "label": [0, 1, 1] * 4}).replace_schema_metadata({"huggingface": b"{"}),
        tmp_path / "a.parquet",
    )
    assert listed(tmp_path)[0].class_names == ("0", "1")


def test_a_folder_is_read_file_after_file(tmp_path: Path) -> None:
    order = ["a-1.parquet", "a/1.parquet", "a/é 🐈#%.parquet", "b.PARQUET"]
    order.sort(key=lambda name: name.split("/"))
    for k, name in enumerate(order):
        write(tmp_path / name, {"image": images(6, 6 * k), "label": [0, 1] * 3})
    for name in (
        ".hidden.parquet",
        ".cache/x.parquet",
        "_temporary/0/x.parquet",
        "readme.md",
        "_SUCCESS",
        "_metadata",
        "empty.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no Parquet")
    write(tmp_path / "zero.parquet", {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    listing, config = listed(tmp_path)
    assert listing.table["id"].to_pylist() == [f"{name}#{i:06d}" for name in order for i in range(6)]
    assert read(listing.table, config) == images(24)
    assert set(listing.table["split"].to_pylist()) == {"train", "test"}
    limited, _ = listed(tmp_path, train_limit=4, test_limit=2)
    assert read(limited.table, config) == [
        images(24)[listing.table["id"].to_pylist().index(i)] for i in limited.table["id"].to_pylist()
    ]


def test_a_folder_whose_name_ends_like_a_file(tmp_path: Path) -> None:
    """As Spark names what it writes."""
    write(tmp_path / "all.parquet/part-0.snappy.parquet", {"image": images(6), "label": [0, 1] * 3})
    listing, config = listed(tmp_path / "all.parquet")
    assert listing.table["id"][0].as_py() == "part-0.snappy.parquet#000000"
    assert read(listing.table, config) == images(6)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"image": images(6), "label": [0, 1] * 3})
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet")
    file.rename(odd)
    listing, config = listed(tmp_path)
    assert listing.table["id"][0].as_py() == "\\xff.parquet#000000"
    assert read(listing.table, config) == images(6)


def test_ids_of_a_column(tmp_path: Path) -> None:
    names = [f"{i} 🐈\n#%" for i in range(12)]
    columns = {"image": images(12), "label": [0, 1, 1] * 4, "name": names, "number": pa.array(range(12), pa.uint16())}
    write(tmp_path / "x.parquet", columns)
    assert listed(tmp_path, id_column="name")[0].table["id"].to_pylist() == names
    assert listed(tmp_path, id_column="number")[0].table["id"].to_pylist() == [str(i) for i in range(12)]
    write(tmp_path / "y.parquet", {**columns, "name": [*(f"y{i}" for i in range(11)), "7 🐈\n#%"]})
    with pytest.raises(UserError, match=r"the id '7 🐈\n#%' occurs 2 times in data\.id_column 'name'; ids must be unique"):
        listed(tmp_path, id_column="name")
    write(tmp_path / "y.parquet", {**columns, "name": [*("abcdefghij"), None, None]})
    refused(tmp_path, r"2 of 12 rows of 'y\.parquet' have null in data\.id_column 'name', the first is row 10", id_column="name")


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"x": [1]}, {}, r"'x\.parquet' has no column 'image' \(data\.image_column\); it has 'x'"),
        ({"image": [b"1"], "y": [1]}, {}, r"has no column 'label' \(data\.label_column\); it has 'image', 'y'"),
        ({"image": [b"1"], "label": [1]}, {"id_column": "id"}, r"has no column 'id' \(data\.id_column\); it has 'image'"),
        ({"image": ["a.png"], "label": [1]}, {}, "image_column 'image' of .* is of type string; it must be binary or struct"),
        ({"image": [{"path": "x"}], "label": [1]}, {}, "is of type struct<path: string>; it must be binary or struct"),
        ({"image": [b"1"], "label": [1.5]}, {}, r"label_column 'label' of 'x\.parquet' is of type double; it must be integers"),
        ({"image": [b"1"], "label": [[1]]}, {}, r"data\.label_column 'label' of 'x\.parquet' is of type list"),
        ({"image": [b"1"] * 3, "label": [1, None, None]}, {}, "2 of 3 rows of .* have null in .*'label', the first is row 1"),
        ({"image": [b"1"] * 3, "label": ["a", "b", None]}, {}, "1 of 3 rows .* null .* the first is row 2"),
        ({"image": [b"1"] * 3, "label": [1, 1, 1]}, {}, "has one class only"),
        ({"image": [b"1"] * 3, "label": [1, 2, 2]}, {}, "class '1' of .* has no image in the train split"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}, "is Parquet without rows"),
        ({"image": [b"1"], "label": pa.array([2**64 - 1], pa.uint64())}, {}, "cannot be used: .*18446744073709551615"),
        ({"image": [b"1"], "label": pa.array([b"\xff"])}, {}, "cannot be used: .*UTF8"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_used(tmp_path: Path, columns: dict[str, Any], settings: dict[str, str], message: str) -> None:
    refused(write(tmp_path / "x.parquet", columns), message, **settings)


def test_labels_of_two_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(4), "label": [0, 1, 0, 1]})
    write(tmp_path / "b.parquet", {"image": images(4), "label": ["0", "1", "0", "1"]})
    refused(tmp_path, r"data\.label_column 'label' is of type int64 in 'a\.parquet' and string in 'b\.parquet'")


def test_images_without_labels(tmp_path: Path) -> None:
    config = DataConfig(source=str(write(tmp_path / "x.parquet", {"image": images(6)})))
    listing = list_examples(config, labelled=False)
    assert listing.table["label"].to_pylist() == [0] * 6
    assert len(listing.class_names) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    refused(tmp_path, r"x\.parquet' is damaged or no Parquet file: .")
