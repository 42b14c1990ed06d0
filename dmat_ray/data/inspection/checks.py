"""What an inspection notes, and the manifest key by key."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from dmat_ray.data.manifest import Count, Described
from dmat_ray.data.set_reader import manifest_as_it_is
from dmat_ray.errors import first_line
from dmat_ray.storage import Location
from dmat_ray.validated import describe
from dmat_ray.wording import number_of

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
    "status": "poor is what lies above the thresholds, or was given up",
    "w": "w is finite",
    "g(w)": "stored g(w) are netpbm images of the right size",
    "natural": "natural images can be decoded",
    "errors": "stored images are as far apart as l1 and l2 say",
    "generator": "the generator is the one that made the set",
    "rendering": "the generator makes of w what is stored",
}

Name = Annotated[str, StringConstraints(pattern=r"^[^/\\]+\.parquet$")]


class Thresholds(BaseModel):
    """What a manifest's projection settings say of errors and steps; the rest of them is only shown."""

    model_config = ConfigDict(strict=True, extra="allow")
    poor_l1: float
    poor_lpips: float | None = None
    steps: int | None = None


class Manifest(Described):
    """A manifest with what only an inspection looks up."""

    projection: Thresholds
    generator: str | None = None
    generator_precision: Literal["reference", "fast", "bf16"]
    shards: dict[Name, Count]
    lpips_is_perceptual: bool
    examples: Count | None = None
    given_up: Count = 0


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


def read_checked_manifest(folder: Location, check: Check) -> Manifest | None:
    """The manifest, if it can be read at all."""
    try:
        manifest = Manifest.model_validate(manifest_as_it_is(folder))
    except ValidationError as error:
        for part in describe(error).split("; "):
            check.defect(part)
        return None
    except Exception as error:
        check.defect(first_line(error))
        return None
    held = f"{number_of(manifest.count, 'image')} in {number_of(len(manifest.shards), 'shard')}"
    check.detail = f"{held}, {len(manifest.rejected)} rejected"
    return manifest
