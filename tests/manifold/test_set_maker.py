"""What is looked at before a set is begun: room in its files, and whether the generator was trained on its test images."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packed_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmat_ray import settings
from dmat_ray.config import Config, DataConfig
from dmat_ray.data import first_look, set_format, set_settings, sources
from dmat_ray.data.apart import require_apart
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import open_set
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_images, set_maker, trained_on
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import prediction
from dmat_ray.storage import Location

PLAIN = {"lpips": 0, "start": "mean", "steps": 1, "poor_l1": 1}
Make = Callable[..., Config]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures of each of two classes in parts: two of them are in the folder test, the others in train."""
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "photos" / ("test" if number < 4 else "train") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return tmp_path / "photos"


@pytest.fixture
def make(photos: Path, tmp_path: Path, generator_folder: Path) -> Make:
    """make(card, **data): settings with a generator whose card has `card` under data; both are of the photos."""

    def made(card: dict[str, Any] | None, **data: Any) -> Config:
        folder = tmp_path / "generator"
        shutil.copytree(generator_folder, folder, dirs_exist_ok=True)
        known = json.loads((folder / "card.json").read_text())
        if card is not None:
            known["data"] = {"source": str(photos), "resolution": 8, **card}
        (folder / "card.json").write_text(json.dumps(known))
        gan = {"architecture": known["architecture"]}
        values = {"data": {"source": str(photos), "resolution": 8, **data}, "generator": {"path": str(folder)}, "gan": gan}
        return Config.model_validate({**values, "projection": PLAIN, "output": str(tmp_path / "out")})

    return made


def said(config: Config) -> list[str]:
    """The warnings of a projection before it begins."""
    return set_maker.warnings_before(config, set_maker.prepare(config, print))


def test_test_images_that_the_generator_was_trained_on_are_told(make: Make) -> None:
    """It was trained on the folder train, of which this set's test split is made."""
    (line,) = said(make({"official_split": True}, official_split=False, test_share=0.25))
    assert "4 of 4 test images are among those that generator" in line
    assert line.endswith("give data.test_share and data.official_split as under data in its card.json")
    (line,) = said(make({"official_split": True, "train_limit": 2}, official_split=False, test_share=0.9))
    assert "2 of 14 test images are among" in line, "it was trained on two images only"
    (line,) = said(make({"official_split": True, "classes": {"a": ["gone"], "b": ["class1"]}}, official_split=False))
    assert "warning: test images may be among" in line


def test_a_source_is_the_same_however_it_is_written(make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    for written in (f"{photos}/", "photos"):
        (line,) = said(make({"official_split": True, "source": written}, official_split=False, test_share=0.25))
        assert "4 of 4 test images are among" in line


@pytest.mark.parametrize(
    ("card", "data"),
    [
        (None, {"official_split": True}),
        ({"official_split": True}, {"official_split": True}),
        ({"official_split": True}, {"official_split": True, "seed": 3, "test_share": 0.5}),
        ({"official_split": True}, {"official_split": True, "train_limit": 6, "test_limit": 2, "balanced": True}),
        ({"official_split": False}, {"official_split": False, "train_limit": 6, "resize": "pad", "max_rejected": 0.5}),
        ({"official_split": True, "source": "elsewhere"}, {"official_split": False}),
        ({"official_split": True, "later": 1}, {"official_split": False}),
    ],
    ids=["no data", "the same", "same parts", "fewer", "fewer of a share", "other images", "a later version's"],
)
def test_a_generator_that_knows_no_test_image_is_nothing_to_say(
    make: Make, card: dict[str, Any] | None, data: dict[str, Any]
) -> None:
    assert said(make(card, **data)) == []


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


def ids(config: Config, split: str) -> set[str]:
    return set(list_examples(config.data).rows(split)["id"].to_pylist())


def draw(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(path)


@pytest.fixture
def after_training(make: Make, tmp_path: Path) -> Callable[..., Config]:
    """after_training(with_table, **data): `make` with a generator that was trained on the photos as they are."""

    def made(with_table: bool, **data: Any) -> Config:
        config = make({**data}, **data)
        folder = Path(config.generator.path)
        cache = gan_images.prepare_images(config, tmp_path / "train")
        card = json.loads((folder / "card.json").read_text()) | gan_images.card_of(config, cache)
        (folder / "card.json").write_text(json.dumps(card))
        if with_table:
            shutil.copyfile(cache.folder / "images.parquet", folder / "images.parquet")
        return config

    return made


@pytest.mark.parametrize("with_table", [True, False])
def test_one_image_more_of_the_same_source_is_another_split(
    after_training: Callable[..., Config], photos: Path, *, with_table: bool
) -> None:
    """What an earlier version trained has no table: how many images it saw is then not known any more."""
    config = after_training(with_table, official_split=False, test_share=0.25)
    before = ids(config, "train")
    assert said(config) == []
    for name in ("00", "01"):
        draw(photos / "train" / f"class{name[1]}" / f"{name}.png")
    test = ids(config, "test")
    assert test & before
    (line,) = said(config)
    many = f"{len(test & before)} of {len(test)} test images are" if with_table else "test images may be"
    assert line.startswith(f"warning: {many} among those that generator")
    assert line.endswith("train it anew, or give data.official_split")
    noted = len(test & before) if with_table else "unknown"
    assert set_maker.make(config, torch.device("cpu"), print)["test_images_seen_by_generator"] == noted


def test_other_settings_and_more_images_are_counted_by_what_was_trained_on(
    after_training: Callable[..., Config], photos: Path
) -> None:
    config = after_training(True, official_split=True)
    before = ids(config, "train")
    for number in range(20, 30):
        draw(photos / "train" / f"class{number % 2}" / f"{number}.png")
    other = config.model_copy(update={"data": config.data.model_copy(update={"official_split": False, "test_share": 0.75})})
    test = ids(other, "test")
    (line,) = said(other)
    assert f"{len(test & before)} of {len(test)} test images are among" in line
    assert 0 < len(test & before) < len(test)
    assert said(config) == [], "its own test part is still apart"


def test_images_are_known_by_the_names_of_the_table(
    make: Make, after_training: Callable[..., Config], tmp_path: Path, photos: Path
) -> None:
    """Of Parquet, ids may come from a column, or be file and row."""
    shutil.rmtree(photos)
    photos.mkdir()
    encoded = []
    for shade in range(20):
        Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)).save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    columns = {"image": encoded, "label": [i % 2 for i in range(20)], "name": [f"n{i}" for i in range(20)]}
    pq.write_table(pa.table(columns), photos / "all.parquet")
    config = after_training(True, id_column="name")
    other = config.model_copy(update={"data": config.data.model_copy(update={"id_column": None, "seed": 1})})
    as_theirs = config.model_copy(update={"data": config.data.model_copy(update={"seed": 1})})
    (line,) = said(other)
    assert f"{len(ids(as_theirs, 'test') & ids(config, 'train'))} of 4 test images are" in line


def redraw(photos: Path) -> None:
    for path in sorted(photos.rglob("*.png"))[::2]:
        draw(path)


@pytest.mark.parametrize("change", [None, redraw])
@pytest.mark.parametrize("options", [{}, {"resize": "stretch"}, {"test_limit": 3}])
def test_images_that_lie_elsewhere_are_known_by_their_names_and_pixels(
    after_training: Callable[..., Config],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None] | None,
    options: dict[str, Any],
) -> None:
    """A copy, a bucket or another mount; other images may have the same names."""
    config = after_training(True, official_split=False, test_share=0.25)
    before = {id: (photos / id).read_bytes() for id in ids(config, "train")}
    moved = photos.with_name("moved")
    shutil.copytree(photos, moved)
    if change is not None:
        change(moved)
    data = config.data.model_copy(update={"source": str(moved), **options})
    assert said(config.model_copy(update={"data": data})) == [], "the split is the same"
    other = config.model_copy(update={"data": data.model_copy(update={"seed": 1, "test_share": 0.5})})
    of_both = ids(other, "test") & before.keys()
    seen = [id for id in of_both if (moved / id).read_bytes() == before[id]]
    assert 0 < len(seen) <= len(of_both)
    assert (len(seen) < len(of_both)) == (change is not None)
    decoded: list[str] = []

    def noting(rows: pa.Table, data: DataConfig) -> list[np.ndarray | str]:
        decoded.extend(rows["id"].to_pylist())
        return sources.read_pixels(rows, data)

    monkeypatch.setattr(trained_on, "read_pixels", noting)
    (line,) = said(other)
    verb = "is" if len(seen) == 1 else "are"
    assert line.startswith(f"warning: {len(seen)} of {len(ids(other, 'test'))} test images {verb} among those that generator")
    assert line.endswith("give data.seed and data.test_share as under data in its card.json")
    assert set_maker.make(other, torch.device("cpu"), print)["test_images_seen_by_generator"] == len(seen)
    assert sorted(decoded) == sorted(of_both), "none but those that may be, and once"
    whole = (moved / seen[0]).read_bytes()
    Image.new("L", (8, 8), 7).save(moved / seen[0])
    start = f"warning: {len(seen) - 1} of {len(ids(other, 'test'))} test images"
    assert [line[: len(start)] for line in said(other)] == [start] * (len(seen) > 1), "in the same process, too"
    (moved / seen[0]).write_bytes(whole)
    monkeypatch.setattr(trained_on, "read_pixels", unreadable)
    monkeypatch.setattr(trained_on, "_compared", {})
    (line,) = said(other)
    assert "warning: test images may be among" in line
    (Path(config.generator.path) / "images.parquet").unlink()
    assert said(other) == [], "nothing tells of them"


@pytest.mark.parametrize("inside", ["here", "there"])
def test_images_of_a_source_inside_another_are_known(after_training: Callable[..., Config], photos: Path, *, inside: str) -> None:
    """The folder train of a data set, and the data set itself, have other names for the same images."""
    whole = {"source": str(photos), "official_split": False}
    part = {"source": str(photos / "train"), "official_split": None}
    then, now = (whole, part) if inside == "here" else (part, whole)
    config = after_training(True, **then)
    other = config.model_copy(update={"data": config.data.model_copy(update={**now, "seed": 1, "test_share": 0.5})})
    trained = {(Path(config.data.source) / id).resolve() for id in ids(config, "train")}
    test = {(Path(other.data.source) / id).resolve() for id in ids(other, "test")}
    assert 0 < len(test & trained) < len(test)
    (line,) = said(other)
    assert f"{len(test & trained)} of {len(test)} test images are among" in line
    assert "give data.source and data.seed and data.test_share and data.official_split as under data in its card" in line


def test_images_of_other_names_are_known_by_their_pixels(
    after_training: Callable[..., Config], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of Parquet made of a folder; a sample of them is looked at first, of which most data sets have none."""
    config = after_training(True, official_split=False, test_share=0.25)
    before = {(photos / id).read_bytes() for id in ids(config, "train")}
    renamed = tmp_path / "renamed"
    for path in (photos / "train").rglob("*.png"):
        (renamed / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, renamed / path.parent.name / f"again-{path.name}")
    data = config.data.model_copy(update={"source": str(renamed), "seed": 1, "test_share": 0.5})
    other = config.model_copy(update={"data": data})
    test = [(renamed / id).read_bytes() in before for id in ids(other, "test")]
    assert 0 < sum(test) < len(test)
    (line,) = said(other)
    assert f"{sum(test)} of {len(test)} test images are among" in line
    assert "give data.source and data.seed and data.test_share as under data" in line
    for path in renamed.rglob("*.png"):
        draw(path)
    decoded: list[str] = []

    def noting(rows: pa.Table, data: DataConfig) -> list[np.ndarray | str]:
        decoded.extend(rows["id"].to_pylist())
        return sources.read_pixels(rows, data)

    monkeypatch.setattr(trained_on, "read_pixels", noting)
    monkeypatch.setattr(trained_on, "LOOKED_AT", 3)
    assert said(other) == []
    assert len(decoded) == 3
    monkeypatch.setattr(trained_on, "read_pixels", unreadable)
    monkeypatch.setattr(trained_on, "_compared", {})
    (line,) = said(other)
    assert "warning: test images may be among" in line


def unreadable(rows: pa.Table, data: DataConfig) -> list[np.ndarray | str]:
    raise UserError("no such column")


def test_the_shipped_generator_and_another_seed() -> None:
    without = {"projection": PLAIN}
    assert said(settings("demo", **without)) == []
    other = settings("demo", data={"seed": 1}, **without)
    test = set(list_examples(other.data).rows("test")["id"].to_pylist())
    held_out = set(list_examples(settings(data={"resolution": 32}).data).rows("test")["id"].to_pylist())
    assert len(test) == 300
    (line,) = said(other)
    assert f"{len(test - held_out)} of 300 test images are among" in line
    assert "give data.seed as under data" in line


def test_images_are_listed_again_only_where_the_splits_differ(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million images that takes minutes."""
    asked: list[Any] = []

    def counting(config: Any, **how: Any) -> Any:
        asked.append(config)
        return list_examples(config, **how)

    monkeypatch.setattr(sources, "list_examples", counting)
    said(make({"official_split": True}, official_split=True, train_limit=6))
    assert len(asked) == 1
    said(make({"official_split": True}, official_split=False))
    assert len(asked) == 3


def test_the_manifest_notes_it(make: Make) -> None:
    config = make({"official_split": True}, official_split=False, test_share=0.25)
    assert set_maker.make(config, torch.device("cpu"), print)["test_images_seen_by_generator"] == 4
    shutil.rmtree(config.output)
    fair = make({"official_split": True}, official_split=True)
    assert "test_images_seen_by_generator" not in set_maker.make(fair, torch.device("cpu"), print)


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
    assert lines[-1] == "the on-manifold set is whole and unchanged, nothing to do"
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
    assert lines[-1] == "the on-manifold set is whole and unchanged, nothing to do"


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


def test_an_output_among_the_images_is_refused(make: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next job would list what this one has written."""
    config = make(None, official_split=True)
    checks = (lambda c: set_maker.prepare(c, print), lambda c: gan_images.prepare_images(c, tmp_path / "train"))
    (tmp_path / "link").symlink_to(photos)
    for name, place in (
        *((name, str(photos / inside)) for name in ("output", "manifold_set") for inside in ("out", "train/class0/out")),
        ("output", str(photos)),
        ("output", str(tmp_path / "link" / "out")),
    ):
        changed = config.model_copy(update={name: place})
        for check in checks if name == "output" else checks[:1]:
            with pytest.raises(
                UserError, match=rf"^{name} '{photos}.*' is in data\.source '{photos}', .*; give another --{name}$"
            ):
                check(changed)
    monkeypatch.setitem(sources.NAMED, "photos", sources.NAMED["mnist5k"])
    monkeypatch.chdir(tmp_path)
    named = config.model_copy(update={"output": "photos/out", "data": config.data.model_copy(update={"source": "photos"})})
    require_apart(named, makes_set=True)
    require_apart(config.model_copy(update={"output": f"{photos}2"}), makes_set=True)
    for source, output in (("s3://b/photos", "s3://b/photos2"), ("s3://b/photos/out", "/photos"), ("s3://b/photos", "s3://b")):
        data = config.data.model_copy(update={"source": source})
        require_apart(config.model_copy(update={"output": output, "data": data}), makes_set=True)
    with pytest.raises(UserError, match=r"output 's3://b/photos/out' is in data\.source 's3://b/photos', "):
        require_apart(
            config.model_copy(
                update={"output": "s3://b/photos/out", "data": config.data.model_copy(update={"source": "s3://b/photos/"})}
            ),
            makes_set=False,
        )
    set_maker.make(config, torch.device("cpu"), print)
    again = config.data.model_copy(update={"source": f"{config.output}/on_manifold_set", "official_split": None})
    with pytest.raises(UserError, match=r"data\.source '.*' is in '.*/on_manifold_set', where the set that is made of it goes; "):
        set_maker.prepare(config.model_copy(update={"data": again}), print)
    require_apart(config.model_copy(update={"data": again}), makes_set=False)  # a generator of the set's images makes no set


def test_an_output_that_no_listing_takes_may_lie_among_the_images(make: Make, photos: Path) -> None:
    """The next job lists what this one has listed, and finds that it is done."""
    train, test = (packed_files.arrays(count, 2, (8, 8), seed=count) for count in (8, 4))
    mnist = packed_files.idx(photos.parent / "mnist", train, test)
    for source, place in ((photos, ".runs"), (photos, "train/.runs/out"), (mnist, "runs"), (mnist, "."), (mnist, ".runs")):
        config = make(None, source=str(source), official_split=True).model_copy(update={"output": str(source / place)})
        before = list_examples(config.data).table
        made = set_maker.make(config, torch.device("cpu"), print)
        assert made["count"] == len(before)
        lines: list[str] = []
        assert set_maker.make(config, torch.device("cpu"), lines.append) == made
        assert lines[-1] == "the on-manifold set is whole and unchanged, nothing to do"
        assert list_examples(config.data).table == before
        if ".runs" in place:
            require_apart(config, makes_set=False)
    with pytest.raises(UserError, match=r"^output '.*/mnist/runs' is in data\.source '.*/mnist', "):
        # a generator has its images' digests in Parquet beside it
        require_apart(config.model_copy(update={"output": str(mnist / "runs")}), makes_set=False)
    with pytest.raises(UserError, match=r"^data\.source '.*/mnist' is in '.*/mnist', where the set "):
        require_apart(config.model_copy(update={"manifold_set": str(mnist)}), makes_set=True)
    (mnist / "class").mkdir()
    (mnist / "class" / "0.png").touch()
    with pytest.raises(UserError, match=r"^output '.*/mnist/runs' is in data\.source '.*/mnist', "):
        require_apart(config.model_copy(update={"output": str(mnist / "runs")}), makes_set=True)


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


def test_grey_of_12_bits_in_16_is_told_and_read_as_it_is_said_to_be(make: Make, photos: Path) -> None:
    """What reads the set decodes as what has made it; a set of before has no word of it."""
    rng = np.random.default_rng(0)
    wide = {path: rng.integers(0, 4096, (8, 8)).astype(np.uint16) for path in photos.rglob("*.png")}
    for path, levels in wide.items():
        Image.fromarray(levels).save(path)
    unsaid = make(None, official_split=True)
    (line,) = said(unsaid)
    assert re.search(
        r"nearly black: the highest level of 20 images is 40\d\d of 65535; give data\.grey_levels, which is 4096", line
    )
    with pytest.warns(UserWarning, match="grey images of 16 bits a pixel are nearly black"):
        gan_images.prepare_images(unsaid, photos.parent / "train")
    assert "grey_levels" not in set_maker.settings_of(unsaid, list_examples(unsaid.data))["data"]
    config = make(None, official_split=True, grey_levels=4096)
    assert said(config) == []
    manifest = set_maker.make(config, torch.device("cpu"), print)
    folder = f"{config.output}/on_manifold_set"
    test = open_set(folder, "test", include_poor=True, images="natural")
    np.testing.assert_array_equal(test.natural[:, 0], [wide[photos / id] >> 4 for id in test.id])
    assert inspect_set(folder).sound
    run = {"config": {"data": manifest["data"]}, "channels": 1, "resolution": 8}
    for said_then, levels in ((manifest["data"], 4096), ({}, 65536)):
        run["config"] = {"data": said_then}
        assert prediction.read_as(run, DataConfig(), str(photos)).grey_levels == levels
    with pytest.raises(UserError, match=r"begun with data\.grey_levels = 4096, now it is its default"):
        set_settings.begin(Location(None, folder), set_maker.settings_of(unsaid, list_examples(unsaid.data)))


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


def test_images_that_cannot_be_read_are_told_before_the_search(make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many: else it is told at the end of a shard, which may be hours later, and may hold all images."""
    bad = [photos / "train" / "class0" / "04.png", photos / "train" / "class1" / "05.png"]
    kept = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(b"text")
    lines: list[str] = []
    config = make(None, official_split=True, max_rejected=0.05)
    with set_maker.begun(config, lines.append) as work:
        assert work is not None
        told = (
            "warning: 2 of 20 images cannot be read, more than data.max_rejected = 0.05, so that the set will not be finished; "
        )
        assert lines[-1].startswith(f"{told}the first: 'train/class0/04.png' cannot be read as an image: it begins with b'text'")
    monkeypatch.setattr(first_look, "SOME", 10)
    monkeypatch.setattr(first_look, "MOST_SECONDS", 0.0)
    with set_maker.begun(config, lines.append) as work:
        assert work is not None
        assert lines[-1] == "looking at 20 images", "for no longer than it may take"
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"2 of 20 images were rejected, more than data\.max_rejected = 0\.05"):
        set_maker.make(config, torch.device("cpu"), lines.append)
    lines.clear()
    monkeypatch.setattr(first_look, "MOST", 1)
    for data in ({"max_rejected": 0.05}, {"max_rejected": 0.1}):
        with set_maker.begun(make(None, official_split=True, **data), lines.append) as work:
            assert work is not None, "the two are left"
        monkeypatch.undo()
    assert not any(line.startswith("warning") for line in lines), "of so many none is looked at, or so many are allowed"
    for path, content in zip(bad, kept, strict=True):
        path.write_bytes(content)
    lines.clear()
    assert set_maker.make(config, torch.device("cpu"), lines.append)["count"] == 20
    assert not any(line.startswith("warning") for line in lines)


def test_little_of_a_large_file_is_read_before_the_search(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group is read from its beginning only; where a set is whole nothing is looked at."""
    source = tmp_path / "photos.parquet"
    images = [Image.fromarray(np.full((8, 8), k, np.uint16)) for k in range(1000)]
    encoded = []
    for image in images:
        image.save(buffer := io.BytesIO(), "png")
        encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": [0, 1] * 500}), source, row_group_size=100)
    config = make(None, source=str(source), train_limit=900)
    table = list_examples(config.data).table
    row = first_look.early(table, config.data, 64)["row"].to_numpy()
    assert len(row) == 64
    assert len({*row // 100}) == 8
    assert {0, 9} < {*row // 100}, "from the first group to the last"
    assert (row % 100).max() < 30, "of each the first few"
    assert "nearly black: the highest level of 64 images" in first_look.warning_of_dark(table, config.data)
    few = make(None, source=str(source), train_limit=10, test_limit=4)
    lines: list[str] = []
    set_maker.make(few, torch.device("cpu"), lines.append)
    assert sum("nearly black" in line for line in lines) == 1
    monkeypatch.setattr(first_look, "read", unreadable)
    lines.clear()
    set_maker.make(few, torch.device("cpu"), lines.append)
    assert lines[-1] == "the on-manifold set is whole and unchanged, nothing to do"
