"""What a set is made of, when one that was begun is gone on with, and what is told of the set that was made."""

import contextlib
import dataclasses
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from set_photos import Make, parted_photos, settings_maker
from torch import Tensor

from dmat_ray.data import set_format, set_settings
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import set_maker
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.storage import Location
from dmat_ray.storage.lease import Lease

UNCHANGED = "the on-manifold set is whole and unchanged, nothing to do"
OF_THE_SAME_NAMES = (
    "the on-manifold set is whole, of images of the same names (their content is not compared, or of a few only), nothing to do"
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return parted_photos(tmp_path / "photos")


@pytest.fixture
def make(photos: Path, tmp_path: Path, generator_folder: Path) -> Make:
    return settings_maker(photos, tmp_path, generator_folder)


def test_lpips_is_known_by_the_content_of_its_weights(make: Make, tmp_path: Path) -> None:
    """The same file at another place makes the same set; other weights at the same place, or none, do not."""
    config, first, second = make(None, official_split=True), tmp_path / "a.pth", tmp_path / "b.pth"
    listing = list_examples(config.data)

    def settings_with(path: Path | str) -> dict[str, Any]:
        projection = config.projection.model_copy(update={"lpips": 1.0, "lpips_weights": str(path)})
        return set_maker.settings_of(config.model_copy(update={"projection": projection}), listing)

    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    set_folder = Location(None, str(tmp_path / "set"))
    before = settings_with(first)
    set_settings.begin(set_folder, before)
    set_settings.begin(set_folder, settings_with(second))
    first.write_bytes(b"others")
    with pytest.raises(UserError, match=r"begun with lpips_sha256 = \w{64}, now it is \w{64}"):
        set_settings.begin(set_folder, settings_with(first))
    with pytest.raises(UserError, match=r"projection\.lpips_weights = .*b\.pth, now it is random"):
        set_settings.begin(set_folder, settings_with("random"))
    del before["lpips_sha256"]  # one of before digests were recorded is known by the path
    (set_folder / set_settings.SETTINGS).write_json(before)
    with pytest.raises(UserError, match=r"projection\.lpips_weights = .*a\.pth, now it is .*b\.pth"):
        set_settings.begin(set_folder, settings_with(second))
    set_settings.begin(set_folder, settings_with(first))
    assert "lpips_sha256" not in settings_with("random")


@pytest.mark.parametrize("way", [{"official_split": False}, {"classes": {"test": ["test"], "train": ["train"]}}])
def test_a_set_of_before_its_source_looked_like_parts_is_gone_on_with(
    make: Make, photos: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    """It was made without a word on the parts, which its source now asks for: the same images, splits and labels make the set."""
    if "official_split" in way:
        (photos / "test").rename(photos / "2020")
        (photos / "train").rename(photos / "2021")
    config = make(None, **way)
    with pytest.raises(UserError, match=r"(data\.classes|data\.official_split false) if they are classes"):
        set_maker.make(make(None), torch.device("cpu"), print)
    settings = set_maker.settings_of(config, list_examples(config.data))
    before = {**settings, "data": make(None).data.settled()}
    del before["data"]["max_rejected"]
    folder = Location(None, f"{config.output}/on_manifold_set")
    set_settings.begin(folder, before)
    manifest = set_maker.make(config, torch.device("cpu"), print)
    assert manifest["class_names"] == sorted(path.name for path in photos.iterdir())
    (folder / "manifest.json").write_json({**manifest, "data": before["data"]})
    lines: list[str] = []
    set_maker.make(config, torch.device("cpu"), lines.append)
    assert lines[0] == f"2 classes: '{manifest['class_names'][0]}', '{manifest['class_names'][1]}'"
    assert lines[-1] == OF_THE_SAME_NAMES
    next(photos.glob("*/class0/*.png")).unlink()
    others = Location(None, str(tmp_path / "others"))
    set_settings.begin(others, before)
    with pytest.raises(UserError, match=rf"with data\.{next(iter(way))} = its default, now it is .*; give the old value, "):
        set_settings.begin(others, set_maker.settings_of(config, list_examples(config.data)))


def test_a_set_of_before_its_parquet_looked_like_parts_is_gone_on_with(make: Make, tmp_path: Path) -> None:
    """Of all files, which the listing that is asked for with false has as well."""
    source = tmp_path / "files"
    source.mkdir()
    for name in ("x-1", "x-2"):
        encoded = []
        for shade in range(10):
            Image.new("L", (8, 8), shade).save(buffer := io.BytesIO(), "png")
            encoded.append(buffer.getvalue())
        columns = {"image": encoded, "label": [0, 1] * 5, "key": [f"{name} {i}" for i in range(10)]}
        pq.write_table(pa.table(columns), source / f"{name}.parquet")
    config = make(None, source=str(source), id_column="key")
    listing, folder = list_examples(config.data), Location(None, f"{config.output}/on_manifold_set")
    before = set_maker.settings_of(config, listing)
    for old, new in (("x-1", "x-test"), ("x-2", "x-train")):
        (source / f"{old}.parquet").rename(source / f"{new}.parquet")
    with pytest.raises(UserError, match="or false to take and split all of them, as sets that were begun without a word of it"):
        list_examples(config.data)
    set_settings.begin(folder, before)
    now = make(None, source=str(source), id_column="key", official_split=False)
    assert set_maker.make(now, torch.device("cpu"), print)["count"] == 20


def test_a_class_whose_images_are_all_lost_is_told(make: Make, photos: Path) -> None:
    config = make(None, official_split=True, max_rejected=0.5)
    lines: list[str] = []
    assert "classes_without_usable" not in set_maker.make(config, torch.device("cpu"), lines.append)
    assert not [line for line in lines if "no usable" in line]
    for path in (photos / "train" / "class1").iterdir():
        path.write_bytes(b"broken")
    again = config.model_copy(update={"output": f"{config.output}2"})
    assert set_maker.make(again, torch.device("cpu"), lines.append)["classes_without_usable"] == {"train": ["class1"]}
    assert lines[-1].startswith(
        "warning: no usable training image of 'class1': all were rejected, or are poor (projection.poor_l1"
    )


def without_gradient(w: Tensor, x: Tensor) -> Tensor:
    """The images, with a gradient to w that is nowhere a number."""
    return x + 0 * (w - w.detach()).sum(dim=(1, 2)).sqrt()[:, None, None, None]


def with_holes(w: Tensor, x: Tensor) -> Tensor:
    """The images, but for those of w on one side of a plane, which are none."""
    return torch.where(w[:, 0, 0, None, None, None] > 1e-3, torch.nan, x)


@pytest.mark.parametrize(("broken", "start"), [(without_gradient, "mean"), (without_gradient, "nearest"), (with_holes, "mean")])
def test_images_whose_search_broke_off_are_poor_however_near_they_began(
    make: Make, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Tensor, Tensor], Tensor], start: str
) -> None:
    """What stands in the set for them was chosen among samples at best, and never optimised."""
    plain = make(None, official_split=True)
    config = plain.model_copy(
        update={"projection": plain.projection.model_copy(update={"start": start, "steps": 4, "shard_size": 5})}
    )
    lines: list[str] = []
    assert "given_up" not in set_maker.make(config, torch.device("cpu"), lines.append)
    assert not [line for line in lines if line.startswith("warning")]
    shutil.rmtree(config.output)
    whole = StyleGAN2.synthesis
    # not the mean, whose image is asked for where there is no other
    monkeypatch.setattr(StyleGAN2, "synthesis", lambda self, w, clamp=True: broken(w - self.w_mean, whole(self, w, clamp)))
    manifest = set_maker.make(config, torch.device("cpu"), lines.append)
    rows = pq.read_table(Path(config.output) / "on_manifold_set" / "shards").to_pylist()
    poor = [row for row in rows if row["status"] == "poor"]
    assert manifest["given_up"] == manifest["status"]["poor"] == len(poor)
    assert {row["id"] for row in rows if row["steps"] < 4} <= {row["id"] for row in poor}
    assert len(poor) == 20 if broken is without_gradient else 0 < len(poor) < 20
    (line,) = [line for line in lines if "broke off" in line]
    assert line.startswith(f"warning: the search of {len(poor)} of 20 images broke off, because its loss or gradient was not fin")
    found = inspect_set(Path(config.output) / "on_manifold_set")
    assert found.sound
    assert found.warnings[0] == line
    set_maker.make(config, torch.device("cpu"), lines.append)
    assert lines[-1] == OF_THE_SAME_NAMES


@pytest.mark.parametrize("older", [False, True], ids=["", "a shard of before"])
def test_test_images_that_are_training_images_are_told(make: Make, photos: Path, older: bool) -> None:
    """By their pixels: another name, and another file format, are no other image."""
    config = make(None, official_split=True)
    config = config.model_copy(update={"projection": config.projection.model_copy(update={"shard_size": 5})})
    shutil.copyfile(photos / "train" / "class0" / "04.png", photos / "test" / "class0" / "copy.png")
    Image.open(photos / "train" / "class1" / "07.png").save(photos / "test" / "class1" / "other.bmp")
    shutil.copyfile(photos / "train" / "class1" / "07.png", photos / "train" / "class1" / "again.png")  # no test image
    lines: list[str] = []
    with monkeypatched_keys(older):
        manifest = set_maker.make(config, torch.device("cpu"), lines.append)
    told = [line for line in lines if "the training images, too" in line]
    if older:
        assert "test_images_in_training" not in manifest
        assert told == []
        return
    assert manifest["test_images_in_training"] == 2
    (line,) = told
    assert line.startswith("warning: 2 of 6 test images are among the training images, too (the same pixels): ")
    assert "; the first: 'test/class0/copy.png' is 'train/class0/04.png', 'test/class1/other.bmp' is 'train/class1/" in line
    (photos / "test" / "class1" / "other.bmp").unlink()
    lines.clear()
    set_maker.make(config.model_copy(update={"output": f"{config.output}2"}), torch.device("cpu"), lines.append)
    assert any(line.startswith("warning: 1 of 5 test images is among the training images, too (the same") for line in lines)
    found = inspect_set(Path(config.output) / "on_manifold_set")
    assert found.sound
    assert any(line.startswith("warning: among the test images are training images, 2 of 6, ") for line in found.warnings)


@contextlib.contextmanager
def monkeypatched_keys(older: bool) -> Iterator[None]:
    """With `older` every other shard is written as before keys of pixels were."""
    count, whole = itertools.count(), set_format.with_pixel_keys

    def with_keys(schema: pa.Schema, pixels: Any) -> pa.Schema:
        return schema if older and next(count) % 2 else whole(schema, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_format, "with_pixel_keys", with_keys)
        yield


def test_shards_of_more_than_a_file_holds_are_refused_before_anything_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(None, official_split=True)
    larger = config.model_copy(update={"projection": config.projection.model_copy(update={"shard_size": 8})})
    images = np.zeros((8, 1, 8, 8), np.uint8)
    monkeypatch.setattr(set_format, "MOST_BYTES", 7 * len(b"P5\n8 8\n255\n" + bytes(64)))
    set_format.to_netpbm(images[:7])
    with pytest.raises(UserError):
        set_format.to_netpbm(images)
    with pytest.raises(
        UserError, match=r"shard_size 8: so many images of 8x8 pixels are more than the 2 GiB .*set it to 7 or less"
    ):
        set_maker.make(larger, torch.device("cpu"), print)
    assert not Path(config.output).exists()
    few = make(None, official_split=True, train_limit=4, test_limit=2)
    set_maker.prepare(few.model_copy(update={"projection": larger.projection}), print)


@pytest.mark.parametrize(("limit", "told"), [(0.3, True), (None, False)])
def test_a_limit_of_an_lpips_that_is_not_measured_is_told(make: Make, limit: float | None, told: bool) -> None:
    """Not refused: sets were made with it, and models trained on them."""
    config, lines = make(None, official_split=True), list[str]()
    projection = config.projection.model_copy(update={"poor_lpips": limit})
    made = set_maker.make(config.model_copy(update={"projection": projection}), torch.device("cpu"), lines.append)
    assert any("poor_lpips 0.3 marks no image poor" in line and "projection.lpips is 0" in line for line in lines) == told
    assert made["status"] == {"ok": made["count"]}


def test_a_file_of_many_images_that_was_written_anew_is_not_mixed_into_a_set(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images have the ids and labels that others had: by their places."""
    source = tmp_path / "photos.parquet"

    def write(shades: range) -> None:
        encoded = []
        for shade in shades:
            Image.new("L", (8, 8), shade).save(buffer := io.BytesIO(), "png")
            encoded.append(buffer.getvalue())
        pq.write_table(pa.table({"image": encoded, "label": [0, 1] * 10}), source)

    write(range(20))
    before = source.read_bytes()
    config = make(None, source=str(source))
    projection = config.projection.model_copy(update={"shard_size": 5})
    config = config.model_copy(update={"projection": projection})
    with set_maker.begun(config, print) as work:
        assert work is not None
        first = dataclasses.replace(work, todo=work.todo[:2])
        set_maker._project(config, first, set_maker.build_projector(config, torch.device("cpu")), print)
    write(range(20, 40))
    folder = tmp_path / "out" / "on_manifold_set"
    told = rf"^'{source}' is another file than when the on-manifold set '{folder}' was begun, .* put the file of then back, give"
    with pytest.raises(UserError, match=told):
        set_maker.make(config, torch.device("cpu"), print)
    noted = (folder / "files.json").read_bytes()
    (folder / "files.json").unlink()
    with set_maker.begun(config, print) as work:
        assert work is not None, "one of before digests were noted is gone on with"
    (folder / "files.json").write_bytes(noted)
    source.write_bytes(before)  # another time, the same content
    assert set_maker.make(config, torch.device("cpu"), print)["count"] == 20
    assert set_maker.read_manifest(folder).keys().isdisjoint({"files"})


@pytest.mark.parametrize("id_column", [None, "key"])
def test_an_image_in_a_file_of_many_may_be_repaired(make: Make, tmp_path: Path, id_column: str | None) -> None:
    """As the job asks for, which then makes it a supplement, also where the file is written in other groups."""
    source = tmp_path / "photos.parquet"
    encoded = []
    for shade in range(20):
        Image.new("L", (8, 8), shade).save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    columns = {"label": [0, 1] * 10, "key": [f"k{i}" for i in range(20)]}
    pq.write_table(pa.table({"image": [*encoded[:3], b"text", *encoded[4:]], **columns}), source)
    config = make(None, source=str(source), id_column=id_column)
    with pytest.raises(UserError, match=r"1 of 20 images were rejected, .* Repair or replace the files, .* and run again"):
        set_maker.make(config, torch.device("cpu"), print)
    pq.write_table(pa.table({"image": encoded, **columns}), source, row_group_size=7)
    assert set_maker.make(config, torch.device("cpu"), print)["count"] == 20
    folder = tmp_path / "out" / "on_manifold_set"
    assert {path.name for path in (folder / "shards").iterdir()} == {"part-000000.parquet", "part-000000-1.parquet"}
    assert (folder / "files.json").exists() == (id_column is None)


def test_images_that_are_files_of_their_own_are_not_noted(make: Make, tmp_path: Path) -> None:
    set_maker.make(make(None, official_split=True), torch.device("cpu"), print)
    assert not (tmp_path / "out" / "on_manifold_set" / "files.json").exists()


@pytest.mark.parametrize("id_column", [None, "key"])
def test_a_finished_set_is_told_from_one_of_other_images(make: Make, tmp_path: Path, id_column: str | None) -> None:
    """By the file of many images, of which a few are compared where it was written anew; by the ids alone, where a column has
    them, as of a set from before digests were noted. It is left as it is: the digests of then are what tells.
    """
    source, folder = tmp_path / "photos.parquet", tmp_path / "out" / "on_manifold_set"
    columns = {"label": [0, 1] * 10, "key": [f"k{i}" for i in range(20)]}

    def write(shades: Iterable[int], **how: int) -> None:
        encoded = []
        for shade in shades:
            Image.new("L", (8, 8), shade).save(buffer := io.BytesIO(), "png")
            encoded.append(buffer.getvalue())
        pq.write_table(pa.table({"image": encoded, **columns}), source, **how)

    def said_again() -> str:
        lines: list[str] = []
        assert set_maker.make(config, torch.device("cpu"), lines.append) == made
        return lines[-1]

    write(range(20))
    config = make(None, source=str(source), id_column=id_column)
    made = set_maker.make(config, torch.device("cpu"), print)
    if id_column is not None:
        write(range(20, 40))
        assert said_again() == OF_THE_SAME_NAMES
        return
    noted, before = (folder / "files.json").read_bytes(), source.read_bytes()
    assert said_again() == UNCHANGED
    write(range(20), row_group_size=7)
    assert said_again() == OF_THE_SAME_NAMES
    write([*range(10), *range(100, 110)])
    assert said_again() == OF_THE_SAME_NAMES, "whether the first few are the same or all"
    source.write_bytes(before)
    assert said_again() == UNCHANGED
    write(range(20, 40))
    with pytest.raises(UserError, match=rf"^'{source}' is another file than when the on-manifold set '{folder}' was begun, "):
        set_maker.make(config, torch.device("cpu"), print)
    assert (folder / "files.json").read_bytes() == noted
    (folder / "files.json").unlink()
    assert said_again() == OF_THE_SAME_NAMES
    assert not (folder / "files.json").exists()


@pytest.mark.parametrize("checks_that_pass", [0, 2, 4])
def test_a_set_that_another_run_has_taken_over_is_left_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, checks_that_pass: int
) -> None:
    """Before each of its four shards, and before the manifest."""
    config, passed = make(None, official_split=True), list[int]()
    config = config.model_copy(update={"projection": config.projection.model_copy(update={"shard_size": 5})})

    def check(self: Lease) -> None:
        if len(passed) == checks_that_pass:
            raise UserError("another run has taken over")
        passed.append(1)

    monkeypatch.setattr(Lease, "check", check)
    with pytest.raises(UserError, match="another run has taken over"):
        set_maker.make(config, torch.device("cpu"), print)
    folder = Path(config.output) / "on_manifold_set"
    assert len(list((folder / "shards").glob("*.parquet"))) == checks_that_pass
    assert not (folder / "manifest.json").exists()
