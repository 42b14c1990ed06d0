"""Natural images in folders of whatever files: how they are listed and read, and what may be wrong."""

import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pytest
from image_folders import ODD, folder_of, png, two_classes

from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read, read_pixels, versions_of_images
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import StorageError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


def test_folder_names_are_classes_and_paths_are_ids(folder: Path) -> None:
    folder_of(folder, "a/deeper/LOUD.JPG", "a/notes.md", ".cache/x/y.png", "a/._0.png", "a/.hidden/0.png", "loose.png")
    listing = list_examples(DataConfig(source=str(folder)))
    assert listing.class_names == ("a", "b")
    labels = dict(zip(listing.table["id"].to_pylist(), listing.table["label"].to_pylist(), strict=True))
    assert len(labels) == 41
    assert (labels["a/deeper/LOUD.JPG"], labels["a/0.png"], labels["b/0.png"]) == (0, 0, 1)
    assert listing.found == 41
    assert listing.ignored == "2 files of no extension of images, or beside the class folders, the first: 'a/notes.md'"


def test_what_limits_and_extensions_leave_out_is_counted(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=10, test_limit=4))
    assert (listing.table.num_rows, listing.found, listing.ignored) == (14, 40, "")
    (folder / "b/lost.png").symlink_to(folder / "nowhere")
    config = DataConfig(source=str(folder))
    listing = list_examples(config)
    row = listing.table.filter(pc.equal(listing.table["id"], "b/lost.png"))
    assert read_pixels(row, config) == ["cannot be read: No such file or directory"]
    assert versions_of_images(row, config) == ["gone"]


def test_images_without_classes(tmp_path: Path) -> None:
    config = DataConfig(source=str(folder_of(tmp_path / "photos", *(f"{i}.png" for i in range(5)))))
    listing = list_examples(config, labelled=False)
    assert listing.class_names == ("photos",)
    assert listing.table["id"].to_pylist() == [f"{i}.png" for i in range(5)]
    with pytest.raises(UserError, match="holds no sub-folders"):
        list_examples(config)


def test_names_of_all_kinds_are_listed_and_read(tmp_path: Path) -> None:
    names = [f"{c}/{n}.png" for c in ("kl ässe 🐈", "b#%+'\"\n") for n in ODD]
    config = DataConfig(source=str(folder_of(tmp_path, *names)), resolution=8)
    listing = list_examples(config)
    assert set(listing.table["id"].to_pylist()) == set(names)
    levels = {id: int(pixels[0, 0, 0]) for id, pixels in zip(listing.table["id"].to_pylist(), read_pixels(listing.table, config))}  # noqa: B905
    assert levels == {name: 4 * i % 256 for i, name in enumerate(names)}


def test_names_that_are_not_utf8_are_escaped_and_read(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    name = os.path.join(os.fsencode(tmp_path), b"a", b"caf\xe9 \xf0\x9f\x90\x88.png")
    Path(os.fsdecode(name)).write_bytes(png(77))
    config = DataConfig(source=str(tmp_path), resolution=8)
    listing = list_examples(config)
    ids = listing.table["id"].to_pylist()
    assert "a/caf\\xe9 🐈.png" in ids
    pixels = read_pixels(listing.table, config)[ids.index("a/caf\\xe9 🐈.png")]
    assert not isinstance(pixels, str)
    assert (pixels == 77).all()
    # two names with one id: which is which could not be told
    (tmp_path / "a" / "caf\\xe9 🐈.png").write_bytes(png())
    with pytest.raises(UserError, match=r"the id 'a/caf\\xe9 🐈.png' occurs 2 times"):
        list_examples(config)


def test_a_listing_is_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["a/1.png", "a/x/1.png", "a/x/2.png", "a/x y/1.png", "a/x-1.png", "a-1/1.png", "a-1/2.png"]
    listing = list_examples(DataConfig(source=str(folder_of(tmp_path, *reversed(names)))))
    assert listing.table["id"].to_pylist() == sorted(names, key=lambda name: name.split("/"))


def test_versions_follow_local_files(folder: Path) -> None:
    config = DataConfig(source=str(folder))
    rows = list_examples(config).table
    before = versions_of_images(rows, config)
    (folder / "a/7.png").write_bytes(png(1, 200))
    changed = [id for id, a, b in zip(rows["id"].to_pylist(), before, versions_of_images(rows, config), strict=True) if a != b]
    assert changed == ["a/7.png"]


def test_reasons_stand_in_the_places_of_what_cannot_be_read(folder: Path) -> None:
    config = DataConfig(source=str(folder), resolution=8)
    table = list_examples(config).table
    (folder / "a/1.png").unlink()
    (folder / "a/2.png").write_bytes(b"no picture")
    (folder / "b/3.png").unlink()
    (folder / "b/3.png").mkdir()
    found = dict(zip(table["id"].to_pylist(), read_pixels(table, config), strict=True))
    reasons = {id: reason for id, reason in found.items() if isinstance(reason, str)}
    assert reasons == {
        "a/1.png": "cannot be read: No such file or directory",
        "a/2.png": "cannot be read as an image: it begins with b'no picture', which is none of "
        "JPEG, PNG, WebP, GIF, TIFF, BMP, netpbm",
        "b/3.png": "cannot be read: Is a directory",
    }
    limited = DataConfig(source=str(folder), resolution=8, max_pixels=64)
    assert not isinstance(read_pixels(table.slice(0, 1), limited)[0], str)
    (folder / "a/0.png").write_bytes(png(0, 9))
    assert read_pixels(table.slice(0, 1), limited) == ["is 9x9 pixels, more than data.max_pixels = 64"]


def test_a_file_larger_than_any_image_is_not_read(folder: Path) -> None:
    (folder / "a" / "0.png").write_bytes(bytes(8 * 64 + 1))
    config = DataConfig(source=str(folder), resolution=8, max_pixels=64)
    found = read(list_examples(config).table, config)
    assert found[0] == "has 513 bytes, more than any image of data.max_pixels"
    assert all(isinstance(content, bytes) for content in found[1:])


def test_what_ails_the_machine_is_not_taken_for_broken_images(folder: Path) -> None:
    config = DataConfig(source=str(folder), resolution=8)
    table, (soft, hard) = list_examples(config).table, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StorageError, match=r"a/0\.png' cannot be read: Too many open files"):
            read(table, config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_part_of_a_listing_travels(folder: Path) -> None:
    """What a task in another process gets: rows and settings."""
    config = DataConfig(source=str(folder))
    rows = list_examples(config).table.slice(10, 7)
    there, settings = pickle.loads(pickle.dumps((rows, config.model_dump(mode="json"))))
    assert read(there, DataConfig.model_validate(settings)) == [(folder / id).read_bytes() for id in rows["id"].to_pylist()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "neither 'mnist5k' nor a folder"),
        (lambda p: p, "holds no sub-folders"),
        (lambda p: folder_of(p, "a/x.png", "a/y.png"), r"one class only \('a'\); a classifier needs two or more$"),
        (lambda p: folder_of(p, "a/x.png", "a/b/y.png", "a/c/y.png"), r"one class only \('a'\); a classifier needs two or more$"),
        (lambda p: folder_of(p, "a/b/train/c/x.png", "a/b/train/d/x.png", "a/b/val/x.png"), r"or more; did you mean '.*/a/b'\?$"),
        (lambda p: folder_of(p, "a/c/x.png", "a/d/x.png"), r"or more; did you mean '.*/a'\?$"),
        (
            lambda p: folder_of(p, "a/x.png", "a/y.png", "b/readme.md"),
            r"class folder .*b' holds no images \(.*\); remove it, or name",
        ),
        (lambda p: folder_of(p, "a/x.png", "a/y.png", "b/x.png"), "class 'b' .* no image in the train split"),
        (lambda p: folder_of(p, "x.png") / "x.png", r"x\.png' is a file, but not a Parquet file"),
    ],
    ids=[
        "missing",
        "empty",
        "one class",
        "one class with folders inside",
        "a folder above that of the data",
        "a folder above those of the classes",
        "class without images",
        "class with one image",
        "a file",
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_examples(DataConfig(source=str(make(tmp_path))))


def test_a_class_of_a_part_without_images_is_named_where_it_lies(tmp_path: Path) -> None:
    folder_of(tmp_path, *(f"{part}/{c}/x.png" for part in ("train", "test") for c in "ab"), "train/c/readme.md")
    with pytest.raises(UserError, match=r"class folder '.*/train/c' holds no images"):
        list_examples(DataConfig(source=str(tmp_path), official_split=True))


def test_a_folder_that_may_not_be_read() -> None:
    root = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        folder_of(root, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
        root.chmod(0o755)
        config = DataConfig(source=str(root), resolution=8)
        table = list_examples(config).table
        (root / "a/1.png").chmod(0)
        (root / "b").chmod(0)
        if user == 0:
            os.seteuid(65534)
        assert read(table.slice(0, 3), config)[1] == "cannot be read: Permission denied"
        with pytest.raises(UserError, match=r"cannot be listed: Permission denied \('.*/b/?'\)"):
            list_examples(config)
    finally:
        os.seteuid(user)
        (root / "b").chmod(0o700)
        shutil.rmtree(root)
