"""What the tasks and the actor of a projection do to a shard, called by hand: images in, rows of the set out."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import png
from PIL import Image
from torch import Tensor

from dmat_ray.cluster import shard_tasks
from dmat_ray.cluster.shard_projector import project_shard
from dmat_ray.config import DataConfig, ProjectionConfig
from dmat_ray.data import set_format, set_reader, set_writer
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import StorageError, UserError
from dmat_ray.manifold.projection import Projection, Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.storage import at

RowsOf = Callable[..., dict[str, dict[str, Any]]]
IDS = [f"{label}/{name}.png" for label in "ab" for name in ("flat", "made", "noise")]


class Unlucky(Projector):
    """A projector whose errors of the first image are no numbers."""

    def project(self, x_BCHW: Tensor, ids: list[str]) -> Projection:
        found = super().project(x_BCHW, ids)
        found.l1_B[0] = found.lpips_B[0] = float("nan")
        return found


class GivesUp(Projector):
    """A projector whose search of the first image broke off."""

    def project(self, x_BCHW: Tensor, ids: list[str]) -> Projection:
        found = super().project(x_BCHW, ids)
        found.given_up_B[0] = True
        return found


@pytest.fixture
def shard(generator: StyleGAN2, tmp_path: Path) -> pa.Table:
    """Six images that the generator makes well, hardly and not at all, and one that is no image, as read from their files."""
    rng = np.random.default_rng(0)
    made = made_by(generator)
    for label in "ab":
        (tmp_path / label).mkdir()
        contents = {"flat": np.full((8, 8), 128, np.uint8), "made": made, "noise": rng.integers(0, 256, (8, 8), dtype=np.uint8)}
        for name, pixels in contents.items():
            (tmp_path / label / f"{name}.png").write_bytes(png(pixels))
    (tmp_path / "b" / "empty.png").touch()
    config = DataConfig(source=str(tmp_path), resolution=8, channels=1, test_share=0.3)
    listing = list_examples(config)
    (planned,) = set_writer.plan(listing, 100)
    return shard_tasks.read_shard(shard_tasks.pack(planned.name, planned.rows, {}), data=config.model_dump())


def made_by(generator: StyleGAN2) -> np.ndarray:
    """An image that the generator makes, as pixels."""
    x = generator.synthesis(generator.mapping(torch.randn(1, generator.z_dim, generator=torch.Generator().manual_seed(3))))
    return np.asarray((x * 255).round().to(torch.uint8)[0, 0])


@pytest.fixture
def rows_of(generator: StyleGAN2, shard: pa.Table) -> RowsOf:
    """The rows of the set by id, under these settings."""

    def project(kind: type[Projector] = Projector, **values: object) -> dict[str, dict[str, Any]]:
        settings = ProjectionConfig.model_validate({"lpips": 0, "l1": 10, "l2": 50, "steps": 20, "noise": 0, **values})
        projector = kind(generator, settings, torch.device("cpu"))
        row = project_shard(projector, shard, settings, ["a", "b"])
        _, table, rejected = shard_tasks.unpack(row)
        assert rejected.keys() == {"b/empty.png"}
        return {r["id"]: r for r in table.to_pylist()}

    return project


def test_a_machine_that_sees_none_of_the_images_says_so_and_rejects_none(tmp_path: Path) -> None:
    """One that is gone is rejected; a folder that is not mounted says nothing of its images."""
    folder = tmp_path / "photos"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(3):
            (folder / label / f"{i}.png").write_bytes(png(np.full((8, 8), 40 * i, np.uint8)))
    config = DataConfig(source=str(folder), resolution=8, channels=1, test_share=0.3)
    (planned,) = set_writer.plan(list_examples(config), 100)
    row = shard_tasks.pack(planned.name, planned.rows, {})
    (folder / "a" / "1.png").unlink()
    assert shard_tasks.unpack(shard_tasks.read_shard(row, data=config.model_dump()))[2].keys() == {"a/1.png"}
    folder.rename(tmp_path / "elsewhere")
    for task in (shard_tasks.read_shard, shard_tasks.read_pictures):
        with pytest.raises(
            StorageError, match=rf"sees none of the files .* '{folder}/a/0\.png'; mount their folder on all nodes"
        ):
            task(row, data=config.model_dump())


def test_rows_carry_what_was_read_and_what_was_found(rows_of: RowsOf) -> None:
    rows = rows_of()
    assert sorted(rows) == IDS
    assert [rows[i]["label"] for i in IDS] == [0, 0, 0, 1, 1, 1]
    assert {r["split"] for r in rows.values()} == {"train", "test"}
    for row in rows.values():
        stored = np.frombuffer(row["on_manifold"]["bytes"][-64:], np.uint8) / 255
        natural = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).ravel() / 255
        assert abs(np.abs(stored - natural).mean() - row["l1"]) <= 1 / 255


def test_images_beyond_a_threshold_are_poor_and_kept(rows_of: RowsOf) -> None:
    errors = {id: row["l1"] for id, row in rows_of(poor_l1=10).items()}
    ranked = sorted(IDS, key=lambda id: errors[id])
    for most in (ranked[0], ranked[3]):
        # the threshold itself is still good: the largest error that counts as ok is stored in the set's own float32
        found = rows_of(poor_l1=errors[most])
        assert {id for id in IDS if found[id]["status"] == "ok"} == {id for id in IDS if errors[id] <= errors[most]}
    assert {row["status"] for row in rows_of(poor_l1=10).values()} == {"ok"}
    assert {row["status"] for row in rows_of(poor_l1=1e-6).values()} == {"poor"}


def test_errors_that_are_no_numbers_are_poor(rows_of: RowsOf) -> None:
    for thresholds in ({"poor_l1": 10}, {"poor_l1": 10, "poor_lpips": 10}):
        found = rows_of(Unlucky, **thresholds)
        assert [row["status"] for row in found.values()] == ["poor"] + ["ok"] * 5


def test_an_image_whose_search_broke_off_is_poor_and_told_by_its_shard(
    generator: StyleGAN2, shard: pa.Table, tmp_path: Path
) -> None:
    settings = ProjectionConfig(lpips=0, steps=2, poor_l1=10)
    for kind, most in ((GivesUp, 1), (Projector, 0)):
        row = project_shard(kind(generator, settings, torch.device("cpu")), shard, settings, ["a", "b"])
        shard_tasks.write_shard(row, folder=str(tmp_path / kind.__name__))
        name, table, _ = shard_tasks.unpack(row)
        assert table["status"].to_pylist() == ["poor"] * most + ["ok"] * (6 - most)
        record = set_writer.read_record(at(tmp_path / kind.__name__), name)
        assert record is not None
        assert record.given_up == most


@pytest.mark.parametrize(
    ("l1", "lpips", "most_lpips", "poor"),
    [
        (0.1, 9.0, None, False),
        (0.11, 0.0, None, True),
        (0.1, 0.3, 0.3, False),
        (0.1, 0.31, 0.3, True),
        (0.11, 0.0, 0.3, True),
        (float("inf"), 0.0, None, True),
        (float("nan"), 0.0, None, True),
        (0.0, float("nan"), 0.3, True),
        (0.0, float("nan"), None, False),
    ],
)
def test_both_thresholds_count(l1: float, lpips: float, most_lpips: float | None, poor: bool) -> None:
    found = set_format.is_poor(np.float32([l1]), np.float32([lpips]), 0.1, most_lpips)
    assert found.tolist() == [poor]


def test_a_flipped_bit_in_a_shard_of_ours_is_found(set_folder: Path, tmp_path: Path) -> None:
    """Of codes w, which are not compressed: nothing but their checksum would tell."""
    folder, name = at(tmp_path), "part-000000.parquet"
    table = set_reader.read_shard(at(set_folder), name)
    set_writer.write_shard(folder, name, table, {})
    path, w = tmp_path / "shards" / name, table["w"].combine_chunks().flatten().to_numpy()
    content = bytearray(path.read_bytes())
    content[content.index(w[:4].tobytes()) + 5] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        set_reader.read_shard(folder, name)
