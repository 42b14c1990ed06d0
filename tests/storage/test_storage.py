"""Places on this machine and in an S3 store (a real server, read and written by boto3 as well): whole files or none."""

import http.server
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3

from dmat_ray import settings
from dmat_ray.errors import StorageError, UserError
from dmat_ray.models import checkpoint
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
    """An empty folder, which need not exist."""
    if request.param == "local":
        return at(tmp_path / "folder")
    server = request.getfixturevalue("server")
    bucket = f"bucket-{abs(hash(request.node.name))}"
    server.put(bucket, {})
    return at(f"s3://{bucket}/folder")


def program(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs this code, with dmat_ray.storage.at and sys at hand."""
    code = "import os, sys\nfrom dmat_ray.storage import at\n" + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


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


def test_readers_see_the_old_or_the_new(place: Location) -> None:
    """The content says how long it is."""
    contents = [str(k).encode() * ((3 << 20) + 1000 * k) for k in range(10)]
    file = place / "x"
    file.write_bytes(contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        for k in itertools.count(1):
            if stop.is_set():
                return
            file.write_bytes(contents[k % 10])

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen, until = set(), time.monotonic() + 120
    try:
        while time.monotonic() < until:
            content = file.read_bytes()
            assert content == contents[int(content[:1])]
            seen.add(content[:1])
            if len(seen) > 4:
                break
    finally:
        stop.set()
        writer.join()
    assert len(seen) > 1


KILLED = """
for k in range(10**6):
    at(sys.argv[1]).write_bytes(bytes([k % 250 + 1]) * int(sys.argv[2]))
    if k == 0: print("begun", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_that_counts(place: Location) -> None:
    size, rng = 11 << 20, random.Random(0)
    for _ in range(2):
        file = place / "folder" / f"{rng.random()}"
        process = program(KILLED, file, size)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(rng.random() / 4)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        content = file.read_bytes()
        assert len(content) == size
        assert content.count(content[:1]) == size
        assert place.tree()[0] == [f"folder/{file.name}"], "what is left of the last write is hidden"
        assert (place / "folder").files() == [file]
        (place / "folder").sweep()
        if place.local is not None:
            assert list((place.local / "folder").iterdir()) == [file.local]
        assert file.read_bytes() == content
        file.unlink()


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (at(sys.argv[1]).write_bytes, at(sys.argv[1] + "-new").create_bytes):
    try:
        write(bytes(2000))
    except OSError as error:
        print(error.filename)
"""


def test_a_write_that_fails_leaves_the_old(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old")
    told, _ = program(FULL, file).communicate(timeout=60)
    assert told == f"{file}\n{file}-new\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert file.read_bytes() == b"old"


RACE = """
for line in sys.stdin:
    print(at(line.strip()).create_bytes(sys.argv[1].encode() * 1000), flush=True)
"""


@pytest.mark.slow
def test_one_of_many_creates_a_file(tmp_path: Path) -> None:
    code = "import sys\nfrom dmat_ray.storage import at\n" + RACE
    runners = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    try:
        for k in range(100):
            for runner in runners:
                assert runner.stdin is not None
                runner.stdin.write(f"{tmp_path}/{k}\n")
                runner.stdin.flush()
            won = [runner.stdout is not None and runner.stdout.readline() == "True\n" for runner in runners]
            assert sum(won) == 1
            assert (tmp_path / str(k)).read_bytes() == str(won.index(True)).encode() * 1000
    finally:
        for runner in runners:
            runner.communicate(timeout=60)
    assert len(list(tmp_path.iterdir())) == 100


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder of another user's, while this process is nobody; what is opened here may be opened by anyone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "closed").mkdir()
        (root / "closed/x").write_text("x")
        (root / "closed/x").chmod(0)
        (root / "closed").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield root / "closed"
        finally:
            os.seteuid(user)
            (root / "closed").chmod(0o700)


def test_permission_denied(closed_folder: Path) -> None:
    folder, file = at(closed_folder), at(closed_folder) / "x"
    for refused in (file.is_file, file.read_bytes, file.open, folder.files, folder.tree, folder.parent.tree, file.unlink):
        with pytest.raises(PermissionError, match="closed"):
            refused()
    for write in (file.write_bytes, file.create_bytes):
        with pytest.raises(PermissionError, match=r"/x'$"):
            write(b"x")


def test_a_store_that_does_not_know_us(server: s3.Server) -> None:
    server.put("closed", {"x": b"x"})
    folder, file = at("s3://closed"), at("s3://closed/x")
    with s3.environment(AWS_ACCESS_KEY_ID="stranger"), server.asking_for_credentials():
        for read in (file.read_bytes, file.open):
            with pytest.raises(PermissionError, match="s3://closed/x"):
                read()
        for refused, done in ((file.is_file, "looked at"), (folder.files, "listed"), (folder.tree, "listed")):
            with pytest.raises(StorageError, match=f"'s3://closed.*' cannot be {done}: .*AWS_ACCESS_KEY_ID"):
                refused()
        with pytest.raises(StorageError, match=r"'s3://closed/x' cannot be written: the store does not know the key"):
            file.write_bytes(b"y")
    assert file.read_bytes() == b"x"


@pytest.fixture
def refusing() -> Iterator[list[Any]]:
    """A store that answers everything with one of Amazon's documented errors: a status and a code, to be set."""
    answer: list[Any] = [400, ""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            body = f"<Error><Code>{answer[1]}</Code><Message>.</Message><RequestId>A</RequestId></Error>".encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = refuse

        def log_message(self, *words: object) -> None:
            """Nothing to the terminal."""

    store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    with s3.environment(**s3.KEYS, **s3.OTHERS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{store.server_port}"):
        yield answer
    store.shutdown()
    store.server_close()


@pytest.mark.slow
def test_credentials_that_have_expired_and_a_clock_that_is_wrong(refusing: list[Any]) -> None:
    """The codes are those of Amazon's list of error responses; an answer to HEAD has no body that could hold one."""
    file = at("s3://bucket/x")
    refusing[:] = [400, "ExpiredToken"]
    for act in (file.parent.files, lambda: file.write_bytes(b"x")):
        with pytest.raises(StorageError, match="the credentials have expired; renew what AWS_SESSION_TOKEN"):
            act()
    for act in (file.read_bytes, file.is_file):
        with pytest.raises(StorageError, match="as it does when credentials have expired"):
            act()
    refusing[:] = [403, "RequestTimeTooSkewed"]
    with pytest.raises(StorageError, match="the clock of this machine is wrong"):
        file.parent.files()


def test_a_bucket_that_is_not_there(server: s3.Server) -> None:
    absent = at("s3://absent-bucket/x")
    with pytest.raises(StorageError, match="'s3://absent-bucket/x' cannot be written: there is no bucket 'absent-bucket'"):
        absent.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        absent.read_bytes()
    assert (absent.is_file(), absent.files(), absent.parent.is_dir()) == (False, [], False)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_store_that_is_not_there(server: s3.Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with s3.environment(AWS_ENDPOINT_URL=url):
            file = at("s3://bucket/x")
            # neither is what lies there said to be damaged, nor to be missing
            for use, done in (
                (file.read_bytes, "read"),
                (file.parent.tree, "listed"),
                (lambda: checkpoint.newest_of(["s3://bucket/checkpoint_1"], "run.json", print), "looked at"),
            ):
                with pytest.raises(
                    StorageError, match=f"'s3://bucket.*' cannot be {done}: {url} cannot be reached .*connect"
                ) as told:
                    use()
                assert "\n" not in str(told.value)


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
