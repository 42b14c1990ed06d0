"""Rows and images of an on-manifold set, as plain pyarrow and Pillow read them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MakeSet = Callable[..., Path]


def edit_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows, sorted by id, through plain pyarrow."""
    tables = [pq.read_table(path) for path in (folder / "shards").glob("*.parquet")]
    return pa.concat_tables(tables).sort_by("id").to_pylist()


def pixels_of(value: Any) -> np.ndarray:
    """A stored image as Pillow reads it: (C, H, W)."""
    with Image.open(io.BytesIO(value["bytes"])) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
