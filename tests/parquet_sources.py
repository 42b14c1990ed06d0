"""Sources of Parquet, as others write it, and how they are listed."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmat_ray.config import DataConfig
from dmat_ray.data.sources import Listing, list_examples
from dmat_ray.errors import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, format="PNG")
    return buffer.getvalue()


def images(count: int, start: int = 0) -> list[bytes]:
    return [png(i % 256) for i in range(start, start + count)]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def listed(source: object, **settings: Any) -> tuple[Listing, DataConfig]:
    config = DataConfig(source=str(source), resolution=8, **settings)
    return list_examples(config), config


def refused(source: object, message: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, **settings)
    assert "\n" not in str(told.value)
