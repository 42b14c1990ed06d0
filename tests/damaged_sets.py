"""Damages of an on-manifold set, and what its inspection says of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from set_rows import edit_manifest

from dmat_ray.data.inspection import Inspection, inspect_set
from dmat_ray.manifold import generators

SHARD = "part-000001.parquet"
Damage = Callable[[Path], None]


def inspect(folder: Path, generator_folder: Path, **how: Any) -> Inspection:
    path = str(generator_folder)
    sha = generators.fingerprint(path)
    return inspect_set(folder, generator_sha256=sha, load=lambda p: generators.load_generator(path, precision=p), **how)


def states(found: Inspection) -> dict[str, str]:
    return {check.name: check.state for check in found.checks}


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def edit_rows(folder: Path, change: Callable[[list[dict[str, Any]]], Any], shard: str = SHARD, **metadata: str) -> None:
    """Rewrite a shard after `change` of its rows."""
    path = folder / "shards" / shard
    schema = pq.read_schema(path)
    rows = pq.read_table(path).to_pylist()
    change(rows)
    schema = schema.with_metadata({**schema.metadata, **{key.encode(): value for key, value in metadata.items()}})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def with_value(column: str, value: Any, row: int = 2) -> Damage:
    return lambda folder: edit_rows(folder, lambda rows: rows[row].__setitem__(column, value))


def with_manifest(**values: Any) -> Damage:
    return lambda folder: edit_manifest(folder, **values)


def without_key(key: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest_of(folder).items() if k != key}))

    return damage


def with_content(change: Callable[[bytes], bytes], name: str = f"shards/{SHARD}") -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def stray_shard(folder: Path) -> None:
    (folder / "shards" / "part-000009.parquet").write_bytes((folder / "shards" / SHARD).read_bytes())


def swapped(column: str) -> Damage:
    def swap(rows: list[dict[str, Any]]) -> None:
        rows[0][column], rows[1][column] = rows[1][column], rows[0][column]

    return lambda folder: edit_rows(folder, swap)


def other_metadata(folder: Path) -> None:
    edit_rows(folder, lambda rows: None, dmat_ray='{"version": 2}')


def damaged_metadata(folder: Path) -> None:
    edit_rows(folder, lambda rows: None, huggingface="{")


def unknown_rejected(folder: Path) -> None:
    edit_rows(folder, lambda rows: None, dmat_ray_rejected='{"lost": "is no image"}')


def given_up(folder: Path) -> None:
    edit_rows(
        folder, lambda rows: None, dmat_ray_given_up=json.dumps([pq.read_table(folder / "shards" / SHARD)["id"][2].as_py()])
    )


def damaged_given_up(folder: Path) -> None:
    edit_rows(folder, lambda rows: None, dmat_ray_given_up="{")


def other_type(folder: Path) -> None:
    path = folder / "shards" / SHARD
    table = pq.read_table(path)
    pq.write_table(table.set_column(9, "steps", table["steps"].cast(pa.int64())), path)


def shifted_w(rows: list[dict[str, Any]]) -> None:
    rows[2]["w"] = [value + 0.5 for value in rows[2]["w"]]


def flipped_bit(folder: Path) -> None:
    path = folder / "shards" / SHARD
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    where = content.index(table["on_manifold"][3]["bytes"].as_py()) + 40
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])


KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest", "unfinished: it has no manifest.json"),
    "manifest cut": (with_content(lambda c: c[:-20], "manifest.json"), "manifest", "is damaged"),
    "manifest a list": (with_content(lambda c: b"[1]", "manifest.json"), "manifest", "it holds a list, not an object"),
    "manifest nested": (with_content(lambda c: b"[" * 100_000, "manifest.json"), "manifest", "is damaged"),
    "manifest no text": (with_content(lambda c: b"\xff\xfe" + c, "manifest.json"), "manifest", "is damaged"),
    "old version": (with_manifest(version=1), "manifest", "format version 1, this program reads 2"),
    "key missing": (without_key("means"), "manifest", "means: is missing"),
    "shards a list": (with_manifest(shards=["a"]), "manifest", "shards: must be a table"),
    "negative rows": (with_manifest(shards={"a.parquet": -1}), "manifest", "must be 0 or more"),
    "shard elsewhere": (with_manifest(shards={"../a.parquet": 1}), "manifest", "must be of the form"),
    "odd shapes": (with_manifest(shapes={"on_manifold": [2, 8, 8], "w": [1, 8]}), "manifest", "no shape of square grey or RGB"),
    "mean not finite": (with_manifest(means={"lpips": float("nan"), "l1": 0, "l2": 0}), "manifest", "finite number"),
    "shard missing": (lambda f: (f / "shards" / SHARD).unlink(), "shards", f"{SHARD}: .*No such file"),
    "shard cut": (with_content(lambda c: c[:-100]), "shards", SHARD),
    "shard empty": (with_content(lambda c: b""), "shards", SHARD),
    "shard short": (lambda f: edit_rows(f, lambda rows: rows.pop()), "shards", "has 11 rows, the manifest says 12"),
    "stray shard": (stray_shard, "shards", "part-000009.parquet is not in the manifest"),
    "bit flipped": (flipped_bit, "shards", f"{SHARD}: .*checksum"),
    "column type": (other_type, "schema", f"{SHARD}: steps is int64, not int32"),
    "metadata": (other_metadata, "schema", "metadata 'dmat_ray' is not what"),
    "metadata damaged": (damaged_metadata, "schema", "metadata 'huggingface'"),
    "class names": (with_manifest(class_names=["a", "b", "c"]), "schema", "shapes and class names"),
    "label too large": (with_value("label", 3), "values", "label of 'example-.*' is 3"),
    "label negative": (with_value("label", -1), "values", "label of 'example-.*' is -1"),
    "steps": (with_value("steps", 11), "values", "steps of 'example-.*' is 11"),
    "lpips not finite": (with_value("lpips", float("nan")), "values", "lpips of 'example-.*' is nan"),
    "status unknown": (with_value("status", "fair"), "values", "status of 'example-.*' is 'fair'"),
    "no value": (with_value("id", None), "shards", f"{SHARD}: no value in id"),
    "id twice": (lambda f: edit_rows(f, lambda r: r[0].__setitem__("id", r[1]["id"])), "ids", "is there 2 times"),
    "rejected and there": (with_manifest(rejected={"example-003": "bad"}, examples=37), "rejected", "'example-003' is in"),
    "rejected by a shard": (unknown_rejected, "rejected", "'lost' was rejected by a shard, but"),
    "rejected by nobody": (with_manifest(rejected={"a": "bad"}, examples=37), "rejected", "'a' is rejected in the manifest, but"),
    "count": (with_manifest(count=35), "counts", "count: the rows give 36, the manifest says 35"),
    "splits": (with_manifest(splits={"train": 23, "test": 13}), "counts", "splits: the rows give 12 test, 24 train, the man"),
    "usable": (with_manifest(usable={"train": 24}), "counts", "usable: the rows give 12 test, 24 train, the manifest says 24 tr"),
    "source": (with_manifest(examples=40), "counts", "36 rows and 0 rejected are not the 40 images of the source"),
    "means": (with_manifest(means={"lpips": 0.0, "l1": 0.02, "l2": 0.0002}), "means", "l1: the rows give 0.0106.., the"),
    "poor called ok": (with_manifest(projection={"poor_l1": 0.001}), "status", "should be poor"),
    "poor by lpips": (with_manifest(projection={"poor_l1": 1, "poor_lpips": -1.0}), "status", "should be poor .*lpips 0.0000"),
    "given up called ok": (given_up, "status", r"'example-.*' should be poor \(.*, given up\)"),
    "given up damaged": (damaged_given_up, "status", "metadata 'dmat_ray_given_up'"),
    "given up by nobody": (with_manifest(given_up=2), "counts", "given_up: the rows give 0, the manifest says 2"),
    "ok called poor": (with_value("status", "poor"), "status", "should be ok"),
    "w not finite": (with_value("w", [float("inf")] + [0.0] * 31), "w", "w of 'example-.*' is not finite"),
    "w with a hole": (with_value("w", [None] + [0.0] * 31), "w", "w of 'example-.*' is not finite"),
    "w missing": (with_value("w", None), "shards", f"{SHARD}: .*all lists"),
    "g no image": (with_value("on_manifold", {"bytes": b"P5\n8 8\n255\n", "path": None}), "g(w)", "'example-.*': .*no netpbm"),
    "g missing": (with_value("on_manifold", None), "g(w)", "'example-.*': .*no netpbm"),
    "x no image": (with_value("image", {"bytes": b"x", "path": None}), "natural", "'example-.*' cannot be read"),
    "x missing": (with_value("image", None), "natural", "'example-.*' cannot be read"),
    "other x": (swapped("image"), "errors", "has l1 0.0.*, its images give 0."),
    "other g": (swapped("on_manifold"), "errors", "has l2 0.0.*, its images give 0."),
    "l1": (with_value("l1", 0.05), "errors", "has l1 0.05000, its images give 0.0"),
    "other generator": (with_manifest(generator_sha256="0" * 64), "generator", "generator 000000000000, .*give the same"),
    "other w": (lambda f: edit_rows(f, shifted_w), "rendering", "'example-.*' is rendered with pixels up to"),
}  # fmt: skip
