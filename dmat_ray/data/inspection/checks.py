"""What an inspection notes, and the manifest key by key."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError

from dmat_ray.cli import describe
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.storage import Location

MOST_DEFECTS = 20  # lines of one check
CHECKS = {
    "manifest": "the manifest is there, of this version and complete",
    "shards": "every shard is there, can be read, and has its rows; no others",
    "schema": "columns and metadata of the shards",
    "values": "labels, errors, steps and status are ones that can be",
    "ids": "no id twice",
    "rejected": "rejected images are not in the set, and every shard's are in the manifest",
    "counts": "rows by split and status",
    "means": "mean errors",
    "status": "poor is what lies above the thresholds",
    "w": "w is finite",
    "g(w)": "stored g(w) are netpbm images of the right size",
    "natural": "natural images can be decoded",
    "errors": "stored images are as far apart as l1 and l2 say",
    "generator": "the generator is the one that made the set",
    "rendering": "the generator makes of w what is stored",
}

Name = Annotated[str, StringConstraints(pattern=r"^[^/\\]+\.parquet$")]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class Shapes(BaseModel):
    """Shapes in a manifest: (C, H, W) of images, (L, D) of w."""

    model_config = ConfigDict(strict=True)
    on_manifold: Annotated[list[Size], Field(min_length=3, max_length=3)]
    w: Annotated[list[Size], Field(min_length=2, max_length=2)]


class Thresholds(BaseModel):
    """What a manifest's projection settings say of errors and steps; the rest of them is only shown."""

    model_config = ConfigDict(strict=True, extra="allow")
    poor_l1: float
    poor_lpips: float | None = None
    steps: int | None = None


class Manifest(BaseModel):
    """A manifest, key by key."""

    model_config = ConfigDict(strict=True, extra="allow")
    data: dict[str, Any]
    projection: Thresholds
    generator: str | None = None
    generator_sha256: str
    generator_precision: Literal["reference", "fast", "bf16"]
    class_names: Annotated[list[str], Field(min_length=1)]
    shards: dict[Name, Count]
    shapes: Shapes
    count: Count
    splits: dict[str, Count]
    status: dict[str, Count]
    usable: dict[str, Count]
    means: dict[str, FiniteFloat]
    lpips_is_perceptual: bool
    rejected: dict[str, str]
    versions: dict[str, str]
    examples: Count | None = None


@dataclass
class Check:
    """One check: what was found in numbers, and a line for each defect. Without either, it was not made."""

    name: str
    detail: str = ""
    defects: list[str] = field(default_factory=list)
    more: int = 0

    @property
    def state(self) -> str:
        """'ok', 'failed' or 'not made'."""
        return "failed" if self.defects else ("ok" if self.detail else "not made")

    def defect(self, line: str) -> None:
        """Note a defect; after MOST_DEFECTS lines only their number."""
        if len(self.defects) < MOST_DEFECTS:
            self.defects.append(line)
        else:
            self.more += 1

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Inside, whatever goes wrong is a defect: damaged files raise anything."""
        try:
            yield
        except Exception as error:
            self.defect(f"{what}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def read_checked_manifest(folder: Location, check: Check) -> Manifest | None:
    """The manifest, if it can be read at all."""
    try:
        manifest = Manifest.model_validate(read_manifest(folder))
    except ValidationError as error:
        for part in describe(error).split("; "):
            check.defect(part)
        return None
    except Exception as error:
        check.defect(first_line(error))
        return None
    channels, height, width = manifest.shapes.on_manifold
    if channels not in (1, 3) or height != width:
        check.defect(f"shapes.on_manifold: {manifest.shapes.on_manifold} is no shape of square grey or RGB images")
        return None
    check.detail = f"{manifest.count} images in {len(manifest.shards)} shards, {len(manifest.rejected)} rejected"
    return manifest
