"""Natural images in Parquet as others write it (plain pyarrow, pandas, Hugging Face datasets), here and in S3."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from PIL import Image

from dmat_ray.config import DataConfig
from dmat_ray.data.sources import Listing, list_examples, read, read_pixels, versions_of_images
from dmat_ray.errors import StorageError, UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, format="PNG")
    return buffer.getvalue()


def images(count: int, start: int = 0) -> list[bytes]:
    return [png(i % 256) for i in range(start, start + count)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def listed(source: object, **settings: Any) -> tuple[Listing, DataConfig]:
    config = DataConfig(source=str(source), resolution=8, **settings)
    return list_examples(config), config


def refused(source: object, message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, **settings)
    assert "\n" not in str(told.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


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


def test_images_beside_a_parquet_file(tmp_path: Path) -> None:
    """bytes null and a path: as Hugging Face datasets write images that are files."""
    (tmp_path / "set/pictures 🐈").mkdir(parents=True)
    (tmp_path / "set/pictures 🐈/1.png").write_bytes(png(1))
    (tmp_path / "outside.png").write_bytes(png(2))
    paths = [
        "../pictures 🐈/1.png", "absent.png", "../../outside.png", str(tmp_path / "outside.png"), "s3://bucket/x.png",
        str(tmp_path / "set/pictures 🐈/1.png"), None,
    ]  # fmt: skip
    values = [*({"bytes": None, "path": path} for path in paths), None, {"bytes": png(5), "path": "absent.png"}]
    columns = {"image": pa.array(values, STRUCT), "label": [0, 1, 0, 1, 0, 1, 0, 1, 0]}
    write(tmp_path / "set/data/x.parquet", columns)
    listing, config = listed(tmp_path / "set")
    found = read(listing.table, config)
    assert found[0] == found[5] == png(1)
    assert found[1] == "cannot be read: No such file or directory"
    for i in (2, 3, 4):
        assert found[i] == f"has no bytes, and its path '{paths[i]}' does not lead to a file below '{tmp_path / 'set'}'"
    assert found[6:] == ["is null", "is null", png(5)]
    # of a file that is a source of its own, below its folder
    listing, config = listed(tmp_path / "set/data/x.parquet")
    assert "does not lead to a file below" in str(read(listing.table, config)[0])


def test_paths_that_are_no_paths_cost_their_own_images(tmp_path: Path) -> None:
    latin = pa.array([b"gr\xfcn.png", b"gr\xfcn.png", b"a\0b.png", None]).view(pa.string())
    contents = pa.array([png(1), None, None, png(4)], pa.binary())
    write(
        tmp_path / "x.parquet",
        {"image": pa.StructArray.from_arrays([contents, latin], fields=list(STRUCT)), "label": [0, 1, 0, 1]},
    )
    listing, config = listed(tmp_path)
    found = read(listing.table, config)
    assert (found[0], found[3]) == (png(1), png(4))
    assert found[1] == "has no bytes, and a path that is not UTF-8"
    assert found[2] == f"has no bytes, and its path 'a\\x00b.png' does not lead to a file below '{tmp_path}'"
    numbers = pa.StructArray.from_arrays([contents, pa.array([1, 2, 3, 4])], ["bytes", "path"])
    write(tmp_path / "y" / "x.parquet", {"image": numbers, "label": [0, 1, 0, 1]})
    listing, config = listed(tmp_path / "y")
    assert read(listing.table, config) == [png(1), "is null", "is null", png(4)]


def test_a_damaged_row_group_costs_its_own_images(tmp_path: Path) -> None:
    """Random bytes as images, so that each page is found in the file by what it holds."""
    contents = [random.Random(i).randbytes(500) for i in range(40)]
    file = write(
        tmp_path / "x.parquet", {"image": contents, "label": [0, 1] * 20}, row_group_size=10, write_page_checksum=True,
        compression="none", use_dictionary=False,
    )  # fmt: skip
    whole = file.read_bytes()
    place = whole.index(contents[23])
    file.write_bytes(whole[:place] + b"\0" + whole[place + 1 :])
    listing, config = listed(tmp_path)
    found = read(listing.table, config)
    assert found[:20] + found[30:] == contents[:20] + contents[30:]
    assert all(str(reason).startswith("cannot be read: ") and "\n" not in str(reason) for reason in found[20:30])


def test_a_file_that_has_changed_since_it_was_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", {"image": images(20), "label": [0, 1] * 10})
    write(tmp_path / "y.parquet", {"image": images(4), "label": [0, 1] * 2})
    listing, config = listed(tmp_path)
    before = versions_of_images(listing.table, config)
    assert len(set(before)) == 24, "one for each row"
    write(file, {"image": images(15), "label": [0] * 15})
    assert [a == b for a, b in zip(before, versions_of_images(listing.table, config), strict=True)] == [False] * 20 + [True] * 4
    assert read(listing.table.slice(20), config) == images(4), "the other file is as it was"
    for content in (file.read_bytes(), b"no Parquet", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.parquet' has changed since it was listed"):
            read(listing.table, config)
    file.unlink()
    assert read(listing.table, config) == [*["cannot be read: No such file or directory"] * 20, *images(4)]


def test_a_set_of_ours_is_a_source(make_set: Callable[..., Path]) -> None:
    """Its natural images, to be projected with another generator."""
    folder = make_set(train=24, test=12, shards=3)
    listing, config = listed(folder, id_column="id")
    rows = pq.read_table(folder / "shards").to_pylist()
    assert listing.table["id"].to_pylist() == [row["id"] for row in rows]
    assert listing.table["label"].to_pylist() == [row["label"] for row in rows]
    assert list(listing.class_names) == json.loads((folder / "manifest.json").read_text())["class_names"]
    assert read(listing.table, config) == [row["image"]["bytes"] for row in rows]


def test_a_set_of_ours_that_lies_among_images_is_not_taken_for_them(make_set: Callable[..., Path], tmp_path: Path) -> None:
    """Neither in a folder of classes nor beside Parquet files; as Parquet it would hide the former."""
    made = make_set(train=24, test=12, shards=3)
    for name in ("cat", "dog"):
        for i in range(5):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png(i))
    write(tmp_path / "tables" / "x.parquet", {"image": images(10), "label": ["cat", "dog"] * 5})
    for source in ("photos", "tables"):
        shutil.copytree(made, tmp_path / source / "old" / "set")
        if source == "photos":
            refused(tmp_path / source, r"class folder '.*/old' holds no images")
            (tmp_path / source / "old").rename(tmp_path / source / "cat" / "old")
        listing, _ = listed(tmp_path / source)
        assert (listing.found, listing.class_names) == (10, ("cat", "dog"))
        inside = "cat/old/set" if source == "photos" else "old/set"
        assert listing.ignored == f"1 on-manifold set in it, the first: '{inside}'"
    (tmp_path / "tables" / "x.parquet").unlink()
    refused(tmp_path / "tables", "holds no images but those of on-manifold sets; give '.*/tables/old/set' to take these")
    for place in ("old/set", "old/set/shards", "old/set/shards/part-000000.parquet"):
        assert listed(tmp_path / "tables" / place, id_column="id")[0].found, "it is named"
    # shards of another kind are data
    write(tmp_path / "others" / "mine" / "shards" / "part-000000.parquet", {"image": images(10), "label": [0, 1] * 5})
    assert listed(tmp_path / "others")[0].found == 10


def test_images_that_parquet_hides_are_told(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            (tmp_path / name / f"{i}.png").write_bytes(png(i))
    assert listed(tmp_path)[0].ignored == ""
    write(tmp_path / "extra.parquet", {"image": images(4), "label": [0, 1] * 2})
    listing, _ = listed(tmp_path)
    assert listing.found == 4
    assert listing.ignored == "10 image files beside Parquet, unless that names them, the first: 'cat/0.png'"
    (tmp_path / "extra.parquet").unlink()
    write(tmp_path / "metadata.parquet", {"file_name": ["cat/0.png"], "label": [0]})  # as of Hugging Face
    told = (
        r"'metadata\.parquet' has no column 'image' .* has image files, too, such as 'cat/0\.png', .*: move the latter elsewhere"
    )
    refused(tmp_path, told)


def test_parquet_in_a_store(server: s3.Server, tmp_path: Path) -> None:
    values = [
        *({"bytes": content, "path": None} for content in images(10)),
        *({"bytes": None, "path": f"../img/{i}.png"} for i in (1, 2)),
    ]
    for k in range(3):
        write(tmp_path / f"set/data/{k} é#.parquet", {"image": pa.array(values, STRUCT), "label": [0, 1] * 6})
    (tmp_path / "set/img").mkdir()
    (tmp_path / "set/img/1.png").write_bytes(png(100))
    server.put("parquet", {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})
    here, config_here = listed(tmp_path / "set")
    there, config = listed("s3://parquet/set")
    assert there.table.drop_columns("file_digest").equals(here.table.drop_columns("file_digest"))
    assert read(there.table, config) == read(here.table, config_here)
    assert "cannot be read: No such file or directory" in read(there.table, config)
    one, config = listed("s3://parquet/set/data/0 é#.parquet")
    assert read(one.table, config)[:10] == images(10)
    server.client().put_object(Bucket="parquet", Key="set/data/1 é#.parquet", Body=b"PAR1")
    refused("s3://parquet/set", "'s3://parquet/set/data/1 é#.parquet' is damaged or no Parquet file: .")
    told = r"cannot be read: http://127\.0\.0\.1:1 cannot be reached"
    with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1"), pytest.raises(StorageError, match=told):
        read(one.table, config)


@pytest.mark.slow
def test_only_what_is_needed_is_fetched(server: s3.Server) -> None:
    contents = [random.Random(i).randbytes(1 << 20) for i in range(16)]
    sink = pa.BufferOutputStream()
    columns = {"image": contents, "copy": contents, "label": [0, 1] * 8}
    pq.write_table(pa.table(columns), sink, row_group_size=2, use_dictionary=False)
    server.put("large", {"x.parquet": sink.getvalue().to_pybytes()})

    def fetched(start: int) -> int:
        ranges = [
            line.split("bytes=")[1].split("-")
            for line in server.requests()[start:]
            if line.startswith("GET") and "bytes=" in line
        ]
        return sum(int(last) - int(first) + 1 for first, last in ranges)

    start = len(server.requests())
    listing, config = listed("s3://large")
    assert fetched(start) < 1 << 20, "the labels of 32 MiB"
    start = len(server.requests())
    assert read(listing.table.slice(5, 1), config) == contents[5:6]
    assert fetched(start) < 3 << 20, "one of eight row groups, without the copy"
