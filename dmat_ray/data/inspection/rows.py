"""The first pass of an inspection: what is small of every row, and how it fits the manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dmat_ray.data.inspection.checks import Check, Manifest
from dmat_ray.data.set_format import ERRORS, GIVEN_UP_IDS, REJECTED, SHARDS, different_columns, is_poor
from dmat_ray.data.set_reader import schema_of
from dmat_ray.storage import Location

NUMBERS = ("label", *ERRORS, "steps")
SMALL = ("id", "split", *NUMBERS, "status")
KEY_BYTES = 8  # of a million ids no two agree in them, but for one set in forty million; then the ids themselves decide


@dataclass(frozen=True)
class Rows:
    """The small columns of all rows that can be read, in the order of shards; `shard` is a position in `names`."""

    names: tuple[str, ...]
    shard: np.ndarray
    row: np.ndarray
    label: np.ndarray
    ok: np.ndarray
    lpips: np.ndarray
    l1: np.ndarray
    l2: np.ndarray
    steps: np.ndarray
    key: np.ndarray  # `id_key` of the id

    def __len__(self) -> int:
        return len(self.key)

    def valid(self, num_classes: int) -> np.ndarray:
        """Mask of the rows whose class and errors can be."""
        fine = (self.label >= 0) & (self.label < num_classes)
        return np.asarray(fine & np.isfinite(self.lpips) & np.isfinite(self.l1) & np.isfinite(self.l2))


class Reader:
    """The first pass: reads the small columns of a shard at a time, and checks what one shard shows."""

    def __init__(self, folder: Location, manifest: Manifest, checks: dict[str, Check]) -> None:
        self.folder, self.manifest, self.checks = folder, manifest, checks
        self.schema = schema_of(manifest.model_dump())
        self.names = tuple(sorted(manifest.shards))
        self.parts: list[dict[str, np.ndarray]] = []
        self.counted: Counter[tuple[str, str]] = Counter()
        self.recorded: dict[str, str] = {}
        self.with_record = self.read = self.given_up = 0

    def run(self) -> Rows:
        """Read all shards."""
        check = self.checks["shards"]
        with check.guard("shards"):
            for name in sorted({found.name for found in (self.folder / SHARDS).files()} - set(self.names)):
                check.defect(f"{name} is not in the manifest")
        for k, name in enumerate(self.names):
            with check.guard(name):
                self._shard(k, name)
        columns = {key: np.concatenate([part[key] for part in self.parts]) for key in self.parts[0]} if self.parts else None
        rows = Rows(self.names, **(columns or {key: np.empty(0) for key in ("shard", "row", "key", "ok", *NUMBERS)}))
        check.detail = f"{self.read} of {len(self.names)} read, {len(rows)} rows"
        return rows

    def _shard(self, k: int, name: str) -> None:
        with open_shard(self.folder, name) as parquet:
            rows, wanted = parquet.metadata.num_rows, self.manifest.shards[name]
            if rows != wanted:
                self.checks["shards"].defect(f"{name} has {rows} rows, the manifest says {wanted}")
            self._schema(name, parquet)
            if different_columns(parquet.schema_arrow, self.schema):
                return
            parts, start = [], 0
            given_up = self._given_up(name, parquet)
            for batch in parquet.iter_batches(batch_size=1 << 16, columns=list(SMALL)):
                parts.append(self._batch(k, name, start, batch, given_up))
                start += batch.num_rows
        self.parts += parts  # of a whole shard or of none of it
        self.read += 1

    def _schema(self, name: str, parquet: pq.ParquetFile) -> None:
        check, metadata = self.checks["schema"], parquet.schema_arrow.metadata or {}
        if odd := different_columns(parquet.schema_arrow, self.schema):
            check.defect(f"{name}: {odd}")
        for key, text in self.schema.metadata.items():
            with check.guard(f"{name}: metadata '{key.decode()}'"):
                if json.loads(metadata.get(key, b"null")) != json.loads(text):
                    check.defect(f"{name}: metadata '{key.decode()}' is not what the manifest's shapes and class names make it")
        check.detail = f"{len(self.schema)} columns"
        if (record := (parquet.metadata.metadata or {}).get(REJECTED)) is not None:
            with self.checks["rejected"].guard(f"{name}: metadata '{REJECTED.decode()}'"):
                self.recorded |= {str(id): str(reason) for id, reason in json.loads(record).items()}
                self.with_record += 1

    def _given_up(self, name: str, parquet: pq.ParquetFile) -> frozenset[str]:
        """Ids of the images whose search broke off, as the shard has them."""
        found: frozenset[str] = frozenset()
        with self.checks["status"].guard(f"{name}: metadata '{GIVEN_UP_IDS.decode()}'"):
            found = frozenset(map(str, json.loads((parquet.metadata.metadata or {}).get(GIVEN_UP_IDS, b"[]"))))
        self.given_up += len(found)
        return found

    def _batch(self, k: int, name: str, start: int, batch: pa.RecordBatch, given_up: frozenset[str]) -> dict[str, np.ndarray]:
        if nulls := [column for column in SMALL if batch[column].null_count]:
            raise ValueError(f"no value in {', '.join(nulls)}")
        ids = batch["id"].to_pylist()
        found: dict[str, np.ndarray] = {key: batch[key].to_numpy().copy() for key in NUMBERS}
        ok = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
        self.counted.update(zip(batch["split"].to_pylist(), batch["status"].to_pylist(), strict=True))
        for id in ids:
            if id in self.manifest.rejected:
                self.checks["rejected"].defect(f"{name}: '{id}' is in the set, and rejected")
        self._values(name, ids, found, batch["status"].to_pylist())
        self._status(name, ids, found, ok, np.array([id in given_up for id in ids], bool))
        count = len(ids)
        place = {"shard": np.full(count, k, np.int32), "row": np.arange(start, start + count, dtype=np.int32)}
        return {**place, **found, "ok": ok, "key": np.array([id_key(id) for id in ids], np.uint64)}

    def _values(self, name: str, ids: list[str], found: Mapping[str, np.ndarray], status: list[str]) -> None:
        classes, most = len(self.manifest.class_names), self.manifest.projection.steps
        wrong = {"label": (found["label"] < 0) | (found["label"] >= classes), "steps": found["steps"] < 0}
        if most is not None:
            wrong["steps"] |= found["steps"] > most
        wrong |= {error: ~(np.isfinite(found[error]) & (found[error] >= 0)) for error in ERRORS}
        for key, bad in wrong.items():
            for i in np.flatnonzero(bad):
                self.checks["values"].defect(f"{name}: {key} of '{ids[i]}' is {found[key][i]}")
        for id, value in zip(ids, status, strict=True):
            if value not in ("ok", "poor"):
                self.checks["values"].defect(f"{name}: status of '{id}' is '{value}'")

    def _status(self, name: str, ids: list[str], found: Mapping[str, np.ndarray], ok: np.ndarray, given_up: np.ndarray) -> None:
        fine = ~is_poor(found["l1"], found["lpips"], self.manifest.projection.poor_l1, self.manifest.projection.poor_lpips)
        fine &= ~given_up
        for i in np.flatnonzero(fine != ok):
            errors = f"l1 {found['l1'][i]:.4f}, lpips {found['lpips'][i]:.4f}{', given up' if given_up[i] else ''}"
            self.checks["status"].defect(f"{name}: '{ids[i]}' should be {'ok' if fine[i] else 'poor'} ({errors})")


@contextmanager
def open_shard(folder: Location, name: str) -> Iterator[pq.ParquetFile]:
    """A shard, its pages checked against their checksums where it has them."""
    with (folder / SHARDS / name).open() as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        yield parquet


def id_key(id: str) -> int:
    """A number that stands for an id, and seldom for two."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=KEY_BYTES).digest(), "little")


def compare_with_manifest(reader: Reader, rows: Rows) -> None:
    """The checks of the whole set, after the first pass."""
    manifest, checks = reader.manifest, reader.checks
    for name, text in (("values", "all in range"), ("status", f"thresholds: l1 {manifest.projection.poor_l1}")):
        checks[name].detail = f"{len(rows)} rows, {text}"
    if manifest.projection.poor_lpips is not None:
        checks["status"].detail += f", lpips {manifest.projection.poor_lpips}"
    with checks["ids"].guard("ids"):
        _ids(reader, rows)
    with checks["rejected"].guard("rejected"):
        _rejected(reader, rows)
    if reader.read < len(reader.names):
        return  # of a part, totals say nothing
    found = {"count": len(rows), **_counts(reader.counted), "given_up": reader.given_up}
    for key, value in found.items():
        if value != (said := getattr(manifest, key)):
            checks["counts"].defect(f"{key}: the rows give {_shown(value)}, the manifest says {_shown(said)}")
    checks["counts"].detail = f"{_shown(found['splits'])}; {_shown(found['status'])}"
    if manifest.examples is not None and manifest.examples != len(rows) + len(manifest.rejected):
        checks["counts"].defect(
            f"{len(rows)} rows and {len(manifest.rejected)} rejected are not the {manifest.examples} images of the source"
        )
    _means(manifest, rows, checks["means"])


def _counts(counted: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = {"splits": Counter(), "status": Counter(), "usable": Counter()}
    for (split, status), count in counted.items():
        totals["splits"][split] += count
        totals["status"][status] += count
        totals["usable"][split] += count if status == "ok" else 0
    return {key: {name: n for name, n in sorted(total.items()) if n} for key, total in totals.items()}


def _shown(value: Any) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(value.items())) or "none" if isinstance(value, dict) else str(value)


def _means(manifest: Manifest, rows: Rows, check: Check) -> None:
    for name in ERRORS:
        values, said = getattr(rows, name), manifest.means.get(name, float("nan"))
        mean = float(np.mean(values, dtype=np.float64)) if len(values) else 0.0
        # the manifest has six decimals, of a mean that may have been taken in float32
        if not abs(mean - said) <= 1e-6 + 1e-4 * abs(mean):
            check.defect(f"{name}: the rows give {mean:.6f}, the manifest says {said:.6f}")
        check.detail += f"{', ' if check.detail else ''}{name} {mean:.4f}"


def _ids(reader: Reader, rows: Rows) -> None:
    check = reader.checks["ids"]
    keys, times = np.unique(rows.key, return_counts=True)
    twice = np.flatnonzero(times > 1)
    check.detail = f"{len(keys)} ids"
    suspects = set(keys[twice[:1000]].tolist())
    found: Counter[str] = Counter()
    for k in np.unique(rows.shard[np.isin(rows.key, keys[twice[:1000]])]) if suspects else ():
        with open_shard(reader.folder, reader.names[k]) as parquet:
            for batch in parquet.iter_batches(columns=["id"]):
                found.update(id for id in batch["id"].to_pylist() if id_key(id) in suspects)
    for id, count in sorted(found.items()):
        if count > 1:
            check.defect(f"'{id}' is there {count} times")
    if check.defects:
        check.more += max(0, len(twice) - 1000)


def _rejected(reader: Reader, rows: Rows) -> None:
    manifest, check = reader.manifest, reader.checks["rejected"]
    check.detail = f"{len(manifest.rejected)} rejected"
    if not reader.with_record:
        return
    unknown = [id for id in reader.recorded if id not in manifest.rejected]
    # an image that could not be read at first may have come with a later shard
    keys = np.array([id_key(id) for id in unknown], np.uint64)
    for id, there in zip(unknown, np.isin(keys, rows.key), strict=True):
        if not there:
            check.defect(f"'{id}' was rejected by a shard, but is neither in the set nor in the manifest's list")
    if reader.with_record == len(reader.names):
        for id in sorted(manifest.rejected.keys() - reader.recorded.keys()):
            check.defect(f"'{id}' is rejected in the manifest, but by no shard")
