"""The training and test parts that a source has of its own in folders: how they are told from classes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from parted_sources import listed, png, refused, tops, tree

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
