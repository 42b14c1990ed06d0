"""Parts that are told by the names of files, and what is of one data set by its numbers."""

import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from parted_sources import listed, refused, shards, tree

from dmat_ray.config import DataConfig
from dmat_ray.data import parts
from dmat_ray.data.reading import read


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (("training.parquet", "testing.parquet"), True),
        (("training_set-0.parquet", "test_set-0.parquet"), True),
        (("train.parquet", "eval.parquet"), True),
        (("train.parquet", "evaluation-0.parquet"), True),
        (("test.parquet", "validation.parquet"), False),
        (("cifar10-train.parquet", "cifar10-test.parquet"), True),
        (("imagenet_train_000.parquet", "imagenet_val_00000-of-00002.parquet"), True),
        (("0000.train.parquet", "0000.test.parquet"), True),
        (("partial-train/0000.parquet", "partial-test/0001.parquet"), True),
        (("x/a_test.parquet", "x/a_dev.parquet"), False),
    ],
)
def test_parts_of_any_name_in_parquet_are_not_pooled(tmp_path: Path, names: tuple[str, str], train: bool) -> None:
    shards(tmp_path, *names)
    alone = train and any(parts.part_of(name, exactly=False) for name in names)
    way = "true to take its own test part, or false to split its training" if alone else "true .* false to take and split all of"
    if not train:
        way = "false to take all of them, or one of them as data.source$"
    refused(tmp_path, f"such as '{names[0]}' and '{names[1]}'; give --data.official_split {way}")
    own = listed(tmp_path, official_split=False)
    assert {id.split("#")[0] for id in own.table["id"].to_pylist()} == ({names[0]} if alone else {*names})
    assert own.ignored == ("1 Parquet files of other parts, the first: 'X' (data.official_split)".replace("X", names[1]) * alone)
    if train:
        official = listed(tmp_path, official_split=True)
        assert {id.split("#")[0] for id in official.rows("test")["id"].to_pylist()} == {names[1]}
    else:
        refused(tmp_path, r"no files of .* are named train\.\.\.", official_split=True)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("other", ["test", "validation"])
def test_parts_in_parquet_are_not_pooled_unasked(tmp_path: Path, other: str, labelled: bool) -> None:
    names = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", f"data/{other}-00000-of-00001.parquet")
    shards(tmp_path, *names)
    told = f"has Parquet files of parts of a data set, such as '{names[0]}' and '{names[2]}'; give --data.official_split true to"
    refused(tmp_path, told, labelled=labelled)
    settings = {"source": str(tmp_path), "resolution": 8}
    for official, (train, test) in ((True, (names[:2], names[2:])), (False, (names[:2], names[:2]))):
        listing = listed(tmp_path, labelled=labelled, official_split=official)
        found = {split: set(read(listing.rows(split), DataConfig(**settings))) for split in ("train", "test")}
        held = [{image for n in ns for image in pq.read_table(tmp_path / n)["image"].to_pylist()} for ns in (train, test)]
        assert found["train"] | found["test"] == held[0] | held[1]
        assert found["test"] <= held[1]
        assert not official or found["test"] == held[1]


@pytest.mark.parametrize(
    "names",
    [
        "train-0.parquet train-1.parquet 2.parquet",
        "a-train.parquet b-test.parquet",
        "x_train/0.parquet y_val/1.parquet",
        "a-train.parquet a-test.parquet b-train.parquet b-test.parquet",
    ],
)
def test_files_of_no_two_parts_are_one_source(tmp_path: Path, names: str) -> None:
    shards(tmp_path, *names.split())
    assert listed(tmp_path).found == 4 * len(names.split())


def test_parts_without_labels(tmp_path: Path) -> None:
    """For a generator without classes: no label is asked for to tell whether the test part's are kept secret."""
    shards(tmp_path, "train.parquet", "test.parquet", "validation.parquet", column="number")
    refused(tmp_path, "has Parquet files of parts", labelled=False)
    assert listed(tmp_path, labelled=False, official_split=False).found == 4
    official = listed(tmp_path, labelled=False, official_split=True)
    assert [id.split(".")[0] for id in official.rows("test")["id"].to_pylist()] == ["test"] * 4


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("train-00000-of-00294.parquet", "train"),
        ("data/validation-00000-of-00014.parquet", "validation"),
        ("TEST_x.parquet", "test"),
        ("val.parquet", "validation"),
        ("training.parquet", "train"),
        ("Testing-0.parquet", "test"),
        ("testset.parquet", "test"),
        ("eval.parquet", "validation"),
        ("evaluated.parquet", ""),
        ("settings.parquet", ""),
        ("0000.parquet", ""),
        ("trained-0.parquet", ""),
        # the file's own name comes first
        ("train_test_split/test-0.parquet", "test"),
        ("train/test-0.parquet", "test"),
        ("dev-kit/train-0.parquet", "train"),
        # then the folders', the nearest first, which must be called exactly so
        ("plain_text/train/0000.parquet", "train"),
        ("train/test/0000.parquet", "test"),
        ("Val/deeper/0000.parquet", "validation"),
        ("test_set/0000.parquet", "test"),
        ("train_test_split/0000.parquet", ""),
        ("dev-kit/0000.parquet", ""),
        ("test.old/0000.parquet", ""),
        # or as Spark calls the folder that it writes for a file
        ("test.parquet/part-00000-c0ffee.snappy.parquet", "test"),
    ],
)
def test_a_part_is_told_by_the_name_of_the_file_then_by_those_of_folders(path: str, part: str) -> None:
    assert parts.part_of(path, exactly=False) == part


def test_numbers_before_the_word_are_no_other_data_set() -> None:
    found = parts.by_part([f"data/{k:04}.{word}.parquet" for word in ("train", "test") for k in range(2)])
    assert found is not None
    assert (len(found.train), len(found.test)) == (2, 2)


def test_many_digits_in_a_name_take_no_time() -> None:
    names = [f"x-{word}-{'1' * 60}{end}" for word in ("train", "test") for end in ("-abc.parquet", ".parquet")]
    began = time.monotonic()
    found = parts.by_part(names)
    assert time.monotonic() - began < 1
    assert found is not None
    assert (found.train, found.test) == ([names[1]], [names[3]])


def test_a_folder_whose_name_begins_like_a_part_is_none(tmp_path: Path) -> None:
    shards(tmp_path, "train_test_split/train-0.parquet", "train_test_split/test-0.parquet", "train_test_split/more.parquet")
    official = listed(tmp_path, official_split=True)
    assert {id.split("#")[0] for id in official.rows("test")["id"].to_pylist()} == {"train_test_split/test-0.parquet"}
    assert official.ignored == (
        "1 Parquet files of other parts, the first: 'train_test_split/more.parquet' (data.official_split)"
    )


def test_what_is_left_aside_is_named_in_characters_that_print(tmp_path: Path) -> None:
    odd = os.fsdecode(b"vid\xe9os")
    tree(tmp_path / "folders", "train/a", "train/b", "test/a", "test/b", odd)
    shards(tmp_path / "files", "train-0.parquet", "test-0.parquet", "odd.parquet")
    (tmp_path / "files" / "odd.parquet").rename(tmp_path / "files" / f"{odd}.parquet")
    for source in ("folders", "files"):
        ignored = listed(tmp_path / source, official_split=True).ignored
        assert "'vid\\xe9os" in ignored
        ignored.encode()


@pytest.mark.parametrize("shape", ["part-{k}-{word}", "{k:04}.{word}", "all/x_{k}_{word}", "set {k} {word}"])
def test_numbered_files_are_of_one_data_set_however_many_a_part_has(shape: str) -> None:
    names = [shape.format(word=word, k=k) + ".parquet" for word, count in (("train", 3), ("test", 1)) for k in range(count)]
    found = parts.by_part(names)
    assert found is not None
    assert (found.train, found.test, found.rest) == (names[:3], names[3:], [])


def test_a_number_in_a_word_tells_data_sets_apart() -> None:
    assert parts.by_part([f"cifar{k}_{word}.parquet" for k in (10, 100) for word in ("train", "test")]) is None
