"""The page: numbers as counted by hand, nothing fetched from elsewhere, and whatever was evaluated named as it is written."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
from galleries import gallery_here
from report_pages import COLUMNS, LINES, Page, right, shares, whole_page
from tiny_page import EVALUATION, GROUP, MODELS, PGD, TITLE, Written, write_page

from dmat_ray.config import Config
from dmat_ray.models import trained_settings
from dmat_ray.reports import report
from dmat_ray.storage import at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(evaluation=EVALUATION, tracking={"experiment": TITLE})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Written:
    return whole_page(tmp_path_factory.mktemp("page"), config, set_folder)


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.html)


def test_page_has_the_right_numbers(page: Page, written: Written) -> None:
    numbers = {cell for table in page.tables[0:6:3] for row in table[1:] for cell in row[1:]}
    assert len(numbers) >= 6, "the models are neither broken at once nor alike"
    for table, (set_name, columns) in zip(page.tables[0:6:3], COLUMNS.items(), strict=True):
        assert table[0] == ["method", *columns]
        assert table[1:] == [[model, *shares(written.results.rows, model, set_name)] for model in MODELS]


def test_intervals_are_wilsons_and_need_no_pointer(page: Page, written: Written) -> None:
    hovers = [unescape(t) for t in re.findall(r'<td title="95 % interval ([^"]*)"', written.html)]
    for table, set_name in zip(page.tables[1:6:3], COLUMNS, strict=True):
        for row in table[1:]:
            for column, cell in zip(COLUMNS[set_name], row[1:], strict=True):
                assert cell == hovers.pop(0)
                if column in ("clean", PGD, "OM-PGD"):
                    correct = sum(right(written.results.rows, row[0], set_name, [column]).values())
                    ends = scipy.stats.binomtest(correct, 12).proportion_ci(method="wilson")
                    assert cell == f"{100 * ends.low:.1f} to {100 * ends.high:.1f}"


def test_best_of_a_column_is_marked(written: Written) -> None:
    bold = re.findall(r'class="best">([\d.]+)<', written.html)
    expected = []
    for set_name in COLUMNS:
        numbers = {model: shares(written.results.rows, model, set_name) for model in MODELS}
        best = [max(map(float, column)) for column in zip(*numbers.values(), strict=True)]
        expected += [v for row in numbers.values() for v, most in zip(row, best, strict=True) if float(v) == most]
    assert bold == expected


def test_page_is_self_contained_and_well_formed(page: Page, written: Written) -> None:
    assert page.unclosed == []
    outside = [r for r in page.references if not r.startswith(("data:", "#"))]
    assert {(written.path.parent / name).is_file() for name in outside} == {True}, "links to the siblings alone"
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert [u for u in re.findall(r"url\(([^)]*)\)", written.html) if not u.strip("'\"").startswith(("data:", "#"))] == []
    assert re.findall(r"@import|<script [^>]|<link|<iframe|https?://", written.html) == []


def test_page_names_everything_as_it_is_written(page: Page) -> None:
    assert page.headings[0] == "Robustness on somewhere"
    assert ["MLflow experiment", TITLE] in [row for table in page.tables for row in table]
    assert set(MODELS) <= set(page.headings)
    for name in {*COLUMNS["on_manifold"], *LINES}:
        assert name in page.texts, name
    assert page.tables[0][0][4] == GROUP


def test_page_holds_the_whole_config_and_what_made_it(page: Page, config: Config) -> None:
    text = "".join(page.texts)
    missing = [name for name in trained_settings.flatten_config(config) if f"{name.rsplit('.', 1)[-1]}:" not in text]
    assert missing == []
    facts = dict(page.tables[-1])
    assert facts["Seed of the evaluation"] == "0"
    assert f"torch {torch.__version__}" in facts["This page was made by"]


def test_images_that_are_left_out_are_told_where_numbers_are_copied_from(
    tmp_path: Path, config: Config, write_any_set: Callable[..., Path]
) -> None:
    poor = write_any_set(tmp_path / "set", train=100, test=60, noise=46)
    rows = pa.concat_tables([pq.read_table(path) for path in (poor / "shards").glob("*.parquet")]).to_pylist()
    train, test = ([row["status"] for row in rows if row["split"] == split].count("poor") for split in ("train", "test"))
    assert 0 < test < 60
    assert train > 0
    found = write_page(tmp_path, config, poor, MODELS[:2], history=False, check=False)
    (line,) = [line for line in found.path.with_suffix(".md").read_text().splitlines() if line.startswith("- Left out: ")]
    assert line.startswith(f"- Left out: {test} of 60 test images were projected poorly")
    text = " ".join(" ".join(Page(found.html).texts).split())
    assert f"100 training and 60 test images, of which {train} and {test} are left out because" in text


def test_classes_that_a_model_cannot_know_are_told(tmp_path: Path, config: Config, set_folder: Path) -> None:
    found = write_page(tmp_path, config, set_folder, MODELS[:2], history=False, check=False)
    told = f"Model {MODELS[1]} cannot know"
    assert told not in found.html
    place = at(found.models[MODELS[1]])
    (place / "run.json").write_json({**(place / "run.json").read_json(), "classes_without_images": ["odd"]})
    shown = gallery_here(config, set_folder, found.models)
    report.write(config, set_folder, found.models, found.results, ([], []), found.path, shown)
    facts = dict(Page(found.path.read_text()).tables[-1])
    assert facts[told] == "'odd', of which it was trained without an image"
    assert f"Model {MODELS[0]} cannot know" not in facts


SMALL: dict[str, dict[str, Any]] = {
    "no latent rows": {"attacks": EVALUATION["attacks"][:3]},
    "natural alone, clean alone": {"attacks": EVALUATION["attacks"][:1], "sets": ["natural"]},
    "on-manifold alone, no clean row": {"attacks": EVALUATION["attacks"][-1:], "sets": ["on_manifold"]},
}


@pytest.mark.parametrize("suite", SMALL)
def test_smaller_pages_of_one_model_without_history(
    suite: str, tmp_path: Path, make_config: Callable[..., Config], set_folder: Path
) -> None:
    check = suite == "no latent rows"
    found = write_page(tmp_path, make_config(evaluation=SMALL[suite]), set_folder, ["only"], history=False, check=check)
    page = Page(found.html)
    assert page.unclosed == []
    assert 'class="best"' not in found.html, "one model is no best of several"
    assert "Training curves" not in page.headings
    assert "Transfer" not in page.headings
    assert ("No checks were made." in " ".join(page.texts)) != check
    assert page.tables[0][1][0] == "only"
    assert len(page.images) > 0
    assert "nan" not in found.html.lower().split("<pre")[0]
