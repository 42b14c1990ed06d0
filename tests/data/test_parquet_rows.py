"""Row groups that are read by many calls: once, if the calls ask in order, and rightly whatever they do."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3

from dmat_ray.config import DataConfig
from dmat_ray.data import parquet_rows, parquet_source
from dmat_ray.data.reading import read
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError

CALL = 64
"""Images that one call asks for."""


def contents(count: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randrange(20, 400)) for _ in range(count)]


def write(path: Path, images: list[bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(len(images))]}), path, **options)
    return path


def rows_of(source: Path) -> tuple[pa.Table, DataConfig]:
    config = DataConfig(source=str(source))
    return list_examples(config).table, config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of images that pyarrow decodes from here on, batch after batch."""
    counts: list[int] = []
    batches = pq.ParquetFile.iter_batches

    def counted(*args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in batches(*args, **options):
            counts.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    return counts


def in_calls(table: pa.Table, config: DataConfig) -> list[bytes | str]:
    return [content for start in range(0, len(table), CALL) for content in read(table.slice(start, CALL), config)]


def held(file: Path) -> int:
    """How often this process has a file open."""
    return sum(os.path.realpath(link) == str(file) for link in Path("/proc/self/fd").iterdir())


def test_calls_in_order_decode_a_row_group_once(tmp_path: Path, decoded: list[int]) -> None:
    images = contents(3200)
    table, config = rows_of(write(tmp_path / "x.parquet", images))
    assert in_calls(table, config) == images
    assert sum(decoded) == 3200
    decoded.clear()
    every_third = table.take(pa.array(range(0, 3200, 3)))  # as the training split leaves some out
    assert in_calls(every_third, config) == images[::3]
    assert sum(decoded) == 3200


def test_calls_in_order_over_groups_and_files(tmp_path: Path, decoded: list[int]) -> None:
    images = contents(3000)
    for k in range(3):
        write(tmp_path / f"{k}.parquet", images[1000 * k : 1000 * (k + 1)], row_group_size=500)
    table, config = rows_of(tmp_path)
    assert in_calls(table, config) == images
    assert sum(decoded) == 3000


def test_threads_have_readers_of_their_own(tmp_path: Path, decoded: list[int]) -> None:
    """Each takes the next part, as where the generator's images are decoded; also of files that take turns."""
    images = contents(3200)
    table, config = rows_of(write(tmp_path / "a" / "x.parquet", images))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda start: read(table.slice(start, CALL), config), range(0, 3200, CALL))
        assert [content for part in found for content in part] == images
    assert sum(decoded) <= 4 * 3200, "a pass a thread"
    assert held(tmp_path / "a" / "x.parquet") == 0, "a reader ends with its thread"
    others = contents(3200, seed=1)
    other, other_config = rows_of(write(tmp_path / "b" / "x.parquet", others))
    tasks = [(t, c, start) for start in range(0, 3200, 400) for t, c in ((table, config), (other, other_config))]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda task: read(task[0].slice(task[2], 400), task[1]), tasks))
    assert [content for part in parts[::2] for content in part] == images
    assert [content for part in parts[1::2] for content in part] == others


def test_any_order_gives_the_same(tmp_path: Path) -> None:
    images = contents(1000)
    table, config = rows_of(write(tmp_path / "x.parquet", images, row_group_size=400))
    rng = np.random.default_rng(0)
    for _ in range(60):
        wanted = rng.integers(0, 1000, rng.integers(1, 9))
        assert read(table.take(pa.array(wanted)), config) == [images[i] for i in wanted]


def write_in_order(path: Path, order: list[int]) -> Path:
    """A thousand images, each with its number as id and its parity as label."""
    images = [b"%06d" % i for i in order]
    table = pa.table({"image": images, "label": [i % 2 for i in order], "key": [f"{i:06d}" for i in order]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    return path


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("swapped", [(0, 1), (499, 500), (0, 999)])
def test_a_file_that_is_written_anew_in_another_order_ends_the_job(
    tmp_path: Path, swapped: tuple[int, int], opened: bool
) -> None:
    """Its rows are known by their numbers, so that they would be other images than their ids and labels say."""
    order = list(range(1000))
    file = write_in_order(tmp_path / "x.parquet", order)
    config = DataConfig(source=str(file), id_column="key")
    table = list_examples(config).table
    if opened:
        assert read(table.slice(0, CALL), config) == [b"%06d" % i for i in range(CALL)]
    size = file.stat().st_size
    a, b = swapped
    order[a], order[b] = b, a
    os.replace(write_in_order(tmp_path / "new", order), file)
    assert file.stat().st_size == size
    with pytest.raises(
        UserError, match=r"^'.*/x\.parquet' has changed since it was listed, or differs between machines; run again"
    ):
        read(table.slice(CALL, CALL), config)
    again = list_examples(config).table
    assert read(again, config) == [b"%06d" % i for i in order]
    file.unlink()
    assert read(again.slice(0, 1), config) == ["cannot be read: No such file or directory"]


def test_a_copy_of_another_time_is_the_same_file(tmp_path: Path) -> None:
    images = contents(300)
    file = write(tmp_path / "x.parquet", images)
    table, config = rows_of(file)
    assert read(table.slice(0, CALL), config) == images[:CALL]
    shutil.copyfile(file, tmp_path / "copy")
    os.utime(tmp_path / "copy", (1, 1))
    os.replace(tmp_path / "copy", file)
    assert read(table.slice(CALL), config) == images[CALL:]


def test_a_file_that_is_touched_while_it_is_read_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = contents(300)
    file = write(tmp_path / "x.parquet", images)
    table, config = rows_of(file)
    reading, times = parquet_rows.Reader.read, iter(range(1, 9))

    def touched(self: parquet_rows.Reader, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        os.utime(file, (1, next(times)))
        return reading(self, wanted)

    monkeypatch.setattr(parquet_rows.Reader, "read", touched)
    assert in_calls(table, config) == images


def test_a_file_that_is_written_to_while_it_is_read_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.parquet", contents(300))
    table, config = rows_of(file)

    def read_slowly(self: parquet_rows.Reader, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        write(file, contents(300, seed=1))
        yield from ((int(row), b"") for row in wanted)

    monkeypatch.setattr(parquet_rows.Reader, "read", read_slowly)
    with pytest.raises(UserError, match="has changed since it was listed"):
        read(table, config)


def test_damage_costs_its_group_and_no_later_call(tmp_path: Path) -> None:
    images = contents(600)
    options = {"row_group_size": 200, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    file = write(tmp_path / "x.parquet", images, **options)
    whole = bytearray(file.read_bytes())
    whole[whole.index(images[250])] ^= 1
    file.write_bytes(bytes(whole))
    table, config = rows_of(file)
    found = in_calls(table, config)
    assert found[:200] + found[400:] == images[:200] + images[400:]
    assert all(str(reason).startswith("cannot be read: ") for reason in found[200:400])


FORK = """
import os, sys
from dmat_ray.config import DataConfig
from dmat_ray.data import parquet_rows
from dmat_ray.data.reading import read
from dmat_ray.data.sources import list_examples
parquet_rows.BUFFER = 1 << 12  # many reads, to come between each other
config = DataConfig(source=sys.argv[1])
table = list_examples(config).table
read(table.slice(0, 64), config)
child = os.fork()
found = [content for start in range(64, table.num_rows, 64) for content in read(table.slice(start, 64), config)]
good = not any(isinstance(content, str) for content in found)
if child == 0:
    os._exit(not good)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child"
assert good, "the parent"
"""


@pytest.mark.slow
def test_a_forked_process_opens_files_of_its_own(tmp_path: Path) -> None:
    """Parent and child would move each other's place in a file that both hold open, and find damage."""
    images = [random.Random(i).randbytes(30_000) for i in range(1600)]
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False, "write_batch_size": 1}
    file = write(tmp_path / "x.parquet", images, **options)
    done = subprocess.run([sys.executable, "-c", FORK, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def parquet(images: list[bytes]) -> bytes:
    """In one row group of small pages."""
    sink = pa.BufferOutputStream()
    table = pa.table({"image": images, "label": [i % 2 for i in range(len(images))]})
    pq.write_table(table, sink, use_dictionary=False, write_batch_size=8, data_page_size=1 << 14)
    return sink.getvalue().to_pybytes()


def test_calls_in_order_fetch_a_row_group_once(server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "BUFFER", 1 << 16)
    images = [random.Random(i).randbytes(2000) for i in range(1000)]
    content = parquet(images)
    server.put("one", {"x.parquet": content})
    config = DataConfig(source="s3://one")
    table = list_examples(config).table

    def fetched(start: int, rows: pa.Table) -> int:
        """Bytes asked for by calls for these rows, which begin with this one."""
        before = len(server.requests())
        assert in_calls(rows, config) == images[start : start + len(rows)]
        ranges = [line.split("bytes=")[1].split("-") for line in server.requests()[before:] if "bytes=" in line]
        return sum(int(last) - int(first) + 1 for first, last in ranges)

    assert fetched(0, table.slice(0, CALL)) < len(content) // 4, "what is behind it is left"
    assert len(content) // 2 < fetched(CALL, table.slice(CALL, 800)) < len(content)
    server.client().put_object(Bucket="one", Key="x.parquet", Body=parquet(images[::-1]))
    with pytest.raises(UserError, match=r"'s3://one/x\.parquet' has changed since it was listed"):
        read(table.slice(900, 9), config)
    assert read(list_examples(config).table.slice(900, 9), config) == images[::-1][900:909]


def test_what_was_read_to_its_end_is_closed(tmp_path: Path) -> None:
    images = contents(200)
    file = write(tmp_path / "x.parquet", images)
    table, config = rows_of(file)
    assert read(table.slice(0, CALL), config) == images[:CALL]
    assert held(file) == 1
    assert in_calls(table.slice(CALL), config) == images[CALL:]
    assert held(file) == 0
    others = write(tmp_path / "y.parquet", images)
    other, other_config = rows_of(others)
    read(table.slice(0, CALL), config)
    read(other.slice(0, CALL), other_config)
    assert (held(file), held(others)) == (0, 1), "of the last file alone"


def test_large_row_groups_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    images = contents(2000)
    file = write(tmp_path / "x.parquet", images)
    size = sum(map(len, images))
    monkeypatch.setattr(parquet_source, "LARGE_GROUP", 2 * size)
    rows_of(file)
    assert not recwarn
    monkeypatch.setattr(parquet_source, "LARGE_GROUP", size // 2)
    with pytest.warns(UserWarning, match=r"'x\.parquet' has 2000 images in one row group .*row_group_size=1000\)"):
        table, config = rows_of(file)
    pq.write_table(pq.read_table(file), file, row_group_size=500)  # what the warning says
    recwarn.clear()
    table, config = rows_of(file)
    assert not recwarn
    assert read(table, config) == images
