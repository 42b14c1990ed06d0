"""What a finished evaluation leaves in its folder: rows, what the checks found, and, last, what both depend on."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dmat_ray.evaluation.checks import Finding
from dmat_ray.storage import Location, Place, at

ROWS, DONE, CHECKS = "rows.parquet", "evaluation.json", "checks.json"
LEFT_OUT = "left_out"  # what DONE says for readers beside what the rows depend on


def made_for(folder: Place) -> dict[str, Any] | None:
    """What the rows in `folder` depend on, and LEFT_OUT; None where no evaluation has finished."""
    path = at(folder) / DONE
    return path.read_json() if path.is_file() else None


def is_evaluated(depends_on: dict[str, Any], folder: Place) -> bool:
    """True if `folder` holds the rows of exactly this, a fingerprint of what they depend on."""
    found = made_for(folder)
    return found is not None and {key: value for key, value in found.items() if key != LEFT_OUT} == depends_on


def read_rows(folder: Place) -> pa.Table:
    """The rows of a finished evaluation."""
    return read_parquet(at(folder) / ROWS)


def read_checks(folder: Place) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Measurements and findings of a finished evaluation."""
    content = (at(folder) / CHECKS).read_json()
    return content["measurements"], [Finding(**finding) for finding in content["findings"]]


def read_parquet(file: Location) -> pa.Table:
    """The table in a Parquet file, at a path or URL."""
    return pq.read_table(pa.BufferReader(file.read_bytes()))
