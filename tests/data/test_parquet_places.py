"""Parquet where it lies: beside images, among sets of ours, damaged or changed, and in a store."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from parquet_sources import STRUCT, images, listed, png, refused, write

from dmat_ray.data.reading import read, versions_of_images
from dmat_ray.errors import StorageError, UserError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


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
    with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1"), s3.asked_once(), pytest.raises(StorageError, match=told):
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
