"""The images of a generator's training: decoded once, and again when they or how they are decoded change."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dmat_ray import cli
from dmat_ray.config import Config
from dmat_ray.data.sources import list_examples, read_pixels
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_images


def photo_folder(root: Path, count: int = 12, classes: int = 2) -> Path:
    """Small pictures in `classes` sub-folders, or in none."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / (f"class{i % classes}" if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 10), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root


def photo_settings(source: Path, output: Path, *options: str) -> Config:
    shape = ("--data.source", str(source), "--data.resolution", "8", "--gan.architecture.resolution", "8")
    return cli.parse("test", ["--output", str(output), *shape, *options])[0]


def test_decoded_images_are_those_of_the_training_split(tmp_path: Path) -> None:
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    cache = gan_images.prepare_images(config, tmp_path / "train")
    images, labels = cache.open()
    expected = list_examples(config.data).rows("train")
    assert labels.tolist() == expected["label"].to_pylist()
    np.testing.assert_array_equal(images.numpy(), read_pixels(expected, config.data))
    written = {p.name: p.stat().st_mtime_ns for p in cache.folder.iterdir()}
    assert gan_images.prepare_images(config, tmp_path / "train") == cache
    assert {p.name: p.stat().st_mtime_ns for p in cache.folder.iterdir()} == written


def test_decoded_images_follow_their_files(tmp_path: Path) -> None:
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    before = gan_images.prepare_images(config, tmp_path / "train")
    name = list_examples(config.data).rows("train")["id"][0].as_py()
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "photos" / name)
    after = gan_images.prepare_images(config, tmp_path / "train")
    assert after.digest != before.digest
    assert not torch.equal(after.open()[0], before.open()[0])
    for name in ("images.npy", "labels.npy", "rejected.json"):
        (after.folder / name).unlink()
        again = gan_images.prepare_images(config, tmp_path / "train")
        assert torch.equal(again.open()[0], gan_images.prepare_images(config, tmp_path / "other").open()[0])
    assert not list((tmp_path / "train").glob(".*"))


def test_decoded_images_follow_the_column_and_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    encoded = {}
    for name in ("image", "other"):
        files = []
        for _ in range(24):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer := io.BytesIO(), "png")
            files.append({"bytes": buffer.getvalue(), "path": None})
        encoded[name] = files
    (tmp_path / "photos").mkdir()
    pq.write_table(pa.table({**encoded, "label": [i % 2 for i in range(24)]}), tmp_path / "photos" / "all.parquet")
    one, other = (
        gan_images.prepare_images(photo_settings(tmp_path / "photos", tmp_path, "--data.image_column", name), tmp_path / "train")
        for name in encoded
    )
    assert one.digest != other.digest
    assert not torch.equal(one.open()[0], other.open()[0])
    few = photo_settings(tmp_path / "photos", tmp_path, "--data.max_pixels", "1000")
    assert gan_images.prepare_images(few, tmp_path / "train").digest != one.digest


def test_unreadable_images_are_left_out_and_told(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos", count=20)
    config = photo_settings(photos, tmp_path, "--data.max_rejected", "0.2")
    victim = list_examples(config.data).rows("train")["id"][0].as_py()
    whole = gan_images.prepare_images(config, tmp_path / "whole").open()
    (photos / victim).write_bytes(b"no picture")
    cache = gan_images.prepare_images(config, tmp_path / "train")
    images, labels = cache.open()
    assert list(cache.rejected) == [victim]
    assert torch.equal(images, whole[0][1:])
    assert torch.equal(labels, whole[1][1:])
    strict = photo_settings(photos, tmp_path)
    with pytest.raises(UserError, match=rf"1 of 16 images were rejected; the first: '{victim}' cannot be read"):
        gan_images.prepare_images(strict, tmp_path / "strict")
    assert not list((tmp_path / "strict").iterdir())


def test_a_folder_of_nothing_but_images(tmp_path: Path) -> None:
    """A generator without classes needs no sub-folders; one with classes, and a classifier, do."""
    flat = photo_folder(tmp_path / "photos", classes=0)
    none = ("--gan.quality.network", "none", "--cluster.train_workers", "1")
    images, labels = gan_images.check(photo_settings(flat, tmp_path, *none), tmp_path / "train").open()
    assert len(images) == 10
    assert set(labels.tolist()) == {0}
    with pytest.raises(UserError, match="holds no sub-folders"):
        gan_images.check(photo_settings(flat, tmp_path, *none, "--gan.architecture.num_classes", "2"), tmp_path / "train")
    with pytest.raises(UserError, match="choose 'inception' or 'none'"):
        gan_images.check(photo_settings(flat, tmp_path, "--cluster.train_workers", "1"), tmp_path / "train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.resolution", "16"], r"images are \(1, 16, 16\) \(C, H, W\), but gan.architecture makes \(1, 8, 8\)"),
        (["--gan.architecture.num_classes", "3"], r"num_classes is 3, but the images have 2 class\(es\)"),
        (
            ["--gan.quality.network", "inception", "--gan.quality.weights", "/none.pth"],
            "gan.quality.weights '/none.pth' is no file",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_an_image_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path, "--cluster.train_workers", "1", *options)
    monkeypatch.setattr(gan_images, "read_pixels", None)
    with pytest.raises(UserError, match=words):
        gan_images.check(config, tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_one_class_trains_no_classifier_and_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gan_images, "read_pixels", None)
    with pytest.raises(UserError, match="choose 'inception' or 'none'"):
        gan_images.check(
            photo_settings(photo_folder(tmp_path / "photos", classes=0), tmp_path, "--cluster.train_workers", "1"), tmp_path
        )
    assert not list(tmp_path.glob("*images-*"))
