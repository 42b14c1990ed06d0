"""Folders of images in S3: the listing that they have here, the reasons that a store gives, and URLs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
from image_folders import ODD, folder_of, png

from dmat_ray import cli
from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read, versions_of_images
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import StorageError, UserError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


def test_the_same_folder_in_a_store_gives_the_same_listing(server: s3.Server, tmp_path: Path) -> None:
    names = [f"{c}/{n}.png" for c in ("kl ässe 🐈", "b#%+'\"", "a-1", "a") for n in ODD[1:]]
    root = folder_of(tmp_path, *names, "a/deeper/x.png", "a/readme.md", ".hidden/x.png")
    server.put("photos", {f"set/{p.relative_to(root)}": p.read_bytes() for p in root.rglob("*") if p.is_file()})
    here, there = DataConfig(source=str(root), resolution=8), DataConfig(source="s3://photos/set", resolution=8)
    before = len(server.requests())
    listing = list_examples(there)
    asked = server.requests()[before:]
    assert len(asked) == 3, "is it a file (two questions: an object, a prefix)? one listing"
    assert listing.table.equals(list_examples(here).table)
    assert listing.class_names == list_examples(here).class_names
    assert read(listing.table, there) == read(listing.table, here)
    assert len(read(listing.table.slice(3, 5), there)) == 5


def test_a_whole_bucket_and_its_versions(server: s3.Server) -> None:
    server.put("whole", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)} | {"empty/": b""})
    config = DataConfig(source="s3://whole")
    with pytest.raises(UserError, match="class folder 's3://whole/empty' holds no images"):
        list_examples(config)
    server.client().delete_object(Bucket="whole", Key="empty/")
    rows = list_examples(config).table
    before = versions_of_images(rows, config)
    server.client().put_object(Bucket="whole", Key="b/1.png", Body=png(99, 200))
    after = versions_of_images(rows, config)
    assert [id for id, a, b in zip(rows["id"].to_pylist(), before, after, strict=True) if a != b] == ["b/1.png"]


@pytest.mark.slow
def test_reasons_of_a_store(server: s3.Server) -> None:
    server.put("holes", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)})
    config = DataConfig(source="s3://holes", resolution=8)
    table = list_examples(config).table
    server.client().delete_object(Bucket="holes", Key="a/2.png")
    contents = read(table, config)
    assert [i for i, content in enumerate(contents) if isinstance(content, str)] == [2]
    assert contents[2] == "cannot be read: No such file or directory"
    with s3.environment(AWS_ACCESS_KEY_ID="stranger"), server.asking_for_credentials():
        assert read(table, config) == ["cannot be read: Permission denied"] * 8
        with pytest.raises(StorageError, match=r"'s3://holes.*' cannot be .*AWS_ACCESS_KEY_ID"):
            list_examples(config)
    # this says nothing of the images, of which none must be set aside
    told = r"'s3://holes/a/0\.png' cannot be read: http://127\.0\.0\.1:1 cannot be reached"
    with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1"), s3.asked_once(), pytest.raises(StorageError, match=told):
        read(table.slice(0, 1), config)


def test_urls_that_cannot_be_used(server: s3.Server) -> None:
    server.put("nothing", {"x/readme.md": b"text"})
    for source, message in (
        ("s3://nothing/absent", "'s3://nothing/absent' is neither 'mnist5k' nor a folder"),
        ("s3://no-such-bucket/x", "'s3://no-such-bucket/x' is neither 'mnist5k' nor a folder"),
        ("s3://nothing", "class folder 's3://nothing/x' holds no images"),
        ("s3://nothing/x", "'s3://nothing/x' holds no sub-folders"),
        ("http://host/x", "begins with http://; known are"),
    ):
        with pytest.raises(UserError, match=message):
            list_examples(DataConfig(source=source))


@pytest.mark.slow
def test_urls_survive_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(tmp_path, "photos/a/1.png"))
    for source in ("s3://bucket/a b/#%20", "gs://bucket", "mnist5k"):
        assert cli.parse("test", ["--data.source", source])[0].data.source == source
    assert cli.parse("test", ["--data.source", "photos"])[0].data.source == str(tmp_path / "photos")
