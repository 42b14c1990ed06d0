"""What a look at some of the images tells before a search: dark ones, and those that cannot be read."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from set_photos import Make, parted_photos, said, settings_maker, unreadable

from dmat_ray.config import DataConfig
from dmat_ray.data import first_look, set_settings
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import open_set
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_images, set_maker
from dmat_ray.models import prediction
from dmat_ray.storage import Location


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return parted_photos(tmp_path / "photos")


@pytest.fixture
def make(photos: Path, tmp_path: Path, generator_folder: Path) -> Make:
    return settings_maker(photos, tmp_path, generator_folder)


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
