"""What the page shows below its tables of accuracy: curves, transfer, confusions, checks and differences, as counted by hand."""

import csv
import re
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from report_pages import COLUMNS, Page, pictures, right, shares, values, whole_page
from tiny_page import EVALUATION, GROUP, MODELS, PGD, TITLE, Written

from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation.intervals import Difference
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import rows_to_run
from dmat_ray.reports import report_text, report_values

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
        # images that are wrong without an attack are in it, which is no success of one
        assert words_of(svg) == ["eps", "accuracy (%)", "error under attack (%)"]
    assert "attack success" not in written.html.lower()


def words_of(chart: ET.Element) -> list[str]:
    """The texts of a chart that are no numbers."""
    return [text.text for text in chart.iter("text") if text.text and not re.fullmatch(r"[\d.]+", text.text)]


def test_a_curve_says_which_of_two_radii_changes_along_it() -> None:
    """Of a joint threat that in pixels alone: at its beginning the move along the manifold is there."""
    joint = {"threat": "joint", "name": "both", "eps": 0.1, "scale": "std", "latent_eps": 0.2, "curve": [0.0, 0.2]}
    attacks = [{"threat": "clean"}, joint, {"threat": "latent", "name": "OM", "eps": 0.1, "curve": [0.2]}]
    config = EvaluationConfig.model_validate({"attacks": attacks, "sets": ["on_manifold"]})
    run = rows_to_run(config)
    assert {run[name].latent_eps for name in ("both", "both @ 0", "both @ 0.2")} == {0.2}  # type: ignore[union-attr]
    rows = [
        {"model": "at", "source": "at", "set": "on_manifold", "attack": name, "id": id, "correct": id != wrong, "label": 0}
        for name, wrong in zip(run, "abcdef", strict=True)
        for id in "abcdef"
    ]
    results = Results(pa.Table.from_pylist(rows), config)
    drawn = {chart["title"].split(" on ")[0]: ET.fromstring(chart["svg"]) for chart in report_values.curves(results, ["at"])}
    labels = {name: words_of(svg) for name, svg in drawn.items()}
    both = "eps of pixels (latent_eps stays 0.2 std)"
    assert labels == {name: [x, "accuracy (%)", "error under attack (%)"] for name, x in (("both", both), ("OM", "eps"))}
    heads = re.findall(r"## (.*) on on", report_text.markdown("page", results, ["at"], [], [], "").replace("\\", ""))
    assert heads == [f"both over {both}", "OM over eps"]


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
