"""CIFAR and MNIST in the files in which they are published, against torchvision's own readers of them."""

import contextlib
import gzip
import os
import pickle
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packed_files as files
import pyarrow as pa
import pytest
import s3
import torchvision

from dmat_ray.config import DataConfig
from dmat_ray.data import packed, pickled
from dmat_ray.data.reading import read, read_pixels, versions_of_images
from dmat_ray.data.sources import Listing, list_examples
from dmat_ray.errors import StorageError, UserError

FINE = [f"fine {k:02d}" for k in range(100)]
COARSE = [f"coarse {k:02d}" for k in range(20)]
TRAIN10, TEST10 = files.arrays(200, 10), files.arrays(40, 10, seed=1)
TRAIN100, TEST100 = files.arrays(300, 100), files.arrays(200, 100, seed=1)
TRAIN_DIGITS, TEST_DIGITS = files.arrays(60, 10, (28, 28)), files.arrays(30, 10, (28, 28), seed=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


def listed(source: object, **settings: Any) -> tuple[Listing, DataConfig]:
    config = DataConfig.model_validate({"source": str(source), "resolution": 32, "channels": 3, **settings})
    return list_examples(config), config


def refused(source: object, message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, **settings)
    assert "\n" not in str(told.value)


def pictures(rows: pa.Table, config: DataConfig) -> np.ndarray:
    """(N, H, W, C)."""
    found = read_pixels(rows, config)
    assert not [f for f in found if isinstance(f, str)]
    return np.stack(found).transpose(0, 2, 3, 1)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """The binary version."""
    return files.cifar10_binary(tmp_path / "cifar-10-batches-bin", TRAIN10, TEST10)


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_what_torchvision_reads(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision knows the Python version only; the binary one holds the same images."""
    files.cifar10_python(tmp_path / "cifar-10-batches-py", TRAIN10, TEST10)
    source = tmp_path / "cifar-10-batches-py"
    if version == "bin":
        source = files.cifar10_binary(tmp_path / "binary", TRAIN10, TEST10)
    listing, config = listed(source)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        theirs = torchvision.datasets.CIFAR10(str(tmp_path), train=split == "train", download=False)
        rows = listing.rows(split)
        np.testing.assert_array_equal(pictures(rows, config), theirs.data)
        assert rows["label"].to_pylist() == theirs.targets
        assert rows["id"].to_pylist() == [f"{split}-{i:05d}" for i in range(len(theirs))]
        assert list(listing.class_names) == theirs.classes == files.CIFAR10_NAMES


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar100_is_what_torchvision_reads(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.cifar100_python(tmp_path / "cifar-100-python", TRAIN100, TEST100, FINE, COARSE)
    source = tmp_path / "cifar-100-python"
    if version == "bin":
        source = files.cifar100_binary(tmp_path / "binary", TRAIN100, TEST100, FINE, COARSE)
    listing, config = listed(source)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for split in ("train", "test"):
        theirs = torchvision.datasets.CIFAR100(str(tmp_path), train=split == "train", download=False)
        rows = listing.rows(split)
        np.testing.assert_array_equal(pictures(rows, config), theirs.data)
        assert rows["label"].to_pylist() == theirs.targets
        assert list(listing.class_names) == theirs.classes == FINE
    coarse, _ = listed(source, label_column="coarse_label")
    assert list(coarse.class_names) == COARSE
    assert coarse.table["label"].to_pylist() == [label // 5 for label in listing.table["label"].to_pylist()]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_is_what_torchvision_reads(tmp_path: Path, name: str, compressed: bool) -> None:
    raw = files.idx(tmp_path / name / "raw", TRAIN_DIGITS, TEST_DIGITS)
    source = files.idx(tmp_path / "gz", TRAIN_DIGITS, TEST_DIGITS, compressed=True) if compressed else raw
    listing, config = listed(source, resolution=28, channels=1)
    for split in ("train", "test"):
        theirs = getattr(torchvision.datasets, name)(str(tmp_path), train=split == "train", download=False)
        rows = listing.rows(split)
        np.testing.assert_array_equal(pictures(rows, config)[..., 0], theirs.data.numpy())
        assert rows["label"].to_pylist() == theirs.targets.tolist()
        assert rows["id"].to_pylist() == [f"{split}-{i:05d}" for i in range(len(theirs))]
    assert listing.class_names == tuple("0123456789")


def test_labels_that_begin_at_1_or_have_gaps_are_the_classes_that_occur(tmp_path: Path) -> None:
    """As the letters of EMNIST do, which are 1 to 26."""
    shown = np.array([1, 2, 5])
    sets = [(x, shown[y % 3]) for x, y in (TRAIN_DIGITS, TEST_DIGITS)]
    listing, _ = listed(files.idx(tmp_path / "MNIST" / "raw", *sets), resolution=28, channels=1)
    assert listing.class_names == ("1", "2", "5")
    for split in ("train", "test"):
        theirs = torchvision.datasets.MNIST(str(tmp_path), train=split == "train", download=False)
        assert shown[listing.rows(split)["label"].to_numpy()].tolist() == theirs.targets.tolist()
    two, _ = listed(tmp_path / "MNIST" / "raw", resolution=28, channels=1, classes={"five": [5], "few": [1, 2]})
    assert Counter(two.rows("train")["label"].to_pylist()) == {0: 18, 1: 42}
    files.idx(tmp_path / "none" / "raw", *((x[:0], y[:0]) for x, y in sets))
    refused(tmp_path / "none", r"is MNIST's format \(idx\) without images", resolution=28, channels=1)


def test_the_folder_above_and_other_names_of_the_files_will_do(tmp_path: Path) -> None:
    # whose name must not be taken for a part of theirs
    files.idx(tmp_path / "images" / "raw", TRAIN_DIGITS, TEST_DIGITS)
    files.idx(tmp_path / "images" / "raw", TRAIN_DIGITS, TEST_DIGITS, compressed=True)
    above, config = listed(tmp_path, resolution=28, channels=1)
    assert {os.fsdecode(f) for f in above.table["file"].to_pylist()} == {
        f"images/raw/{part}-images-idx3-ubyte" for part in ("train", "t10k")
    }
    expected = pictures(above.table, config)
    for path in list((tmp_path / "images" / "raw").iterdir()):
        if path.suffix == ".gz":
            path.unlink()
        else:
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    other, config = listed(tmp_path / "images" / "raw", resolution=28, channels=1)
    assert other.table.select(["id", "split", "label", "row"]).equals(above.table.select(["id", "split", "label", "row"]))
    np.testing.assert_array_equal(pictures(other.table, config), expected)


def test_one_of_several_data_sets_must_be_chosen(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        files.idx(tmp_path / name / "raw", TRAIN_DIGITS, TEST_DIGITS)
    refused(tmp_path, r"several data sets: 'FashionMNIST/raw' \(MNIST's format \(idx\)\), 'MNIST/raw' .*; give the folder of one")


def test_the_official_test_set_is_the_test_split_unless_told_otherwise(cifar10: Path) -> None:
    listing, _ = listed(cifar10)
    assert [id.split("-")[0] for id in listing.table["id"].to_pylist()] == listing.table["split"].to_pylist()
    assert Counter(listing.table["split"].to_pylist()) == {"train": 200, "test": 40}
    mixed, _ = listed(cifar10, official_split=False, test_share=0.25)
    assert Counter(mixed.table["split"].to_pylist()) == {"train": 150, "test": 50}
    assert set(mixed.rows("test")["label"].to_pylist()) == set(range(10))
    assert mixed.ignored == "the test set of CIFAR-10, binary version (data.official_split)"
    assert all(id.startswith("train-") for id in mixed.table["id"].to_pylist())
    limits, config = listed(cifar10, train_limit=30, test_limit=20)
    assert Counter(limits.rows("train")["label"].to_pylist()) == dict.fromkeys(range(10), 3)
    assert Counter(limits.rows("test")["label"].to_pylist()) == dict.fromkeys(range(10), 2)
    whole = listing.table.to_pylist()
    assert all(row in whole for row in limits.table.to_pylist())
    assert limits.found == 240
    places = [listing.table["id"].to_pylist().index(id) for id in limits.table["id"].to_pylist()]
    expected = np.concatenate([TRAIN10[0], TEST10[0]])[places]
    np.testing.assert_array_equal(pictures(limits.table, config), expected.transpose(0, 2, 3, 1))


def test_any_part_is_read_in_any_order_and_no_more_than_it(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, config = listed(cifar10)
    order = np.random.default_rng(0).integers(0, 240, 50)
    expected = np.concatenate([TRAIN10[0], TEST10[0]])[order]
    np.testing.assert_array_equal(pictures(listing.table.take(pa.array(order)), config), expected.transpose(0, 2, 3, 1))
    assert read(listing.table.slice(0, 0), config) == []
    assert len(set(versions_of_images(listing.table, config))) == 240


@pytest.mark.parametrize("compressed", [None, False, True])
def test_a_file_that_is_written_anew_in_another_order_ends_the_job(tmp_path: Path, compressed: bool | None) -> None:
    """Its images are known by their places in it."""
    source = tmp_path / "set"
    first, *_ = write(source, compressed, TRAIN10, TRAIN_DIGITS)
    listing, config = listed(source)
    before = pictures(listing.table, config)
    write(source, compressed, *((images[::-1], labels[::-1]) for images, labels in (TRAIN10, TRAIN_DIGITS)))
    with pytest.raises(UserError, match=rf"/{first.name}' has changed since it was listed, or differs between machines; run "):
        read(listing.table, config)
    write(source, compressed, TRAIN10, TRAIN_DIGITS)
    os.utime(first, (1, 1))
    np.testing.assert_array_equal(pictures(listing.table, config), before)


def write(source: Path, compressed: bool | None, train: Any, digits: Any) -> list[Path]:
    """CIFAR-10 or, compressed or not, MNIST's files of these training images; the first file first."""
    if compressed is None:
        files.cifar10_binary(source, train, TEST10)
        return [source / "data_batch_1.bin"]
    files.idx(source, digits, TEST_DIGITS, compressed=compressed)
    return sorted(source.glob("train-images*"))


def test_the_same_in_an_object_store(server: s3.Server, cifar10: Path, tmp_path: Path) -> None:
    files.idx(tmp_path / "digits", TRAIN_DIGITS, TEST_DIGITS, compressed=True)
    for name, source in (("cifar", cifar10), ("digits", tmp_path / "digits")):
        server.put(name, {f"set/{p.name}": p.read_bytes() for p in source.iterdir()})
        here, config = listed(source)
        there, config_there = listed(f"s3://{name}/set")
        assert there.table.drop_columns("file_digest").equals(here.table.drop_columns("file_digest"))
        part = there.table.slice(5, 25)
        before = len(server.requests())
        assert read(part, config_there) == read(here.table.slice(5, 25), config)
        assert len(server.requests()) - before <= 4, "neighbours are read together"
    with (
        s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1"),
        s3.asked_once(),
        pytest.raises(StorageError, match=r"cannot be reached"),
    ):
        read(part, config_there)


def test_folders_of_images_stay_what_they_are(tmp_path: Path) -> None:
    """Whatever else lies in them."""
    from conftest import png

    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(png(np.full((8, 8), i, np.uint8)))
    (tmp_path / "a" / "data_batch_1.bin").write_bytes(b"something else")
    assert listed(tmp_path)[0].class_names == ("a", "b")


def test_missing_and_damaged_files_are_told(cifar10: Path, tmp_path: Path) -> None:
    (cifar10 / "batches.meta.txt").write_text("one\ntwo\n")
    refused(cifar10, r"label 9 occurs in '.*', but 'batches\.meta\.txt' names 2 classes")
    (cifar10 / "batches.meta.txt").unlink()
    assert listed(cifar10)[0].class_names == tuple("0123456789")
    with (cifar10 / "data_batch_2.bin").open("ab") as file:
        file.write(b"x")
    refused(cifar10, r"data_batch_2\.bin' has 122921 bytes, which is no multiple of 3073: it is cut short or of another format")
    (cifar10 / "data_batch_3.bin").unlink()
    (cifar10 / "test_batch.bin").unlink()
    refused(cifar10, r"is CIFAR-10, binary version, but lacks 'data_batch_3\.bin', 'test_batch\.bin'")


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: _shorter(d / "train-images-idx3-ubyte"), r"has 47055 bytes, but claims 60 images of 28x28"),
        (lambda d: _shorter(d / "t10k-labels-idx1-ubyte"), r"has 29 labels and claims 30, for 30 images"),
        (lambda d: (d / "train-labels-idx1-ubyte").unlink(), r"no 'raw/train-labels-idx1-ubyte' \(or \.gz\)"),
        (lambda d: (d / "t10k-images-idx3-ubyte").unlink(), r"lacks 'raw/t10k-images-idx3-ubyte'"),
        (lambda d: (d / "train-images-idx3-ubyte").write_bytes(b"GIF89a"), r"is no idx file of images: it begins with b'GIF8'"),
        (lambda d: shutil.copy(d / "train-images-idx3-ubyte", d / "train-labels-idx1-ubyte"), r"is no idx file of labels"),
    ],
)
def test_idx_files_that_do_not_go_together(tmp_path: Path, damage: Callable[[Path], Any], told: str) -> None:
    damage(files.idx(tmp_path / "raw", TRAIN_DIGITS, TEST_DIGITS))
    refused(tmp_path, told, resolution=28, channels=1)


def test_a_compressed_file_that_is_cut_short_gives_what_it_holds(tmp_path: Path) -> None:
    source = files.idx(tmp_path / "raw", TRAIN_DIGITS, TEST_DIGITS, compressed=True)
    path = source / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20_000])
    listing, config = listed(source, resolution=28, channels=1)
    found = read_pixels(listing.table.slice(0, 60), config)
    good = [f for f in found if not isinstance(f, str)]
    assert 10 < len(good) < 40
    np.testing.assert_array_equal(np.stack(good)[:, 0], TRAIN_DIGITS[0][: len(good)])
    assert all(isinstance(f, str) and f.startswith("cannot be read: ") for f in found[len(good) :])


def test_what_a_compressed_header_claims_is_not_believed(tmp_path: Path) -> None:
    source = files.idx(tmp_path / "raw", TRAIN_DIGITS, TEST_DIGITS, compressed=True)
    path = source / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:8] + struct.pack(">2I", 1 << 15, 1 << 15) + content[16:]))
    listing, config = listed(source, resolution=28, channels=1)
    found = read_pixels(listing.table.slice(0, 2), config)
    assert found == ["cannot be read: the file claims images of 32768x32768, more than data.max_pixels allows"] * 2
    path.write_bytes(gzip.compress(content[:8] + b"\xff" * 8 + content[16:]))
    refused(source, r"train-images-idx3-ubyte\.gz' claims images of 4294967295x4294967295", resolution=28, channels=1)


class Runs:
    """What a hostile pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    source = files.cifar10_python(tmp_path / "py", TRAIN10, TEST10)
    canary = tmp_path / "it ran"
    (source / "data_batch_4").write_bytes(pickle.dumps({"data": Runs(canary), "labels": []}, protocol=2))
    refused(source, r"data_batch_4' asks for posix\.mkdir, which no images need; nothing in it was run")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ([1, 2], "holds no dict"),
        ({"labels": [1]}, "has no 'data' and 'labels', but 'labels'"),
        ({"labels": [1, 2], "data": np.zeros((3, 3072), np.uint8)}, "has 2 labels for 3 images"),
        ({"labels": [1, 2.5], "data": np.zeros((2, 3072), np.uint8)}, "labels that are no numbers"),
        ({"labels": [1, 300], "data": np.zeros((2, 3072), np.uint8)}, "below 256"),
        ({"labels": [1], "data": np.zeros((1, 3072), np.float32)}, "holds an array of f4"),
        ({"labels": [1], "data": np.asfortranarray(np.zeros((2, 3072), np.uint8))}, "row by row"),
        ({"labels": [1], "data": np.zeros(3072, np.uint8)}, r"of shape \(3072,\)"),
        ({"labels": [1], "data": np.zeros((1, 784), np.uint8)}, "has 784 bytes an image, not 3072"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, tree: object, told: str) -> None:
    source = files.cifar10_python(tmp_path / "py", TRAIN10, TEST10)
    (source / "data_batch_1").write_bytes(pickle.dumps(tree))
    refused(source, told)


def test_damaged_pickles_never_end_in_anything_but_an_error(tmp_path: Path) -> None:
    whole = files.python2({"labels": [1, 2], "data": np.zeros((2, 4), np.uint8)})
    assert pickled.read_batch(whole, "labels").labels.tolist() == [1, 2]
    rng, read = np.random.default_rng(0), 0
    for k in range(500):
        damaged = bytearray(whole[: len(whole) if k % 2 else rng.integers(1, len(whole))])
        for place in rng.integers(0, len(damaged), 1 if k % 2 else 2):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(pickled.RefusedError):
            batch = pickled.read_batch(bytes(damaged), "labels")
            assert len(batch.labels) * batch.width <= len(damaged)
            read += 1
    assert 0 < read < 500


def test_the_names_of_files_are_known() -> None:
    assert packed.is_packed("MNIST/raw/t10k-images-idx3-ubyte.gz")
    assert packed.is_packed("train")
    assert not packed.is_packed("train-00000-of-00001.parquet")
    assert not packed.is_packed("")
