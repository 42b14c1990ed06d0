"""The images of a generator's training: decoded once, and again when they or how they are decoded change."""

import hashlib
import io
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from disk_order import noted
from kills import killed_when_removed
from photo_folders import photo_folder, photo_settings
from PIL import Image

from dmat_ray.config import Config, DataConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_folder, gan_images, trained_on


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


def test_images_that_the_disk_has_no_room_for_are_refused_before_one_is_decoded(tmp_path: Path) -> None:
    config, (soft, hard) = photo_settings(photo_folder(tmp_path / "photos"), tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        with pytest.raises(UserError, match=r"decoded images of the training take .* not so much space"):
            gan_images.prepare_images(config, tmp_path / "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "train").iterdir())


def test_decoded_images_have_their_name_once_the_disk_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine that goes down leaves empty files that pass for whole, and no rerun gets past them."""
    config, events = photo_settings(photo_folder(tmp_path / "photos"), tmp_path), noted(monkeypatch)
    cache = gan_images.prepare_images(config, tmp_path / "train")
    before = events[: events.index(("renamed", cache.folder.name))]
    assert {("synced", name) for name in gan_images.WHOLE} <= set(before)


def test_decoded_images_have_their_space_before_they_are_written(tmp_path: Path) -> None:
    """A file of numpy's begins as a hole, and a write into it kills the process where the disk is full."""
    np.lib.format.open_memmap(tmp_path / "hole.npy", mode="w+", dtype=np.uint8, shape=(500, 64, 64))
    assert not gan_images._blank(tmp_path / "taken.npy", (500, 64, 64)).any()
    taken = {name: (tmp_path / f"{name}.npy").stat() for name in ("hole", "taken")}
    assert taken["hole"].st_size == taken["taken"].st_size
    assert taken["hole"].st_blocks * 512 < taken["hole"].st_size <= taken["taken"].st_blocks * 512


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_decoded_images_that_another_machine_does_not_see_are_told(tmp_path: Path, name: str) -> None:
    cache = gan_images.prepare_images(photo_settings(photo_folder(tmp_path / "photos"), tmp_path), tmp_path / "train")
    (cache.folder / name).unlink()
    with pytest.raises(UserError, match=rf"'{cache.folder}' are not to be seen on .*not shared by all nodes; give a shared one"):
        cache.open()


def test_decoded_images_follow_their_files(tmp_path: Path) -> None:
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    before = gan_images.prepare_images(config, tmp_path / "train")
    name = list_examples(config.data).rows("train")["id"][0].as_py()
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "photos" / name)
    after = gan_images.prepare_images(config, tmp_path / "train")
    assert after.digest != before.digest
    assert not torch.equal(after.open()[0], before.open()[0])
    for name in ("images.npy", "labels.npy", "rejected.json", "images.parquet"):
        (after.folder / name).unlink()
        again = gan_images.prepare_images(config, tmp_path / "train")
        assert torch.equal(again.open()[0], gan_images.prepare_images(config, tmp_path / "other").open()[0])
    assert not list((tmp_path / "train").glob(".*"))


def test_decoded_images_that_nothing_goes_on_with_are_removed(tmp_path: Path) -> None:
    config, storage = photo_settings(photo_folder(tmp_path / "photos"), tmp_path), tmp_path / "train"
    name = list_examples(config.data).rows("train")["id"][0].as_py()
    caches = []
    for time in (1, 2, 3):  # the same pixels each time
        os.utime(tmp_path / "photos" / name, (time, time))
        caches.append(gan_images.prepare_images(config, storage).folder)
    (storage / f"generator-abc-{caches[0].name.removeprefix('images-')[:12]}-2").mkdir()  # which has begun, and not ended
    (storage / ".images-0123456789abcdef.1.partial").mkdir()
    (storage / "dmat-0123456789ab").mkdir()
    gan_images.sweep(storage, caches[2])
    assert set(storage.glob("*images-*")) == {caches[0], caches[2]}
    assert (storage / "dmat-0123456789ab").is_dir(), "a classifier's"
    gan_images.sweep(storage)
    assert list(storage.glob("*images-*")) == [caches[0]]


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
    assert cache.ignored == ""
    assert torch.equal(images, whole[0][1:])
    assert torch.equal(labels, whole[1][1:])
    (photos / "notes.txt").write_text("of the journey")
    again = gan_images.prepare_images(config, tmp_path / "train")
    ignored = "1 file of no extension of images, or beside the class folders, the first: 'notes.txt'"
    assert (again.folder, again.ignored) == (cache.folder, ignored)
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


def trained(config: Config, folder: Path) -> Path:
    """A generator's folder as a training of these settings leaves it, its weights aside."""
    cache = gan_images.prepare_images(config, folder.parent / "train")
    folder.mkdir(parents=True)
    shutil.copyfile(cache.folder / "images.parquet", folder / "images.parquet")
    (folder / "card.json").write_text(json.dumps(gan_images.card_of(config, cache)))
    (folder / "generator.safetensors").write_bytes(b"")
    return folder


def test_a_longer_training_goes_on_from_that_of_the_very_generator(tmp_path: Path) -> None:
    """Not from that of another, of the same settings and images, that was there before; older ones say not whose they are."""
    photos = photo_folder(tmp_path / "photos")
    config, longer = photo_settings(photos, tmp_path), photo_settings(photos, tmp_path, "--gan.kimg", "9000")
    folder, storage = trained(config, tmp_path / "generator"), tmp_path / "train"
    digest = json.loads((folder / "card.json").read_text())["images_sha256"]
    trunk = storage / gan_images.training_name(config, digest) / "trunk" / "gan.json"
    trunk.parent.mkdir(parents=True)
    about = {"config": config.gan.model_dump(mode="json"), "history": [{"kimg": 1}]}
    trunk.write_text(json.dumps(about))
    gan_folder.settle(config, folder, storage)
    assert gan_folder.extends(longer, folder)
    (folder / "generator.safetensors").write_bytes(b"others")
    assert not gan_folder.extends(longer, folder)
    (gan_folder.trunk_of(folder) / "gan.json").write_text(json.dumps(about))
    assert gan_folder.extends(longer, folder)


def test_what_another_generator_had_to_go_on_from_is_removed_where_a_kill_left_it(tmp_path: Path) -> None:
    """It says whose it is; of one that does not, of an earlier version, nobody knows that it is another's."""
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    folder, storage = trained(config, tmp_path / "generator"), tmp_path / "train"
    kept = gan_folder.trunk_of(folder) / "gan.json"
    kept.parent.mkdir()
    own = hashlib.sha256((folder / "generator.safetensors").read_bytes()).hexdigest()
    for said in ({}, {"weights_sha256": own}):
        kept.write_text(json.dumps(said))
        gan_folder.settle(config, folder, storage)
        assert kept.is_file()
    (folder / "generator.safetensors").write_bytes(b"another")
    gan_folder.settle(config, folder, storage)
    assert not kept.parent.exists()
    kept.parent.mkdir()
    (kept.parent / "state.pt").touch()  # nobody goes on from that alone
    gan_folder.settle(config, folder, storage)
    assert not kept.parent.exists()


@pytest.mark.parametrize("removed", range(4))
def test_a_training_whose_driver_is_killed_while_it_removes_it_is_found_whole_or_not_at_all(tmp_path: Path, removed: int) -> None:
    """Of two checkpoints so many files are gone by then; a part of one would keep the next training of the same settings."""
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    folder, storage = trained(config, tmp_path / "generator"), tmp_path / "train"
    digest = json.loads((folder / "card.json").read_text())["images_sha256"]
    training = storage / gan_images.training_name(config, digest)
    for name in ("checkpoint_0", "checkpoint_1"):
        (training / name).mkdir(parents=True)
        for file in ("gan.json", "state.pt"):
            (training / name / file).touch()
    with killed_when_removed(removed, "gan.json", "state.pt"):
        gan_folder.settle(config, folder, storage)
    assert not any(len(list(place.iterdir())) == 1 for place in training.glob("*"))
    gan_images.sweep(storage)
    gan_folder.settle(config, folder, storage)
    gan_images.sweep(storage)
    assert not list(storage.iterdir())


def test_the_table_beside_a_generator_tells_its_images(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos", count=20)
    config = photo_settings(photos, tmp_path, "--data.max_rejected", "0.2")
    rows = list_examples(config.data).rows("train")
    victim = rows["id"][0].as_py()
    (photos / victim).write_bytes(b"no picture")
    card = json.loads((trained(config, tmp_path / "generator") / "card.json").read_text())
    table = pq.read_table(tmp_path / "generator" / "images.parquet")
    assert table["id"].equals(rows["id"])
    assert table["label"].equals(rows["label"])
    assert table["version"][1].as_py() == "{0.st_size} {0.st_mtime_ns}".format((photos / rows["id"][1].as_py()).stat())
    images = read_pixels(rows, config.data)
    expected = [None if isinstance(image, str) else hashlib.sha256(image.tobytes()).digest() for image in images]
    assert table["pixels_sha256"].to_pylist() == expected
    assert expected.count(None) == 1
    content = (tmp_path / "generator" / "images.parquet").read_bytes()
    assert card["images_file_sha256"] == hashlib.sha256(content).hexdigest()
    for path in photos.rglob("*.png"):
        os.utime(path, (0, 0))
    again = json.loads((trained(config, tmp_path / "later" / "generator") / "card.json").read_text())
    assert again["images_pixels_sha256"] == card["images_pixels_sha256"]
    assert again["images_file_sha256"] != card["images_file_sha256"]


def contents(config: Config) -> dict[str, bytes | str]:
    """The pixels of the training split by id."""
    rows = list_examples(config.data).rows("train")
    images = [image if isinstance(image, str) else image.tobytes() for image in read_pixels(rows, config.data)]
    return dict(zip(rows["id"].to_pylist(), images, strict=True))


def add(photos: Path) -> None:
    for name in ("new", "newer"):
        shutil.copyfile(photos / "class0" / "00.png", photos / "class0" / f"{name}.png")


def remove(photos: Path) -> None:
    (photos / "class1" / "01.png").unlink()


def draw(photos: Path) -> None:
    for path in sorted((photos / "class0").iterdir())[:3]:
        Image.fromarray(np.zeros((10, 10), dtype=np.uint8)).save(path)


def touch(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        os.utime(path)


def save_otherwise(photos: Path) -> None:
    """The same pixels in larger files."""
    for path in photos.rglob("*.png"):
        Image.open(path).save(path, compress_level=0)


@pytest.mark.parametrize("change", [touch, save_otherwise, add, remove, draw])
@pytest.mark.parametrize("with_table", [True, False])
def test_a_generator_is_another_only_where_images_are(
    tmp_path: Path, change: Callable[[Path], None], *, with_table: bool
) -> None:
    """One without a table was trained by an earlier version: that of its files anything has changed is all that can be told."""
    photos = photo_folder(tmp_path / "photos", count=20)
    config = photo_settings(photos, tmp_path)
    folder = trained(config, tmp_path / "generator")
    if not with_table:
        (folder / "images.parquet").unlink()
    assert gan_folder.is_trained(config, folder)
    before = contents(config)
    change(photos)
    after = contents(config)
    counts = {
        "more": len(after.keys() - before.keys()),
        "fewer": len(before.keys() - after.keys()),
        "changed": sum(after[id] != before[id] for id in after.keys() & before.keys()),
    }
    told = ", ".join(f"{count} image{'s'[: count - 1]} {word}" for word, count in counts.items() if count)
    assert bool(told) == (change in (add, remove, draw))
    if with_table and not told:
        assert gan_folder.is_trained(config, folder)
        return
    why = f"{told} since" if with_table else "its images have changed since, or their files"
    with pytest.raises(UserError, match=re.escape(f"holds another generator ({why}); give another --output, or --overwrite")):
        gan_folder.is_trained(config, folder)


@pytest.mark.parametrize("change", [touch, save_otherwise, add, remove, draw])
def test_an_interrupted_training_goes_on_where_images_are_the_same(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Its folder is named after them and the times of their files."""
    photos, storage = photo_folder(tmp_path / "photos", count=20), tmp_path / "train"
    config = photo_settings(photos, tmp_path)
    begun, pixels = gan_images.prepare_images(config, storage), contents(config)
    change(photos)
    now = gan_images.prepare_images(config, storage)
    assert now.digest != begun.digest, "nothing has begun with those that there were"
    training = storage / gan_images.training_name(config, begun.digest)
    (training / "checkpoint_000000").mkdir(parents=True)
    found = gan_images.prepare_images(config, storage)
    assert (contents(config) == pixels) == (change in (touch, save_otherwise))
    assert found == (begun if change in (touch, save_otherwise) else now)
    assert gan_images.training_name(config, found.digest) == training.name or change in (add, remove, draw)
    for options in (["--gan.seed", "5"], ["--cluster.train_workers", "7"]):
        assert gan_images.prepare_images(photo_settings(photos, tmp_path, *options), storage) == now
    padded = photo_settings(photos, tmp_path, "--data.resize", "pad")
    assert gan_images.prepare_images(padded, storage).digest not in (begun.digest, now.digest)
    (storage / gan_images.training_name(config, now.digest)).mkdir()  # which comes first, with the files as they are
    assert gan_images.prepare_images(config, storage) == now


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gan.seed", "5"], r"\(gan.seed was 0, now it is 5\)"),
        (["--gan.quality.samples", "50"], r"\(gan.quality.samples was \d+, now it is 50\)"),
        (["--data.resize", "pad"], r"\(data.resize was crop, now it is pad\)"),
        (["--data.test_share", "0.5"], r"\(6 images fewer since; data.test_share was 0.2, now it is 0.5\)"),
    ],
)
def test_what_another_generator_was_made_with_is_named(tmp_path: Path, options: list[str], words: str) -> None:
    photos = photo_folder(tmp_path / "photos", count=20)
    folder = trained(photo_settings(photos, tmp_path), tmp_path / "generator")
    with pytest.raises(UserError, match=words):
        gan_folder.is_trained(photo_settings(photos, tmp_path, *options), folder)


def test_only_images_whose_files_are_others_are_decoded_to_compare_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = photo_folder(tmp_path / "photos", count=20)
    config = photo_settings(photos, tmp_path)
    folder = trained(config, tmp_path / "generator")
    name = list_examples(config.data).rows("train")["id"][3].as_py()
    os.utime(photos / name)
    decoded: list[str] = []

    def noting(rows: pa.Table, data: DataConfig) -> list[np.ndarray | str]:
        decoded.extend(rows["id"].to_pylist())
        return read_pixels(rows, data)

    monkeypatch.setattr(trained_on, "read_pixels", noting)
    assert gan_folder.is_trained(config, folder)
    assert decoded == [name]


def test_a_folder_that_is_no_whole_generator_is_another(tmp_path: Path) -> None:
    config = photo_settings(photo_folder(tmp_path / "photos"), tmp_path)
    assert not gan_folder.is_trained(config, tmp_path / "generator")
    folder = trained(config, tmp_path / "generator")
    for name in ("generator.safetensors", "card.json"):
        (folder / name).unlink()
        with pytest.raises(UserError, match="it was not trained here, or is not whole"):
            gan_folder.is_trained(config, folder)
