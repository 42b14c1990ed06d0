"""Places on this machine and in an S3 store (a real server, read and written by boto3 as well): what they are, hold and list."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from places import empty_place

from dmat_ray import settings
from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at

NAMES = [
    "plain.txt",
    "with space",
    "été.txt",
    "e\u0301te\u0301",
    "🐈",
    "#1",
    "100%",
    "%20",
    "a+b",
    "q'\"",
    "a&b<c>",
    "?x=1",
    "~",
    "a\\b",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return empty_place(request, tmp_path)


def test_an_entry_of_a_folder_is_its_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, os.fsencode(tmp_path)):
        (entry,) = os.scandir(folder)
        assert at(entry) == at(tmp_path / "run")
        assert settings(output=entry).output == str(tmp_path / "run")
    assert settings(output=Location("s3", "bucket/run")).output == "s3://bucket/run"


def test_a_place_of_this_machine_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert Path(at(tmp_path)) / "file" == tmp_path / "file"
    assert os.path.join(at(tmp_path), "file") == str(tmp_path / "file")
    with open(at(tmp_path / "file")) as file:
        assert file.read() == "x"
    assert settings(manifold_set=at(tmp_path), output=at("s3://bucket/folder")).manifold_set == str(tmp_path)
    with pytest.raises(UserError, match=r"^'s3://bucket/folder' is in an object store and has no path on this machine; str\(\)"):
        Path(at("s3://bucket/folder"))


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name(place: Location, name: str) -> None:
    file = place / "deep" / name
    assert not file.is_file()
    file.write_bytes(b"one")
    file.write_bytes(b"two")
    assert (file.name, file.parent, file.is_file(), file.is_dir()) == (name, place / "deep", True, False)
    assert file.read_bytes() == b"two"
    assert (place / "deep").files() == [file]
    assert place.tree() == ([f"deep/{name}"], ["deep"])
    with file.open() as opened:
        opened.seek(1)
        assert opened.read() == b"wo"
    assert not file.create_bytes(b"three")
    file.unlink()
    file.unlink()
    assert not file.is_file()
    assert file.create_bytes(b"three")
    assert file.read_bytes() == b"three"


def test_a_local_name_with_a_newline_or_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("new\nline", os.fsdecode(b"\xff\xfe.png")):
        file = at(tmp_path) / name
        file.write_bytes(b"x")
        assert Path(tmp_path, name).read_bytes() == b"x"
        assert file.is_file()
        assert file in at(tmp_path).files()
        assert name in at(tmp_path).tree()[0]


def test_what_is_written_is_what_others_read(server: s3.Server, tmp_path: Path) -> None:
    server.put("others", {"in/x 🐈.bin": b"theirs"})
    client = server.client()
    assert at("s3://others/in/x 🐈.bin").read_bytes() == b"theirs"
    big = random.Random(0).randbytes(12 << 20)  # more than one part
    for content in (b"", b"small", big):
        at("s3://others/out/%20").write_bytes(content)
        assert client.get_object(Bucket="others", Key="out/%20")["Body"].read() == content
        assert at("s3://others/out/%20").read_bytes() == content
    at(tmp_path / "a/b").write_bytes(memoryview(big))
    assert (tmp_path / "a/b").read_bytes() == big


def test_small_files_are_one_request(server: s3.Server) -> None:
    server.put("requests", {})
    before = len(server.requests())
    at("s3://requests/a/b/c.json").write_json({})
    assert server.requests()[before:] == ["PUT /requests/a/b/c.json"]


def test_folders(place: Location) -> None:
    assert (place.files(), place.tree(), place.is_dir(), place.is_file()) == ([], ([], []), False, False)
    for name in ("b", "a", "sub/deeper/c", ".hidden", ".cache/d", "sub/.e", "sub/f"):
        (place / name).write_bytes(b"x")
    assert place.is_dir()
    assert (place / "sub").is_dir()
    assert not (place / "su").is_dir()
    assert [file.name for file in place.files()] == ["a", "b"]
    files, folders = place.tree()
    assert sorted(files) == ["a", "b", "sub/deeper/c", "sub/f"]
    assert sorted(folders) == ["sub", "sub/deeper"]


def test_the_root_of_a_bucket(server: s3.Server) -> None:
    server.put("whole-bucket", {"x": b"x", "a/y": b"y"})
    root = at("s3://whole-bucket/")
    assert str(root) == "s3://whole-bucket"
    assert (root.is_dir(), root.parent, root.local) == (True, root, None)
    assert root.files() == [root / "x"]
    assert root.tree() == (["a/y", "x"], ["a"])
    assert root.versions().keys() == {"whole-bucket/x", "whole-bucket/a/y"}


def test_a_tree_is_one_request(server: s3.Server) -> None:
    server.put("many", {f"{i % 50}/{i}": b"" for i in range(150)})
    before = len(server.requests())
    files, folders = at("s3://many").tree()
    assert (len(files), len(folders)) == (150, 50)
    assert len(server.requests()) - before == 1


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    (tmp_path / "elsewhere/deeper/x").write_text("x")
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/real/round").symlink_to(tmp_path / "root")
    (tmp_path / "root/real/below").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deeper/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/real/file").symlink_to(tmp_path / "elsewhere/deeper/x")
    (tmp_path / "root/real/dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "root/real/pipe")
    # a link to nothing is a file that cannot be read
    files, folders = map(sorted, at(tmp_path / "root").tree())
    assert files == ["linked/deeper/x", "real/below/deeper/x", "real/dangling", "real/file"]
    assert folders == ["linked", "linked/deeper", "real", "real/below", "real/below/deeper"]


def test_what_is_missing(place: Location) -> None:
    for read in (place.read_bytes, place.read_json, place.open, (place / "x").read_bytes):
        with pytest.raises(FileNotFoundError):
            read()
    place.unlink()


def test_json(place: Location) -> None:
    file, value = place / "x.json", {"ключ": [1, 2.5, None, "🐈"], "a": {"b": True}}
    file.write_json(value)
    assert file.read_json() == value == json.loads(file.read_bytes())
    for damaged in (b"", b'{"a": 1', b"\xff", b"[" * 100_000):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.json' is damaged"):
            file.read_json()


def test_parquet_is_read_by_ranges(server: s3.Server) -> None:
    content = random.Random(0).randbytes(8 << 20)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"label": [1, 2, 3], "image": [content, b"", b""]}), sink)
    server.put("ranges", {"x.parquet": sink.getvalue().to_pybytes()})
    before = len(server.requests())
    with at("s3://ranges/x.parquet").open() as file:
        assert pq.read_table(file, columns=["label"])["label"].to_pylist() == [1, 2, 3]
    ranges = [line.split("bytes=")[1].split("-") for line in server.requests()[before:] if line.startswith("GET")]
    assert ranges
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < 200_000


def test_every_client_has_the_server_of_its_environment(server: s3.Server, tmp_path: Path) -> None:
    server.put("twice", {"x": b"one"})
    with s3.serving(tmp_path) as other:
        other.put("twice", {"x": b"two"})
        assert at("s3://twice/x").read_bytes() == b"two"
    assert at("s3://twice/x").read_bytes() == b"one"
    host = server.url.removeprefix("http://")
    with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_ENDPOINT_URL_S3=f"http://{host}/"):
        assert at("s3://twice/x").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("text", "scheme", "key"),
    [
        ("s3://bucket/a b/#%20?", "s3", "bucket/a b/#%20?"),
        ("s3://bucket/folder/", "s3", "bucket/folder"),
        ("S3://bucket", "s3", "bucket"),
        ("gs://bucket/x", "gs", "bucket/x"),
        ("file:///tmp/a%20b", "", "/tmp/a b"),
        ("/tmp/a://b", "", "/tmp/a:/b"),
        ("/", "", "/"),
    ],
)
def test_places(text: str, scheme: str, key: str) -> None:
    """A store is not asked before it is needed."""
    assert at(text) == Location(scheme, key) == at(at(text))


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert at("x/y").local == tmp_path / "x" / "y" == at(Path("x/y")).local
    assert str(at("x") / "y") == f"{tmp_path}/x/y"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert at("~/runs").local == tmp_path / "home" / "runs" == at(Path("~/runs")).local
    assert at("~").local == tmp_path / "home"
    assert at("~nobody-of-this-name/x").local == tmp_path / "~nobody-of-this-name" / "x"
    assert at("runs/~").local == tmp_path / "runs" / "~"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://host/x", r"begins with http://; known are paths, s3://, gs://"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("file://host/x", "names a file of another machine"),
    ],
)
def test_places_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        at(text)
