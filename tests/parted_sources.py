"""Folders and Parquet files of several parts, and how they are listed."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmat_ray.data.sources import Listing, list_examples
from dmat_ray.errors import UserError
from dmat_ray.validated import validate


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level % 256).save(buffer, format="PNG")
    return buffer.getvalue()


def tree(root: Path, *folders: str, each: int = 4) -> Path:
    """A folder with so many images in each of these."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(each):
            (root / folder / f"{i}.png").write_bytes(png(i))
    return root


def shards(root: Path, *names: str, labels: tuple[int, ...] = (0, 1, 0, 1), column: str = "label") -> Path:
    """Parquet files of these names, each image of a grey level of its own."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images = [png(10 * k + i) for i in range(len(labels))]
        pq.write_table(pa.table({"image": images, column: labels}), root / name)
    return root


def listed(source: Path, *, labelled: bool = True, **settings: Any) -> Listing:
    config = validate({"data": {"source": str(source), "resolution": 8, **settings}}).data
    return list_examples(config, labelled=labelled)


def refused(source: Path, message: str, *, labelled: bool = True, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, labelled=labelled, **settings)
    assert "\n" not in str(told.value)


def tops(listing: Listing, split: str) -> set[str]:
    return {id.split("/")[0] for id in listing.rows(split)["id"].to_pylist()}
