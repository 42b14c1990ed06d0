"""What is looked at before a set is begun: room in its files, and whether the generator was trained on its test images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmat_ray import settings
from dmat_ray.config import Config
from dmat_ray.data import set_format, sources
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import set_maker

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
        values = {"data": {"source": str(photos), "resolution": 8, **data}, "generator": {"path": str(folder)}}
        return Config.model_validate({**values, "projection": PLAIN, "output": str(tmp_path / "out")})

    return made


def said(config: Config) -> list[str]:
    """The warnings of a projection before it begins."""
    lines: list[str] = []
    set_maker.prepare(config, lines.append)
    return [line for line in lines if line.startswith("warning")]


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
