"""The table, the page and its siblings: numbers as counted by hand, nothing fetched from elsewhere, images that decode."""

import base64
import csv
import io
import re
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
import yaml
from galleries import gallery_here
from PIL import Image
from rendered import Rendered
from tiny_page import EVALUATION, GROUP, MODELS, PGD, TITLE, WORST, Written, write_page

from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation import units
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.intervals import Difference
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.reports import gallery, report, report_text, report_values, terminal
from dmat_ray.storage import at

COLUMNS = {
    "on_manifold": ["clean", PGD, "PGD L2", GROUP, "OM-PGD", WORST, "mean"],
    "natural": ["clean", PGD, "PGD L2", GROUP, WORST, "mean"],
}
LINES = ["natural x", "on-manifold g(w)", PGD, "PGD L2", "one", "OM-PGD"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: references, images with their captions, tables, headings, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[str] = []
        self.images: list[Image.Image] = []
        self.alts: list[str] = []
        self.captions: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.classes: list[str] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.unclosed: list[str] = []
        self._path: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        self.unclosed += [tag for tag, _ in self._path]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self._path.append((tag, values))
        self.references += [v for k, v in attrs if v and (k in ("src", "href", "action") or k.endswith(":href"))]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag == "img":
            content = base64.b64decode(str(values["src"]).removeprefix("data:image/png;base64,"), validate=True)
            self.images.append(Image.open(io.BytesIO(content)))
            self.alts.append(values["alt"] or "")
        if tag == "table":
            self.tables.append([])
            self.classes.append(values.get("class") or "")
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        path = [tag for tag, _ in self._path]
        if "figcaption" in path and "table" in path:
            self.captions.append((data, str(self._path[-1][1]["class"])))
        elif "td" in path or "th" in path:
            self.tables[-1][-1][-1] += data
        if path and path[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._path and (found := self._path.pop()[0]) != tag:
            self.unclosed.append(found)


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(evaluation=EVALUATION, tracking={"experiment": TITLE})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Written:
    found = write_page(tmp_path_factory.mktemp("page"), config, set_folder, MODELS)
    assert sorted(p.name for p in found.path.parent.iterdir()) == ["report.csv", "report.html", "report.md"]
    return found


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.html)


def right(rows: pa.Table, model: str, set_name: str, attacks: list[str], source: str | None = None) -> dict[str, bool]:
    """For each example whether it is right in all rows of some attacks, by plain loops."""
    found: dict[str, bool] = {}
    for r in rows.to_pylist():
        if (r["model"], r["source"], r["set"]) == (model, source or model, set_name) and r["attack"] in attacks:
            found[r["id"]] = found.get(r["id"], True) and r["correct"]
    return found


def shares(rows: pa.Table, model: str, set_name: str) -> list[str]:
    """Per cent of each column, counted by hand."""
    made_of = {PGD: [PGD], GROUP: ["clean", "one", "two"], "OM-PGD": ["OM-PGD"]}
    found = {}
    for column in COLUMNS[set_name]:
        if column == "mean":
            values = [found[c] for c in made_of if c in found]
            found[column] = sum(values) / len(values)
            continue
        attacks = ["clean", PGD, "OM-PGD"] if column == WORST else made_of.get(column, [column])
        standing = right(rows, model, set_name, attacks)
        assert len(standing) == 12
        found[column] = 100 * sum(standing.values()) / 12
    return [f"{value:.1f}" for value in found.values()]


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


def test_images_decode_and_captions_are_the_predictions(page: Page, written: Written, set_folder: Path) -> None:
    data = open_set(set_folder, "test")
    first_of = [int(np.flatnonzero(data.label == c)[0]) for c in range(3)]
    shown = np.stack([np.asarray(image) for image in page.images]).reshape(len(MODELS), -1, 3, 8, 8).astype(float)
    assert shown.shape[1] == len(LINES) + 4, "a line for each, and for four attacks their differences"
    said = np.array(page.captions, dtype=object).reshape(len(MODELS), len(LINES), 3, 2)
    times = [float(t) for t in re.findall(r"difference × ([\d.e+-]+)<", written.html)]
    predictions = {(r["model"], r["attack"], r["id"]): r["prediction"] for r in written.results.rows.to_pylist()
                   if r["model"] == r["source"] and r["set"] == "on_manifold"}  # fmt: skip
    for m, (model, folder) in enumerate(written.models.items()):
        network, _ = checkpoint.load_classifier(folder)
        for k, stored in enumerate((data.natural, data.on_manifold)):
            np.testing.assert_array_equal(shown[m, k], stored[first_of, 0])
            with torch.no_grad():
                guess = network(torch.from_numpy(stored[first_of]).float() / 255).argmax(dim=1).tolist()
            marks = [("✓ ", "right") if g == y else ("✗ ", "wrong") for g, y in zip(guess, data.label[first_of], strict=True)]
            assert said[m, k].tolist() == [
                [mark + data.class_names[g], word] for g, (mark, word) in zip(guess, marks, strict=True)
            ]
        for k, attack in enumerate(LINES[2:]):
            if attack != "one":  # which the evaluation tries only on what is right
                expected = [data.class_names[predictions[model, attack, data.id[i]]] for i in first_of]
                assert [text[2:] for text, _ in said[m, 2 + k]] == expected
            attacked, difference = shown[m, 2 + 2 * k], shown[m, 3 + 2 * k]
            by = times[4 * m + k]
            # levels are rounded before they are shown, and `by` when it is printed
            assert np.abs(127.5 + by * (attacked - shown[m, 1]) - difference).max() <= 0.5 * by + 2
            assert difference.min() == 0 or difference.max() == 255
    assert len(set(page.alts)) == len(page.alts) // len(MODELS)


def test_page_names_everything_as_it_is_written(page: Page) -> None:
    assert page.headings[0] == "Robustness on somewhere"
    assert ["MLflow experiment", TITLE] in [row for table in page.tables for row in table]
    assert set(MODELS) <= set(page.headings)
    for name in {*COLUMNS["on_manifold"], *LINES}:
        assert name in page.texts, name
    assert page.tables[0][0][4] == GROUP


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


def pictures(html: str, section: str) -> list[tuple[str, ET.Element]]:
    """Titles and charts of a section, parsed as XML."""
    part = html.split(f'<h2 id="{section}">')[1].split("<h2")[0]
    drawn = [ET.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', part, flags=re.DOTALL)]
    return [(svg.attrib["aria-label"], svg) for svg in drawn]


def values(svg: ET.Element) -> list[str]:
    """What a pointer finds at the marks."""
    return [str(title.text) for title in svg.iter("title")]


def test_curves_over_eps_show_the_counted_numbers(written: Written) -> None:
    drawn = dict(pictures(written.html, "eps"))
    assert list(drawn) == [f"{PGD} on {name} test images {x}" for name, x in (("on-manifold", "g(w)"), ("natural", "x"))]
    for svg, set_name in zip(drawn.values(), COLUMNS, strict=True):
        said = values(svg)
        for model in MODELS:
            for eps, attack in (("0.01", f"{PGD} @ 0.01"), ("0.03", PGD), ("0.06", f"{PGD} @ 0.06")):
                share = 100 * sum(right(written.results.rows, model, set_name, [attack]).values()) / 12
                assert any(s.startswith(f"{model}: {share:.4g} (") and s.endswith(f" at {eps}") for s in said), (model, eps)
        assert len([p for p in svg.iter("path") if "band" in p.attrib["class"]]) == len(MODELS)


def test_trade_offs_show_the_table_and_say_which_columns(page: Page, written: Written) -> None:
    first, second = pictures(written.html, "trade-offs")[:2]
    table = page.tables[0]
    columns = table[0]
    mean = {c: sum(float(row[columns.index(c)]) for row in table[1:]) for c in (PGD, GROUP)}
    linf = min(mean, key=lambda c: mean[c])
    assert first[0] == f"clean accuracy and accuracy under {linf}"
    assert second[0] == "clean accuracy and accuracy under PGD L2", "what is neither L-infinity nor on the manifold"
    for column, (_, svg) in ((linf, first), ("PGD L2", second)):
        assert values(svg) == [f"{row[0]}: {row[1]} and {row[columns.index(column)]}" for row in table[1:]]


def test_transfer_is_counted_by_hand(page: Page, written: Written) -> None:
    tables = [t for t, c in zip(page.tables, page.classes, strict=True) if c == "heat" and "judged by" in t[0][0]]
    wanted = [("on_manifold", PGD), ("natural", PGD), ("on_manifold", "OM-PGD")]
    for table, (set_name, attack) in zip(tables, wanted, strict=True):
        assert table[0][1:] == MODELS
        for row in table[1:]:
            found = [right(written.results.rows, judge, set_name, [attack], row[0]).values() for judge in MODELS]
            assert row[1:] == [f"{100 * sum(f) / 12:.1f}" for f in found]


def test_confusions_are_counted_by_hand(page: Page, written: Written, set_folder: Path) -> None:
    names = list(open_set(set_folder, "test").class_names)
    tables = [t for t, c in zip(page.tables, page.classes, strict=True) if c == "heat" and "taken for" in t[0][0]]
    rows = written.results.rows.to_pylist()
    for set_name in COLUMNS:
        mean = {c: sum(float(shares(written.results.rows, m, set_name)[COLUMNS[set_name].index(c)]) for m in MODELS)
                for c in (PGD, "PGD L2", GROUP)}  # fmt: skip
        image = min(mean, key=lambda c: mean[c])
        for model in MODELS:
            for column in ("clean", image, *(["OM-PGD"] if set_name == "on_manifold" else [])):
                expected = np.zeros((3, 3), int)
                mine = [r for r in rows if (r["model"], r["source"], r["set"]) == (model, model, set_name)]
                for id in {r["id"] for r in mine}:
                    order = ["clean", "one", "two"] if column == GROUP else [column]
                    met = [next(r for r in mine if (r["id"], r["attack"]) == (id, a)) for a in order
                           if any((r["id"], r["attack"]) == (id, a) for r in mine)]  # fmt: skip
                    last = next((r for r in met if not r["correct"]), met[-1])
                    expected[last["label"], last["prediction"]] += 1
                table = tables.pop(0)
                assert table[0][1:] == [row[0] for row in table[1:]] == names
                assert [[int(c) for c in row[1:]] for row in table[1:]] == expected.tolist()
    assert tables == []


def test_a_thousand_classes_cost_what_the_page_shows_of_them() -> None:
    """Pairs that were confused, and no lists of all the million that there might be."""
    labels, taken = [7] * 30 + [900] * 20 + [3] * 10, [8] * 30 + [901] * 20 + [3] * 10
    rows = [
        {"model": "m", "source": "m", "set": "natural", "attack": attack, "id": f"{i:02d}", "label": label, "prediction": other}
        | {"correct": label == other}
        for attack in ("clean", "PGD")
        for i, (label, other) in enumerate(zip(labels, taken, strict=True))
    ]
    attacks = [{"threat": "clean", "name": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.1}]
    results = Results(pa.Table.from_pylist(rows), EvaluationConfig.model_validate({"sets": ["natural"], "attacks": attacks}))
    (table,) = report_values.tables(results, ["m"])
    tracemalloc.start()
    try:
        (found,) = report_values.confusions(results, table, [f"class {k}" for k in range(1000)])
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000
    assert [part["name"] for part in found["tables"]] == ["clean", "PGD"]
    for part in found["tables"]:
        assert [(pair["label"], pair["taken"], pair["count"]) for pair in part["most"]] == [
            ("class 7", "class 8", 30),
            ("class 900", "class 901", 20),
        ]


def test_checks_are_shown(page: Page, written: Written) -> None:
    text = " ".join(" ".join(page.texts).split())
    assert {f.level for f in written.findings} == {"ok", "warning"}
    for f in written.findings:
        assert " ".join(f.text.split()) in text
    first = written.html.index("<strong>Warning:</strong>")
    assert written.html.index("<h1>") < first < written.html.index("<h2>")
    drawn = dict(pictures(written.html, "checks"))
    names = [PGD, "PGD L2", "one", "two", "OM-PGD"]
    assert list(drawn) == [f"{what} over the steps of {name}" for name in names for what in ("loss", "accuracy")]
    for measured in written.measurements:
        for name in names:
            said = values(drawn[f"loss over the steps of {name}"])
            losses = measured["attacks"][name]["loss"]
            assert [s for s in said if s.startswith(f"{measured['model']}: ")] == [
                f"{measured['model']}: {loss:.4g} at {step}" for step, loss in enumerate(losses)
            ]


def test_training_curves_are_drawn_for_every_metric_that_was_reported(written: Written) -> None:
    drawn = dict(pictures(written.html, "training"))
    assert list(drawn) == ["training loss (each method its own)", "held-out accuracy, clean", "held-out accuracy, image attack"]
    for svg in drawn.values():
        assert len(values(svg)) == 3 * len(MODELS)


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


def test_models_are_compared_below_each_table(written: Written, page: Page) -> None:
    results, head = written.results, f"{MODELS[1]} − {MODELS[0]}"
    with written.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for set_name in results.config.sets:
        columns = [column for column in results.columns(set_name) if column != "UAR"]
        (table,) = [table for table in page.tables if any(row[0] == head for row in table) and len(table[0]) == len(columns) + 1]
        assert table[0] == ["difference", *columns]
        assert len(table) == 1 + len(MODELS) * (len(MODELS) - 1) // 2
        (row,) = [row for row in table if row[0] == head]
        for column, cell in zip(columns, row[1:], strict=True):
            first, second = (results.per_example(model, set_name, column) for model in MODELS[1::-1])
            said = re.fullmatch(r"(\S+) \((\S+) to ([^,]+)(?:, p (.+))?\)", cell.replace("−", "-"))
            assert said is not None
            value, low, high = map(float, said.groups()[:3])
            assert value == pytest.approx(100 * (first - second).mean(), abs=0.051)
            assert low <= value <= high
            if column == "mean":
                assert said[4] is None
                continue
            better, worse = int((first > second).sum()), int((first < second).sum())
            chance = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
            assert float(said[4]) == pytest.approx(chance, rel=0.05)
            (line,) = [r for r in rows if (r["table"], r["set"], r["attack"]) == ("difference", set_name, column)]
            assert (line["method"], line["source"]) == (MODELS[1], MODELS[0])
            assert 100 * float(line["accuracy"]) == pytest.approx(value, abs=0.051)


@pytest.mark.parametrize(
    ("low", "high", "chance", "marked"),
    [(0.01, 0.2, 0.01, True), (-0.2, -0.01, None, True), (0.01, 0.2, 0.062, False), (-0.01, 0.2, 0.01, False)],
)
def test_a_difference_is_marked_if_interval_and_p_agree(low: float, high: float, chance: float | None, marked: bool) -> None:
    assert report_values.differs(Difference(0.0, low, high, chance, 100)) == marked
    assert report_values.points(Difference(0.0, low, high, chance, 100)).startswith("0.0 (")


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
    assert report_values.described(config.attacks[0]) == words


def test_a_summary_says_what_it_lacks_on_natural_images(written: Written) -> None:
    markdown = written.path.with_suffix(".md").read_text()
    (line,) = [line for line in markdown.replace("\\", "").splitlines() if line.startswith("- **mean**: ")]
    assert line.endswith("OM-PGD (on natural test images x without OM-PGD)")


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


def test_every_test_set_has_its_own_unit_of_the_gallery(config: Config) -> None:
    """Files of units are kept: one of both sets would show both on a later page of one, or one on a page of both."""
    labels, keys = np.arange(4) % 2, {}
    for sets in (("on_manifold",), ("natural",), ("natural", "on_manifold")):
        evaluated = config.evaluation.model_copy(update={"sets": sets})
        work = gallery.units(["at"], evaluated, labels, np.arange(4))
        assert [unit.set for unit in work if not unit.attack] == sorted(sets)
        keys[sets] = {units.key_of(unit, evaluated, {"models": {"at": "0"}}) for unit in work}
        assert len(keys[sets]) == len(work)
    both = keys["natural", "on_manifold"]
    assert keys[("on_manifold",)] < both
    assert len(keys[("natural",)] & both) == 1  # attacks are shown on the manifold where that is evaluated


def test_big_suites_show_the_first_attacks_of_the_gallery(
    tmp_path: Path, make_config: Callable[..., Config], set_folder: Path
) -> None:
    attacks = [{"threat": "image", "name": f"PGD {k}", "eps": 0.1, "steps": 1} for k in range(15)]
    found = write_page(tmp_path, make_config(evaluation={"attacks": attacks}), set_folder, ["only"], check=False)
    page = Page(found.html)
    assert len(page.images) == 3 * (2 + 2 * 12)
    assert "3 attacks are not shown: PGD 12, PGD 13, PGD 14." in page.texts
