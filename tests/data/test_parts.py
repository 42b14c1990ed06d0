"""The training and test parts that a source has of its own: how they are told, and that none is taken for what it is not."""

import io
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmat_ray.config import DataConfig
from dmat_ray.data import parts
from dmat_ray.data.sources import Listing, list_examples, read
from dmat_ray.errors import UserError
from dmat_ray.validated import validate


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level % 256).save(buffer, format="PNG")
    return buffer.getvalue()


def tree(root: Path, *folders: str, each: int = 4) -> Path:
    """A folder with so many images in each of these."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(each):
            (root / folder / f"{i}.png").write_bytes(png(i))
    return root


def shards(root: Path, *names: str, labels: tuple[int, ...] = (0, 1, 0, 1), column: str = "label") -> Path:
    """Parquet files of these names, each image of a grey level of its own."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images = [png(10 * k + i) for i in range(len(labels))]
        pq.write_table(pa.table({"image": images, column: labels}), root / name)
    return root


def listed(source: Path, *, labelled: bool = True, **settings: Any) -> Listing:
    config = validate({"data": {"source": str(source), "resolution": 8, **settings}}).data
    return list_examples(config, labelled=labelled)


def refused(source: Path, message: str, *, labelled: bool = True, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, labelled=labelled, **settings)
    assert "\n" not in str(told.value)


def tops(listing: Listing, split: str) -> set[str]:
    return {id.split("/")[0] for id in listing.rows(split)["id"].to_pylist()}


FLAT = {
    "ImageNet, whose validation images lie in one folder": (["train/n01440764", "train/n01443537", "val"], "'train', 'val'"),
    "Kaggle": (["train/cat", "train/dog", "test"], "'test', 'train'"),
    "ImageNet as it is unpacked": (
        ["ILSVRC2012_img_train/n01440764", "ILSVRC2012_img_train/n01443537", "ILSVRC2012_img_val"],
        "'ILSVRC2012_img_train', 'ILSVRC2012_img_val'",
    ),
    "both and more": (["train/cat", "train/dog", "test", "val", "extra"], "'test', 'train', 'val'"),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", FLAT)
def test_a_part_without_classes_is_no_class(tmp_path: Path, name: str, labelled: bool) -> None:
    folders, shown = FLAT[name]
    tree(tmp_path, *folders)
    told = f"has the folders {shown}, which look like parts of a data set, not like classes; give --data.official_split false to "
    refused(tmp_path, told, labelled=labelled)
    own = listed(tmp_path, labelled=labelled, official_split=False)
    assert own.class_names == tuple(folder.split("/")[1] for folder in folders[:2])
    assert tops(own, "train") == tops(own, "test") == {folders[0].split("/")[0]}
    assert own.found == 8
    assert all(f"the folder '{other}' (data.official_split)" in own.ignored for other in folders[2:])
    refused(
        tmp_path, "official_split is true, but .* has no folder 'test' or 'val' with one sub-folder a class", official_split=True
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_parts_with_classes_beside_another_folder(tmp_path: Path, labelled: bool) -> None:
    tree(tmp_path, "train/a", "train/b", "val/a", "val/b", "extra")
    told = "has the folders 'train', 'val', which .* give --data.official_split true to take its own test part, or false to split"
    refused(tmp_path, told, labelled=labelled)
    official = listed(tmp_path, labelled=labelled, official_split=True)
    assert (tops(official, "train"), tops(official, "test"), official.class_names) == ({"train"}, {"val"}, ("a", "b"))
    own = listed(tmp_path, labelled=labelled, official_split=False)
    assert (tops(own, "train"), tops(own, "test"), own.class_names) == ({"train"}, {"train"}, ("a", "b"))
    assert "the folder 'extra' (data.official_split)" in own.ignored


@pytest.mark.parametrize("unlabelled", ["test/unknown", "test/images", "Testing/0"])
def test_a_test_part_without_labels_is_left_for_one_that_has_the_classes(tmp_path: Path, unlabelled: str) -> None:
    tree(tmp_path, "train/a", "train/b", unlabelled)
    part = unlabelled.split("/")[0]
    told = f"is true, but '{part}' of '{tmp_path}' has no sub-folder that is called as one of 'train'"
    refused(tmp_path, told, official_split=True)
    refused(tmp_path, "give --data.official_split false to split 'train' alone")
    tree(tmp_path, "val/a", "val/b")
    refused(tmp_path, "give --data.official_split true to take its own test part, or false")
    ways: tuple[dict[str, Any], ...] = ({"official_split": True}, {"classes": {"x": ["a"], "y": ["b"]}})
    for settings in ways:
        listing = listed(tmp_path, **settings)
        assert (tops(listing, "train"), tops(listing, "test"), listing.found) == ({"train"}, {"val"}, 16)
        assert f"the folder '{part}' (data.official_split)" in listing.ignored


ACCENT = ("caf\u00e9", "cafe\u0301")  # composed, and as macOS writes it


@pytest.mark.parametrize(
    ("test", "classes"),
    [
        (("cat", "dog"), {"cat": [["n01", "cat"]], "dog": [[ACCENT[0], "dog"]]}),
        (("n01", ACCENT[1]), {"a": ["n01"], "b": [ACCENT[0]]}),
        (("other", ACCENT[1]), {"a": ["n01", "other"], "b": [ACCENT[0]]}),
    ],
)
def test_classes_that_are_called_otherwise_in_the_test_part_are_found_there(
    tmp_path: Path, test: tuple[str, str], classes: dict[str, Any]
) -> None:
    tree(tmp_path, "train/n01", f"train/{ACCENT[0]}", *(f"val/{name}" for name in test))
    for official in (None, True):
        listing = listed(tmp_path, classes=classes, official_split=official)
        assert (tops(listing, "train"), tops(listing, "test"), listing.found) == ({"train"}, {"val"}, 16)


def test_accents_of_a_test_part_may_be_written_apart(tmp_path: Path) -> None:
    tree(tmp_path, f"train/{ACCENT[0]}", f"test/{ACCENT[1]}")
    refused(tmp_path, "give --data.official_split true to take its own test part, or false", labelled=False)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "test" / "dog").mkdir()
    for part in ("train", "test"):
        (tmp_path / part / "dog" / "0.png").write_bytes(png(0))
    listing = listed(tmp_path, official_split=True)
    assert (listing.class_names, tops(listing, "test"), listing.found) == ((ACCENT[0], "dog"), {"test"}, 10)


def test_parts_that_hold_images_directly_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path, "Train", "val")
    told = (
        "has the folders 'Train', 'val', which look like parts of a data set and hold no sub-folders; .* such as 'Train/cat', or "
    )
    refused(tmp_path, told)
    told = "which look like parts of a data set, .* give --data.official_split true to take its own test part, or false to split"
    refused(tmp_path, told, labelled=False)
    own = listed(tmp_path, labelled=False, official_split=False)
    assert (own.found, tops(own, "train"), tops(own, "test")) == (4, {"Train"}, {"Train"})
    assert "the folder 'val' (data.official_split)" in own.ignored
    official = listed(tmp_path, labelled=False, official_split=True)
    assert (tops(official, "train"), tops(official, "test")) == ({"Train"}, {"val"})
    assert listed(tmp_path, classes={"railway": ["Train"], "cap": ["val"]}).class_names == ("railway", "cap")


def test_what_is_called_like_a_part_may_be_a_class(tmp_path: Path) -> None:
    """Trains are vehicles; where the name of another folder is a part's, too, a class list says so."""
    tree(tmp_path, "train/steam", "train/diesel", "car")
    assert listed(tmp_path).class_names == ("car", "train")
    tree(tmp_path, "test")
    refused(tmp_path, "name them in data.classes if they are classes")
    named = listed(tmp_path, classes={"railway": ["train"], "exam": ["test"]})
    assert named.class_names == ("railway", "exam")
    assert Counter(named.table["label"].to_pylist()) == {0: 8, 1: 4}


NOT_CLASSES = ", which look like parts of a data set, not like classes; give --data.official_split true to "
NO_TRAINING = ", which look like parts of a data set, not like classes, and none is for training; give "
LAYOUTS = {
    "Training/cat Training/dog Testing/cat Testing/dog": "'Testing', 'Training'" + NOT_CLASSES,
    "train/cat train/dog eval/cat eval/dog": "'eval', 'train'" + NOT_CLASSES,
    "train/cat train/dog Evaluation/cat Evaluation/dog": "'Evaluation', 'train'" + NOT_CLASSES,
    "training_set/cat training_set/dog test_set/cat test_set/dog": "'test_set', 'training_set'" + NOT_CLASSES,
    "trainset/cat trainset/dog val-set/cat val-set/dog": "'trainset', 'val-set'" + NOT_CLASSES,
    "x_img_train/cat x_img_train/dog x_img_val/cat x_img_val/dog": "'x_img_train', 'x_img_val'" + NOT_CLASSES,
    "x.Train/cat x.Train/dog x.Test_set/cat x.Test_set/dog": "'x.Test_set', 'x.Train'" + NOT_CLASSES,
    "x_test x_val": "'x_test', 'x_val'" + NO_TRAINING,
    "train/cat train/dog holdout/cat holdout/dog": (
        "'holdout', 'train', which look like parts of a data set, not like classes; give --data.official_split false to split "
        "'train' alone, or name them in data.classes if they are classes"
    ),
    "test/cat test/dog val/cat val/dog": "'test', 'val'" + NO_TRAINING,
    "test val": "'test', 'val'" + NO_TRAINING,
    "a_train/cat a_train/dog a_val/cat a_val/dog b_train/cat b_train/dog b_test/cat b_test/dog": (
        "'a_train', 'a_val', 'b_test', 'b_train', which hold no images but sub-folders of the same names, as parts of a data set "
        "do; give one of them as data.source, or --data.official_split false if they are classes"
    ),
    "a/cat a/dog b/cat b/dog b/hen": (
        "'a', 'b', which hold no images but sub-folders of the same names, as parts of a data set do; give one of them as "
        "data.source, or --data.official_split false if they are classes"
    ),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_any_name_are_no_classes(tmp_path: Path, layout: str, labelled: bool) -> None:
    folders = layout.split()
    tree(tmp_path, *folders)
    refused(tmp_path, f"has the folders {LAYOUTS[layout]}", labelled=labelled)
    first, other, *more = sorted({folder.split("/")[0] for folder in folders})
    named = listed(tmp_path, labelled=labelled, classes={"one": [first], "two": [other, *more]})
    assert named.found == 4 * len(folders), "the way out of the message"
    if NO_TRAINING in LAYOUTS[layout]:
        way = (
            "one of them as data.source, or name them in data.classes" if labelled else "--data.official_split false to take all"
        )
        for official in (None, False) if labelled else (None,):
            refused(tmp_path, NO_TRAINING + way, labelled=labelled, official_split=official)
        if not labelled:
            every = listed(tmp_path, labelled=False, official_split=False)
            assert (every.found, every.ignored) == (4 * len(folders), "")
            assert tops(every, "train") == tops(every, "test") == {first, other}
        refused(tmp_path, NO_TRAINING, labelled=labelled, official_split=True)
    elif "official_split true" in LAYOUTS[layout]:
        train = next(folder.split("/")[0] for folder in folders if "train" in folder.lower())
        official = listed(tmp_path, labelled=labelled, official_split=True)
        assert (tops(official, "train"), tops(official, "test")) == ({train}, {first, other} - {train})
        assert official.class_names == ("cat", "dog")
    elif "official_split false if" in LAYOUTS[layout]:
        assert listed(tmp_path, labelled=labelled, official_split=False).class_names == (first, other, *more)
    elif "official_split false" in LAYOUTS[layout]:
        own = listed(tmp_path, labelled=labelled, official_split=False)
        assert (tops(own, "train"), own.class_names) == ({"train"}, ("cat", "dog"))


@pytest.mark.parametrize(
    ("layout", "classes"),
    [
        ("cat/images dog/images hen/images", ("cat", "dog", "hen")),  # tiny-imagenet's
        ("cat/red cat/grey dog/white dog/grey", ("cat", "dog")),
        ("cat cat/red cat/grey dog dog/red dog/grey", ("cat", "dog")),
        ("test cat dog", ("cat", "dog", "test")),
        ("test val cat", ("cat", "test", "val")),
        ("testament evaluator", ("evaluator", "testament")),
        ("steam-train crash_test merit.val", ("crash_test", "merit.val", "steam-train")),
        ("x_train x_training y_test", ("x_train", "x_training", "y_test")),
    ],
)
def test_classes_with_folders_inside_are_classes(tmp_path: Path, layout: str, classes: tuple[str, ...]) -> None:
    (tmp_path / "source").mkdir()
    for folder in layout.split():
        (tmp_path / "source" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            (tmp_path / "source" / folder / f"{i}.png").write_bytes(png(i))
    assert listed(tmp_path / "source").class_names == classes


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
