"""The table in a terminal, the siblings of the page, and what they put into words."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from rendered import Rendered
from report_pages import COLUMNS, Page, shares, whole_page
from tiny_page import EVALUATION, MODELS, PGD, TITLE, Written

from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.metrics import Results
from dmat_ray.reports import columns, report_text, terminal


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(evaluation=EVALUATION, tracking={"experiment": TITLE})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Written:
    return whole_page(tmp_path_factory.mktemp("page"), config, set_folder)


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.html)


def test_terminal_table_has_the_right_numbers(written: Written) -> None:
    text = terminal.terminal_table(written.results, MODELS)
    blocks = text.split("accuracy (%) on 12 ")[1:]
    assert [block.split(" test images")[0] for block in blocks] == ["on-manifold", "natural"]
    for block, set_name in zip(blocks, COLUMNS, strict=True):
        for model in MODELS:
            lines = [line for line in block.splitlines() if f" {model} " in line]
            numbers = [number for line in lines for number in re.findall(r"\d+\.\d", line)]
            assert numbers == shares(written.results.rows, model, set_name)
        assert [name for name in COLUMNS[set_name] if name not in block] == []
    assert "OM-PGD" not in blocks[1]
    assert "\x1b" not in text


def test_terminal_table_of_many_attacks_keeps_every_column(config: Config) -> None:
    names = [f"attack number {i}" for i in range(20)]
    suite = {"attacks": [{"threat": "image", "name": name} for name in names], "sets": ["natural"]}
    answers = {"set": "natural", "id": "a", "correct": True}
    rows = pa.Table.from_pylist([{"model": m, "source": m, "attack": a, **answers} for m in MODELS for a in ["clean", *names]])
    text = terminal.terminal_table(Results(rows, EvaluationConfig.model_validate(suite)), MODELS)
    assert [name for name in names if f" {name} " not in text] == []
    assert text.count("100.0") == 2 * 20
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_terminal_checks_are_a_line_a_warning_and_a_count() -> None:
    found = [
        Finding("at", "noise", "warning", "a is weak"),
        Finding("at", "noise", "warning", "b is weak"),
        Finding("at", "logits", "ok", "fine"),
        Finding("dmat", "noise", "ok", "fine"),
    ]
    assert terminal.terminal_checks(found).splitlines() == [
        "warning: at: noise: a is weak",
        "warning: at: noise: b is weak",
        "2 of 3 checks passed; 1 gave 2 warnings",
    ]
    assert terminal.terminal_checks([]) == "no checks were made"


def test_markdown_is_read_as_it_is_meant(page: Page, written: Written) -> None:
    settings = "data:\n  source: /d/<img src=x onerror=alert(1)>\n  # ```` and ``` in it\n"
    facts = [("Images", "<b>x</b>"), ("Generator sha256", "a|b")]
    text = report_text.markdown(TITLE, written.results, MODELS, written.findings, facts, settings)
    found = Rendered(text)
    assert found.tags == []
    assert found.code == [("yaml", settings)]
    for table in page.tables[:6]:
        assert table in found.tables
    assert {"Images: <b>x</b>", "Generator sha256: a|b", TITLE} <= set(found.texts)
    (settings,) = [code for _, code in Rendered(written.path.with_suffix(".md").read_text()).code]
    assert yaml.safe_load(settings)["evaluation"]["attacks"][1]["name"] == PGD


def test_siblings_hold_the_numbers_of_the_table(page: Page, written: Written) -> None:
    text = written.path.with_suffix(".md").read_text()
    lines = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[re.sub(r"\\(.)", r"\1", cell).removeprefix("**").removesuffix("**") for cell in line] for line in lines]
    for table in page.tables[:6]:
        at = cells.index(table[0])
        assert [cells[at], *cells[at + 2 : at + 1 + len(table)]] == table
        del cells[at : at + 1 + len(table)]
    with written.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for table, set_name in zip(page.tables[0:6:3], COLUMNS, strict=True):
        mine = [r for r in rows if (r["table"], r["set"]) == ("accuracy", set_name)]
        assert [(r["method"], r["attack"]) for r in mine] == [(m, c) for m in MODELS for c in COLUMNS[set_name]]
        assert [f"{100 * float(r['accuracy']):.1f}" for r in mine] == [cell for row in table[1:] for cell in row[1:]]
        assert all(0 <= float(r["low"]) <= float(r["accuracy"]) + 1e-12 <= float(r["high"]) + 2e-12 <= 1 + 3e-12 for r in mine)
    assert {r["count"] for r in rows} == {"12"}
    assert {(r["table"], r["eps"]) for r in rows if r["table"] == "curve"} == {("curve", e) for e in ("0.01", "0.03", "0.06")}
    own = {(r["set"], r["method"], r["attack"]): r["accuracy"] for r in rows if r["table"] == "accuracy"}
    diagonal = [r for r in rows if r["table"] == "transfer" and r["method"] == r["source"]]
    assert len(diagonal) == 2 * 3
    assert all(own[r["set"], r["method"], r["attack"]] == r["accuracy"] for r in diagonal)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"threat": "clean"}, "no attack"),
        ({"threat": "corruption", "kind": "gaussian_noise", "severity": 3}, "gaussian noise of severity 3, no attack"),
        ({"threat": "autoattack", "part": "fab-t", "eps": "8/255", "group": "AA"}, "AutoAttack's fab-t, L∞, eps 8/255"),
        ({"threat": "image", "norm": "l2", "eps": 1.5, "steps": 1}, "image L2, eps 1.5, 1 step of pgd, from a random start"),
        (
            {"threat": "image", "eps": 0.1, "steps": 1, "step_size": 0.1, "random_start": False},
            "image L∞, eps 0.1, 1 step of pgd, each of 0.1, without a random start",
        ),
        ({"threat": "image", "eps": 0.1, "steps": 9, "method": "square"}, "image L∞, eps 0.1, 9 steps of square"),
        ({"threat": "image", "norm": "l1", "eps": 12, "steps": 2}, "image L1, eps 12, 2 steps of pgd, from a random start"),
        (
            {"threat": "latent", "eps": 0.2, "steps": 9, "method": "apgd"},
            "latent L∞, eps 0.2, 9 steps of apgd, from a random start",
        ),
        (
            {"threat": "elastic", "eps": 1, "steps": 5, "restarts": 3},
            "elastic, eps 1, 5 steps of pgd, from a random start, 3 restarts",
        ),
        (
            {"threat": "latent", "eps": 0.1, "scale": "std", "steps": 1, "step_size": 0.12},
            "latent L∞, eps 0.1 standard deviations, 1 step of pgd, each of 0.12, from a random start",
        ),
        (
            {"threat": "gabor", "eps": "25/255", "density": 0.5, "steps": 5},
            "gabor, eps 25/255, density 0.5, 5 steps of pgd, from a random start",
        ),
        (
            {"threat": "image", "eps": 0.1, "steps": 5, "step_size": 0.1, "method": "apgd"},
            "image L∞, eps 0.1, 5 steps of apgd, from a random start",
        ),
        (
            {"threat": "joint", "eps": "4/255", "latent_eps": 0.02, "steps": 5, "loss": "dlr", "targets": 2},
            "joint, eps 4/255, eps 0.02 in w, 5 steps of pgd, from a random start, loss dlr, towards 2 classes",
        ),
    ],
)
def test_rows_are_put_into_words(row: dict[str, Any], words: str) -> None:
    config = EvaluationConfig.model_validate({"attacks": [{"name": "a", **row}], "sets": ["on_manifold"]})
    assert columns.described(config.attacks[0]) == words


def test_a_worst_case_says_that_it_counts_the_clean_image() -> None:
    """An image that is wrong without an attack and right under all of them does not stand."""
    summary = {"name": "worst", "how": "worst", "of": ["PGD"]}
    attacks = [{"threat": "clean"}, {"threat": "image", "name": "PGD"}]
    config = EvaluationConfig.model_validate({"attacks": attacks, "summaries": [summary], "sets": ["natural"]})
    answers = {"clean": [True, False, True], "PGD": [True, True, False]}
    rows = [
        {"model": "at", "source": "at", "set": "natural", "attack": name, "id": str(k), "correct": right, "label": 0}
        for name, found in answers.items()
        for k, right in enumerate(found)
    ]
    results = Results(pa.Table.from_pylist(rows), config)
    assert results.accuracy("at", "natural", "worst").value == pytest.approx(1 / 3)
    assert columns.columns_described(results)["worst"] == "right on the clean image and under every one of: PGD"


def test_a_summary_says_what_it_lacks_on_natural_images(written: Written) -> None:
    markdown = written.path.with_suffix(".md").read_text()
    (line,) = [line for line in markdown.replace("\\", "").splitlines() if line.startswith("- **mean**: ")]
    assert line.endswith("OM-PGD (on natural test images x without OM-PGD)")
