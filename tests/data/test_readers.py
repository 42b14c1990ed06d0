"""Anybody's tools read a set: plain pyarrow, pandas with Pillow, Hugging Face datasets, each with the same pixels and names."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png, write_set
from PIL import Image
from pyarrow import dataset

from dmat_ray.data import set_format, set_reader

pytestmark = pytest.mark.slow

NAMES = ['a "quoted" name', "it's", "<b>bold & wide</b>", "ünïcødé – 猫", "a/b\\c"]


def write_by_schema(folder: Path) -> Path:
    """Colour shards written with our schema and our netpbm: rejected images in the metadata, and a shard without rows."""
    schema, rng = set_format.schema(3, 8, 2, 7, NAMES), np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    for k, count in enumerate((4, 0, 3)):
        natural, rendered = (rng.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8) for _ in range(2))
        columns: dict[str, Any] = {
            "id": [f"{k}/{i} ü" for i in range(count)],
            "split": ["train"] * count,
            "label": [(k + i) % len(NAMES) for i in range(count)],
            "image": [{"bytes": png(x.transpose(1, 2, 0)), "path": f"{k}/{i}.png"} for i, x in enumerate(natural)],
            "on_manifold": set_format.to_netpbm(rendered),
            "w": set_format.fixed_list(rng.standard_normal((count, 2, 7)).astype(np.float32), pa.float32()),
            **{name: rng.random(count).astype(np.float32) for name in ("lpips", "l1", "l2")},
            "steps": [100] * count,
            "status": ["ok"] * count,
        }
        metadata = {**schema.metadata, b"dmat_ray_rejected": json.dumps({f"{k}/x": "is cut"}).encode()}
        with pq.ParquetWriter(folder / "shards" / f"part-{k:06d}.parquet", schema.with_metadata(metadata)) as writer:
            if count:  # a row group without rows stops Hugging Face datasets
                writer.write_table(pa.table(columns, schema=schema))
    return folder


@pytest.fixture(scope="module", params=["by hand", "by schema"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> Path:
    """The folder of the shards of a set."""
    folder = tmp_path_factory.mktemp("set") / "on_manifold_set"
    made = write_set(folder, generator_folder, class_names=NAMES) if request.param == "by hand" else write_by_schema(folder)
    return made / "shards"


def plain(shards: Path) -> list[dict[str, Any]]:
    """All rows, a file at a time."""
    rows: list[dict[str, Any]] = []
    for path in sorted(shards.glob("*.parquet")):
        rows += pq.ParquetFile(path).read(use_threads=False).to_pylist()
    return rows


def pixels(value: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(value["bytes"])) as image:
        return np.asarray(image)


def test_documented_format_is_that_of_the_schema(
    tmp_path: Path, generator_folder: Path, make_generator: Callable[..., Any]
) -> None:
    """conftest writes the format down independently: both must say the same, metadata included."""
    path = write_set(tmp_path / "set", generator_folder, class_names=NAMES) / "shards" / "part-000000.parquet"
    generator = make_generator()
    ours = set_format.schema(1, 8, generator.num_ws, generator.w_dim, NAMES)
    theirs = pq.read_schema(path)
    assert theirs.equals(ours)
    for key in (b"dmat_ray", b"huggingface"):
        assert json.loads(theirs.metadata[key]) == json.loads(ours.metadata[key])
    assert set_reader.schema_of(set_reader.read_manifest(tmp_path / "set")).equals(ours, check_metadata=True)


def test_pyarrow_reads_the_folder_as_one_table(shards: Path) -> None:
    rows = plain(shards)
    for table in (pq.read_table(shards), dataset.dataset(shards).to_table()):
        assert table.to_pylist() == rows
        shapes = json.loads(table.schema.metadata[b"dmat_ray"])["shapes"]
        w = np.stack(table["w"].to_numpy()).reshape(-1, *shapes["w"])
        np.testing.assert_array_equal(w.reshape(len(rows), -1), np.array([r["w"] for r in rows], np.float32))
        channels, height, width = shapes["on_manifold"]
        assert {pixels(r["on_manifold"]).shape for r in rows} == {(height, width, channels)[: 2 + (channels > 1)]}


def test_pandas_reads_the_folder(shards: Path) -> None:
    frame, rows = pd.read_parquet(shards), plain(shards)
    assert frame["id"].tolist() == [r["id"] for r in rows]
    assert {w.dtype for w in frame["w"]} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.stack(frame["w"].tolist()), np.array([r["w"] for r in rows], np.float32))
    for column in ("image", "on_manifold"):
        for value, row in zip(frame[column], rows, strict=True):
            np.testing.assert_array_equal(pixels(value), pixels(row[column]))
    assert frame["l1"].dtype == np.float32


HUGGING_FACE = """
import io, json, sys
import numpy as np
from datasets import ClassLabel, Image, load_dataset
from torch.utils.data import DataLoader
shards, cache = sys.argv[1:]
files = {"data_files": shards + "/*.parquet", "split": "train"}
for how in ({"cache_dir": cache}, {"cache_dir": cache, "streaming": True}):
    data = load_dataset("parquet", **files, **how)
    features = data.features
    assert isinstance(features["image"], Image) and isinstance(features["on_manifold"], Image), features
    assert isinstance(features["label"], ClassLabel), features
    rows = [
        {
            "id": row["id"],
            "name": features["label"].int2str(row["label"]),
            "image": np.asarray(row["image"]).tolist(),
            "on_manifold": np.asarray(row["on_manifold"]).tolist(),
            "w": row["w"],
            "l1": row["l1"],
        }
        for row in data
    ]
    print(json.dumps(rows))
whole = load_dataset("parquet", **files, cache_dir=cache).select_columns(["w", "label"]).with_format("torch")
batches = list(DataLoader(whole, batch_size=3))
w, labels = ([value for batch in batches for value in batch[key].tolist()] for key in ("w", "label"))
print(json.dumps([w, labels, str(batches[0]["w"].dtype)]))
"""


def test_hugging_face_datasets_show_images_and_class_names(shards: Path, tmp_path: Path) -> None:
    """In a process of its own, which cannot reach the network and knows nothing of our code."""
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, str(shards), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | offline,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cached, streamed, (w, labels, dtype) = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    rows = plain(shards)
    expected = [
        {
            "id": r["id"],
            "name": NAMES[r["label"]],
            "image": pixels(r["image"]).tolist(),
            "on_manifold": pixels(r["on_manifold"]).tolist(),
            "w": r["w"],
            "l1": r["l1"],
        }
        for r in rows
    ]
    assert cached == expected
    assert streamed == expected
    assert (w, labels, dtype) == ([r["w"] for r in rows], [r["label"] for r in rows], "torch.float32")
