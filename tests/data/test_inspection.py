"""The inspection: a sound set passes, each kind of damage is found and named, and the page says what was found."""

import base64
import io
import json
import os
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmat_ray.data.inspection import CHECKS, Inspection, inspect_set, pixels, rows
from dmat_ray.manifold import generators
from dmat_ray.reports import set_page
from dmat_ray.storage import at

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARD = "part-000001.parquet"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
MakeSet = Callable[..., Path]
Damage = Callable[[Path], None]


def inspect(folder: Path, generator_folder: Path, **how: Any) -> Inspection:
    path = str(generator_folder)
    sha = generators.fingerprint(path)
    return inspect_set(folder, generator_sha256=sha, load=lambda p: generators.load_generator(path, precision=p), **how)


def states(found: Inspection) -> dict[str, str]:
    return {check.name: check.state for check in found.checks}


def edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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


def test_a_sound_set_passes_every_check(set_folder: Path, generator_folder: Path) -> None:
    found = inspect(set_folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok")
    assert found.sound
    details = {check.name: check.detail for check in found.checks}
    assert details["counts"] == "12 test, 24 train; 36 ok"
    assert details["g(w)"] == details["natural"] == details["w"] == "36 of 36 images"
    assert re.match(r"36 images in reference arithmetic: 0\.\d+% of pixels differ, by [01] levels", details["rendering"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(make_set: MakeSet, generator_folder: Path, damage: str) -> None:
    folder = make_set()
    change, check, message = DAMAGES[damage]
    change(folder)
    found = inspect(folder, generator_folder)
    failed = {c.name: c for c in found.checks if c.state == "failed"}
    assert check in failed, states(found)
    assert any(re.search(message, line) for line in failed[check].defects), failed[check].defects
    assert not found.sound
    assert found.defects == sum(len(c.defects) + c.more for c in failed.values())


def test_every_check_is_shown_to_fail() -> None:
    assert {check for _, check, _ in DAMAGES.values()} == set(CHECKS)


def test_what_was_not_looked_at_does_not_pass_for_sound(set_folder: Path, make_set: MakeSet, generator_folder: Path) -> None:
    found = states(inspect_set(set_folder))
    assert {name for name, state in found.items() if state != "ok"} == {"generator", "rendering"}
    assert found["generator"] == found["rendering"] == "not made"
    folder = make_set()
    (folder / "shards" / SHARD).unlink()
    found = states(inspect(folder, generator_folder))
    assert (found["shards"], found["counts"], found["means"]) == ("failed", "not made", "not made")
    edit_manifest(folder, version=1)
    assert set(states(inspect(folder, generator_folder)).values()) == {"failed", "not made"}


def test_many_defects_are_counted_and_some_shown(make_set: MakeSet) -> None:
    folder = make_set(train=300, test=30)
    edit_manifest(folder, projection={"poor_l1": 1e-6})
    found = inspect_set(folder)
    check = next(c for c in found.checks if c.name == "status")
    assert len(check.defects) == 20
    assert len(check.defects) + check.more == found.defects == 330


def test_repaired_images_and_empty_shards_are_sound(make_set: MakeSet, generator_folder: Path) -> None:
    """A shard may have rejected what a later one holds, and shards may be without rows."""
    folder = make_set()
    rows = pq.read_table(folder / "shards" / SHARD)
    first = rows["id"][0].as_py()
    edit_rows(folder, lambda r: r.pop(0), dmat_ray_rejected=json.dumps({first: "bad", "lost": "bad"}))
    metadata = {**rows.schema.metadata, b"dmat_ray_rejected": b'{"lost": "bad"}'}
    pq.write_table(rows[:1].replace_schema_metadata(metadata), folder / "shards" / "part-000001-1.parquet")
    pq.write_table(rows[:0].replace_schema_metadata(metadata), folder / "shards" / "part-000007.parquet")
    more = {SHARD: 11, "part-000001-1.parquet": 1, "part-000007.parquet": 0}
    edit_manifest(folder, shards=manifest_of(folder)["shards"] | more, rejected={"lost": "bad"}, examples=37)
    found = inspect(folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok"), [c for c in found.checks if c.defects]


def test_a_part_of_the_images(set_folder: Path, generator_folder: Path) -> None:
    found = inspect(set_folder, generator_folder, images=13, samples=5)
    details = {check.name: check.detail for check in found.checks}
    assert details["natural"] == "24 of 36 images", "two shards of twelve"
    assert details["shards"] == "3 of 3 read, 36 rows"
    assert details["rendering"].startswith("5 images")
    assert found.sound
    assert set(found.chosen.positions.tolist()) <= set(found.pairs), "pairs to show are fetched from all shards"  # type: ignore[union-attr]
    nothing = inspect(set_folder, generator_folder, images=0)
    assert states(nothing)["natural"] == "not made"


@pytest.mark.parametrize(("levels", "state"), [(1, "ok"), (2, "failed")])
def test_one_level_of_one_pixel_is_rounding(make_set: MakeSet, generator_folder: Path, levels: int, state: str) -> None:
    folder = make_set()

    def nudge(rows: list[dict[str, Any]]) -> None:
        content = bytearray(rows[0]["on_manifold"]["bytes"])
        content[-20] += levels if content[-20] < 128 else -levels
        rows[0]["on_manifold"]["bytes"] = bytes(content)

    edit_rows(folder, nudge)
    found = inspect(folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok") | {"rendering": state}
    check = next(c for c in found.checks if c.name == "rendering")
    assert check.detail.endswith(f"{100 / (36 * 64):.4f}% of pixels differ, by {levels} levels at most (1 allowed)")


def test_bf16_sets_are_rendered_in_bf16(make_set: MakeSet, generator_folder: Path) -> None:
    folder = make_set()
    generator = generators.load_generator(str(generator_folder), precision="bf16")

    def again(rows: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            x = generator.synthesis(torch.tensor([r["w"] for r in rows]).reshape(len(rows), generator.num_ws, -1))
        for row, image in zip(rows, (x * 255).round().to(torch.uint8).numpy(), strict=True):
            row["on_manifold"] = {"bytes": b"P5\n8 8\n255\n" + image.tobytes(), "path": None}

    for shard in manifest_of(folder)["shards"]:
        edit_rows(folder, again, shard)
    edit_manifest(folder, generator_precision="bf16")
    check = next(c for c in inspect(folder, generator_folder).checks if c.name == "rendering")
    assert check.state == "ok"
    assert "36 images in bf16 arithmetic" in check.detail
    edit_rows(folder, shifted_w)
    assert states(inspect(folder, generator_folder))["rendering"] == "failed"


def test_best_median_and_worst_are_those_of_a_plain_sort(set_folder: Path) -> None:
    found = inspect_set(set_folder, classes=2)
    assert found.chosen is not None
    tables = [pq.read_table(path) for path in sorted((set_folder / "shards").glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    by_class = {c: sorted((r for r in rows if r["label"] == c), key=lambda r: r["l1"]) for c in range(3)}
    hardest = sorted(by_class, key=lambda c: by_class[c][6]["l1"])[1:]
    assert sorted(found.chosen.classes) == sorted(hardest)
    for label, picked in found.chosen.classes.items():
        for what, place in (("best", 0), ("median", 6), ("worst", 11)):
            pair, row = found.pairs[picked[what]], by_class[label][place]
            assert pair.id == row["id"]
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                np.testing.assert_array_equal(pair.natural[0], np.asarray(image))
            assert pair.on_manifold.tobytes() == row["on_manifold"]["bytes"][-64:]
    worst = sorted(rows, key=lambda r: -r["l1"])[:12]
    assert [found.pairs[i].id for i in found.chosen.worst] == [r["id"] for r in worst]


@settings(max_examples=25)
@given(data=st.data())
def test_no_damage_stops_the_inspection(tmp_path_factory: pytest.TempPathFactory, set_folder: Path, data: st.DataObject) -> None:
    """Bytes are changed, cut or put in anywhere: what comes out is a list of findings."""
    name = data.draw(st.sampled_from(["manifest.json", f"shards/{SHARD}"]))
    content = bytearray((set_folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            content[where] ^= data.draw(st.integers(1, 255))
        else:
            content[where : where + (3 if kind == "cut" else 0)] = b"" if kind == "cut" else b"\x00\x07"
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "shards").mkdir()
    for path in (set_folder / "shards").iterdir():
        os.link(path, folder / "shards" / path.name)
    os.link(set_folder / "manifest.json", folder / "manifest.json")
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    found = inspect_set(folder)
    assert [check.name for check in found.checks] == list(CHECKS)
    if data.draw(st.integers(0, 9)) == 0:  # drawing takes a second
        set_page.write(found, at(folder / "page.html"))


class Page(HTMLParser):
    """What a browser would see; raises for tags that do not fit."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.images: list[Image.Image] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v for k, v in attrs if v and (k in ("src", "href", "action") or k.endswith(":href"))]
        if tag == "img":
            content = base64.b64decode(str(dict(attrs)["src"]).removeprefix("data:image/png;base64,"), validate=True)
            self.images.append(Image.open(io.BytesIO(content)))
            self.images[-1].load()
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v for k, v in attrs if v and k.endswith(":href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip()
        if self._open and self._open[-1] == "h3":
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def page_of(found: Inspection, path: Path) -> Page:
    set_page.write(found, at(path))
    return Page(path.read_text())


def largest_difference(page: Page) -> int:
    """Of the images of a page, in levels, after a check that every third is five times the difference of the two before."""
    largest = 0
    for natural, rendered, difference in zip(*[iter(page.images)] * 3, strict=True):
        gap = np.abs(np.asarray(natural).astype(int) - np.asarray(rendered))
        np.testing.assert_array_equal(np.asarray(difference), np.minimum(5 * gap, 255))
        largest = max(largest, int(gap.max()))
    return largest


def test_page_of_a_sound_set(set_folder: Path, generator_folder: Path, tmp_path: Path) -> None:
    found = inspect(set_folder, generator_folder)
    page = page_of(found, tmp_path / "page.html")
    checks, classes = page.tables
    assert [row[:2] for row in checks[1:]] == [[name, "ok"] for name in CHECKS]
    assert page.headings == ["dark", "light", "<b>bright & white</b>", "Worst of all"]
    assert len(page.images) == 3 * (9 + 12)
    assert {image.size for image in page.images} == {(8, 8)}
    assert largest_difference(page) <= 6
    everything = pa.concat_tables(pq.read_table(path) for path in (set_folder / "shards").glob("*.parquet")).to_pylist()
    for line, wanted in zip(classes[1:], [None, 0, 1, 2], strict=True):
        mine = [r for r in everything if wanted in (None, r["label"])]
        l1 = np.array([r["l1"] for r in mine], float)
        psnr = np.array([10 * np.log10(1 / r["l2"]) for r in mine])
        shown = [np.mean(l1), np.median(l1), np.percentile(l1, 95)]
        assert line[1:4] == [str(len(mine)), "0", "0"]
        assert line[7:10] == [f"{value:.4f}" for value in shown]
        assert line[10:] == [f"{value:.1f}" for value in (np.mean(psnr), np.median(psnr), np.percentile(psnr, 5))]
    assert "The set is sound" in page.texts


def test_page_needs_no_other_file_and_draws_every_error(set_folder: Path, tmp_path: Path) -> None:
    page = page_of(inspect_set(set_folder), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert [r for r in page.references if not r.startswith(("data:image/png", "#"))] == []
    assert re.findall(r"@import|<script|<link|<iframe|url\((?!['\"]?#)", text) == []
    titles = re.findall(r'<figure aria-label="([^"]*)">', text)
    assert titles == ["LPIPS", "L1: mean |g(w) − x|", "PSNR in dB", "steps"]
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert len(list(ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path"))) > 40
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_page_of_a_damaged_set_lists_the_defects(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set()
    edit_rows(folder, lambda rows: [row.update(id=f"<i>{row['id']}</i>", status="fair") for row in rows])
    edit_rows(folder, lambda rows: [row.update(status="poor<p>") for row in rows], "part-000002.parquet")
    found = inspect_set(folder)
    page = page_of(found, tmp_path / "page.html")
    assert "The set is not sound" in page.texts
    for check in found.checks:
        assert set(check.defects) <= set(page.texts)
    assert "and 4 more" in page.texts
    (folder / "manifest.json").unlink()
    page = page_of(inspect_set(folder), tmp_path / "page.html")
    assert len(page.tables) == 1
    assert [row[1] for row in page.tables[0][1:]] == ["failed"] + ["not made"] * (len(CHECKS) - 1)


def test_page_lists_the_first_rejected_and_counts_them_by_class(make_set: MakeSet, tmp_path: Path) -> None:
    folder = make_set()
    rejected = {f"{'train/' if i > 99 else ''}light/{i:03d}": "is <no> image" for i in range(130)} | {"elsewhere": "is cut"}
    edit_rows(folder, lambda rows: None, dmat_ray_rejected=json.dumps(rejected))
    edit_manifest(folder, rejected=rejected, examples=167)
    found = inspect_set(folder)
    assert found.sound
    page = page_of(found, tmp_path / "page.html")
    assert page.tables[2][1:] == [["elsewhere", "is cut"]] + [[f"light/{i:03d}", "is <no> image"] for i in range(99)]
    assert [row[3] for row in page.tables[1][1:]] == ["131", "0", "130", "0", "1"]


@pytest.mark.parametrize("classes", [1, 1000])
def test_page_of_few_and_many_classes_all_of_them_poor(tmp_path: Path, generator_folder: Path, classes: int) -> None:
    names = [f"class <{i}> “ü” \"'&" for i in range(classes)]
    folder = write_set(tmp_path / "set", generator_folder, train=900, test=100, class_names=names, noise=120)
    found = inspect(folder, generator_folder)
    assert found.sound, [check for check in found.checks if check.defects]
    page = page_of(found, tmp_path / "page.html")
    assert page.tables[1][1][:3] == ["all", "1000", "1000"]
    assert [row[0] for row in page.tables[1][2:]] == names
    assert len(page.headings) == min(classes, 12) + 1
    assert set(page.headings[:-1]) <= set(names)
    assert len(page.images) == 3 * (3 * min(classes, 12) + 12)
    assert page.texts.count("poor") >= 12
    assert largest_difference(page) > 255 / 5


def test_page_of_colour_images_scales_large_ones_down() -> None:
    from dmat_ray.reports import figures

    pixels = np.random.default_rng(0).integers(0, 256, (3, 300, 300), dtype=np.uint8)
    uri = figures.png(pixels, 128).removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
        assert (image.size, image.mode) == ((128, 128), "RGB")
    whole = figures.png(pixels).removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(whole))) as image:
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), pixels)


def test_two_ids_of_one_key_are_not_one_id(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are compared by a hash first; where that has 8 bits several agree, and none is there twice."""
    monkeypatch.setattr(rows, "KEY_BYTES", 1)
    folder = make_set()
    found = inspect_set(folder)
    assert found.rows is not None
    assert len(set(found.rows.key.tolist())) < 36
    assert states(found)["ids"] == "ok"
    DAMAGES["id twice"][0](folder)
    assert states(inspect_set(folder))["ids"] == "failed"


def test_parts_of_shards_are_put_together(set_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect_set(set_folder)
    monkeypatch.setattr(pixels, "VALUES", 5 * 64)
    parts = inspect_set(set_folder)
    assert [check.detail for check in parts.checks] == [check.detail for check in whole.checks]
    assert parts.pairs.keys() == whole.pairs.keys()
    for i, pair in whole.pairs.items():
        assert parts.pairs[i].id == pair.id
        for name in ("natural", "on_manifold", "w"):
            np.testing.assert_array_equal(getattr(parts.pairs[i], name), getattr(pair, name))


def test_another_generator_does_not_render(make_set: MakeSet, generator_folder: Path) -> None:
    folder = make_set()
    DAMAGES["other generator"][0](folder)
    assert states(inspect(folder, generator_folder)) == dict.fromkeys(CHECKS, "ok") | {
        "generator": "failed",
        "rendering": "not made",
    }


def test_images_that_are_there_twice_are_no_defect_but_told(make_set: MakeSet, tmp_path: Path) -> None:
    """A test image as a training image is, another that is it in another format, and an image under two labels."""
    folder = make_set()
    assert inspect_set(folder).warnings == []
    every = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "shards").glob("*.parquet"))).to_pylist()
    trained, second, *others = [row for row in every if row["split"] == "train"]
    tested = [row for row in every if row["split"] == "test" and row["label"] == trained["label"]][:2]
    odd = next(row for row in others if row["label"] != second["label"])
    bmp = io.BytesIO()
    Image.open(io.BytesIO(trained["image"]["bytes"])).save(bmp, format="BMP")
    contents = [trained["image"]["bytes"], bmp.getvalue(), second["image"]["bytes"]]
    changed = dict(zip([row["id"] for row in (*tested, odd)], contents, strict=True))
    for path in (folder / "shards").glob("*.parquet"):
        edit_rows(
            folder, lambda rows: [r["image"].update(bytes=changed.get(r["id"], r["image"]["bytes"])) for r in rows], path.name
        )
    found = inspect_set(folder)
    names = manifest_of(folder)["class_names"]
    pair = [f"'{row['id']}' ({names[row['label']]})" for row in every if row["id"] in (second["id"], odd["id"])]
    assert found.warnings == [
        f"warning: among the test images are training images, 2 of 12, the first: '{tested[0]['id']}' is '{trained['id']}'",
        f"warning: 1 image with more than one label, the first: {' is '.join(pair)}",
    ]
    assert states(found)["natural"] == "ok"
    assert inspect_set(folder, images=0).warnings == []
    set_page.write(found, at(tmp_path / "page.html"))
    assert "among the test images are training images, 2 of 12" in (tmp_path / "page.html").read_text()


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "inspect_set.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def job_here(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same in this process, which is sooner ready."""
    monkeypatch.setattr(sys, "argv", ["inspect_set.py", *arguments])
    code: Any = 0
    try:
        runpy.run_path(str(ROOT / "jobs" / "inspect_set.py"), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)


def refused(*arguments: str, **here: Any) -> str:
    """What the job prints where it inspects nothing."""
    done = job_here(*arguments, **here)
    assert (done.returncode, done.stdout) == (2, "")
    return str(done.stderr)


def test_job_says_what_it_found_by_its_exit_code(
    make_set: MakeSet, generator_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_set()
    base = ["--output", str(folder.parent), "--generator.path", str(generator_folder)]
    done = job(*base)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-3]] == [["ok", name] for name in CHECKS]
    usable = manifest_of(folder)["usable"]
    assert done.stdout.splitlines()[-2:] == [
        f"{sum(usable.values())} of 36 images are usable, the others poor", "the set is sound"
    ]  # fmt: skip
    here: Any = {"capsys": capsys, "monkeypatch": monkeypatch}
    done = job_here(*base, "--no-render", "--page", str(folder / "afile" / "p.html"), **here)
    assert done.stdout.splitlines()[-1] == "the set is sound, as far as it was checked"
    assert Page((folder.parent / "inspection.html").read_text()).tables
    with_value("label", 7)(folder)
    elsewhere = ["--manifold_set", str(folder), "--output", str(folder.parent), "--page", str(folder.parent / "p.html")]
    done = job_here(*elsewhere, "--no-render", **here)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^ +- part-000001.parquet: label of 'example-\d+' is 7$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^not made +rendering", done.stdout, flags=re.MULTILINE)
    assert (folder.parent / "p.html").is_file()
    assert "there is no on-manifold set at" in refused(*base[2:], "--output", str(folder / "absent"), **here)
    told = refused("--manifold_set", str(folder.parent), "--output", str(folder / "absent"), **here)
    assert f"holds no on-manifold set; give --manifold_set {folder}" in told
    assert not (folder / "absent").exists()
    assert "'-1' is not a number of images" in refused(*base, "--samples", "-1", **here)
