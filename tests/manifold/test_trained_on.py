"""Whether a generator was trained on the test images of a set is told before the set is begun."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_folders import png
from PIL import Image
from set_photos import PLAIN, Make, parted_photos, said, settings_maker, unreadable

from dmat_ray import settings
from dmat_ray.config import Config, DataConfig
from dmat_ray.data import reading, sources
from dmat_ray.data.digits import digits
from dmat_ray.data.sources import list_examples
from dmat_ray.manifold import gan_images, generators, set_maker, trained_on


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return parted_photos(tmp_path / "photos")


@pytest.fixture
def make(photos: Path, tmp_path: Path, generator_folder: Path) -> Make:
    return settings_maker(photos, tmp_path, generator_folder)


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
        return reading.read_pixels(rows, data)

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
        return reading.read_pixels(rows, data)

    monkeypatch.setattr(trained_on, "read_pixels", noting)
    monkeypatch.setattr(trained_on, "LOOKED_AT", 3)
    assert said(other) == []
    assert len(decoded) == 3
    monkeypatch.setattr(trained_on, "read_pixels", unreadable)
    monkeypatch.setattr(trained_on, "_compared", {})
    (line,) = said(other)
    assert "warning: test images may be among" in line


@pytest.mark.parametrize("column", ["image", "img"])
def test_images_of_another_column_are_known_by_their_pixels(
    after_training: Callable[..., Config], photos: Path, tmp_path: Path, column: str
) -> None:
    """The generator learned from files, or from a column called otherwise: the settings of here say where the images are."""
    config = after_training(True, official_split=False, test_share=0.25)
    before = {(photos / id).read_bytes() for id in ids(config, "train")}
    encoded = [path.read_bytes() for path in sorted((photos / "train").rglob("*.png"))]
    source, labels = tmp_path / "all.parquet", [k % 2 for k in range(len(encoded))]
    # two columns of images in one file are two sets of test images
    pq.write_table(pa.table({column: encoded, "grey": [png(k) for k in range(len(encoded))], "label": labels}), source)
    how = {"source": str(source), "official_split": None, "seed": 1, "test_share": 0.5}
    other = config.model_copy(update={"data": config.data.model_copy(update={**how, "image_column": "grey"})})
    assert said(other) == []
    other = config.model_copy(update={"data": config.data.model_copy(update={**how, "image_column": column})})
    test = [encoded[row] in before for row in list_examples(other.data).rows("test")["row"].to_pylist()]
    assert 0 < sum(test) < len(test)
    (line,) = said(other)
    assert f"{sum(test)} of {len(test)} test images are among" in line


def test_images_of_which_none_can_be_read_may_be_those(
    after_training: Callable[..., Config], photos: Path, tmp_path: Path
) -> None:
    config = after_training(True, official_split=False, test_share=0.25)
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    for path in moved.rglob("*.png"):
        path.write_bytes(b"text")
    data = config.data.model_copy(update={"source": str(moved), "seed": 1, "test_share": 0.5, "max_rejected": 1})
    (line,) = said(config.model_copy(update={"data": data}))
    assert "warning: test images may be among" in line


def test_digits_elsewhere_are_known_to_a_generator_of_the_embedded_ones(tmp_path: Path) -> None:
    """Which lie on black for it, as `data.resize` pad puts files of 28x28, whatever the set is made with."""
    generator = tmp_path / "generator"
    shutil.copytree(generators.folder_of("mnist32"), generator)
    card = json.loads((generator / "card.json").read_text())
    unpadded = digits(28)
    few = {"train_limit": 300, "test_limit": 100}
    theirs = settings("demo", data=few, gan={"architecture": card["architecture"]}, generator={"path": str(generator)})
    cache = gan_images.prepare_images(theirs, tmp_path / "train")
    (generator / "card.json").write_text(json.dumps(card | gan_images.card_of(theirs, cache)))
    shutil.copyfile(cache.folder / "images.parquet", generator / "images.parquet")
    numbers = {split: [int(id.split("-")[1]) for id in ids(theirs, split)] for split in ("train", "test")}
    for number in numbers["train"] + numbers["test"]:
        path = tmp_path / "digits" / str(unpadded.labels[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(unpadded.files[number].as_py())
    for resize in ("pad", "crop"):
        data = {"source": str(tmp_path / "digits"), "resize": resize, "train_limit": None, "test_limit": None}
        config = settings("demo", data=data, generator={"path": str(generator)}, projection=PLAIN)
        test = {int(Path(id).stem) for id in ids(config, "test")}
        seen = test & set(numbers["train"])
        assert 40 < len(seen) < len(test) == 80
        (line,) = said(config)
        assert f"{len(seen)} of 80 test images are among" in line


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
