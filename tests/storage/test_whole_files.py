"""Files are whole or not there: for readers, after a kill, on a full disk, and of several writers who create one."""

import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
from places import empty_place

from dmat_ray.storage import Location


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return empty_place(request, tmp_path)


def program(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs this code, with dmat_ray.storage.at and sys at hand."""
    code = "import os, sys\nfrom dmat_ray.storage import at\n" + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
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
