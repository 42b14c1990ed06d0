"""The page of an inspection: what was found, in tables, curves and pictures, with nothing fetched from elsewhere."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_set
from damaged_sets import edit_rows, inspect
from PIL import Image
from set_pages import Page
from set_rows import MakeSet, edit_manifest

from dmat_ray.data.inspection import CHECKS, Inspection, inspect_set
from dmat_ray.reports import set_page
from dmat_ray.storage import at

pytestmark = pytest.mark.slow


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
