"""Methods that were trained with several seeds: which models they are, and what table, page, Markdown and CSV say of them."""

import csv
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from galleries import gallery_here
from rendered import Rendered
from tiny_page import EVALUATION, Written, write_page

from dmat_ray import presets
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models import checkpoint, methods, trained_settings
from dmat_ray.models.methods import Method
from dmat_ray.reports import report, report_methods, report_text, report_values, terminal
from dmat_ray.storage import at

pytestmark = pytest.mark.slow

COLUMNS = ["clean", "PGD", "OM-PGD", "mean"]


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    attacks = [{**row, "name": COLUMNS[k]} for k, row in enumerate(EVALUATION["attacks"][i] for i in (0, 1, 5))]
    ratio = {"name": "UAR", "how": "uar", "of": ["PGD", "OM-PGD"], "trained": [0.5, 0.5]}
    return make_config(evaluation={"attacks": attacks, "summaries": [{"name": "mean", "how": "mean", "of": ["PGD"]}, ratio]})


def run(config: Config, seed: int = 0, settings: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """The run.json of a finished training."""
    of = Config.model_validate(presets.merge(config.to_json(), {**(settings or {}), "name": f"any-{seed}"}))
    of = of.model_copy(update={"training": of.training.model_copy(update={"seed": seed})})
    return {**checkpoint.describe_run(of, ("a", "b"), 1, 8, "g", "s"), "finished": True, **others}


def test_models_that_differ_in_their_seeds_alone_are_trainings_of_one_method(config: Config) -> None:
    other = {"objective": {"image": {"eps": 0.07}}}
    runs = {"dmat-10": run(config, 10), "at-0": run(config, 0, other), "dmat-2": run(config, 2), "at-1": run(config, 1, other)}
    runs["dmat-11"] = run(config, 11, {"output": "elsewhere", "cluster": {"train_workers": 3}})
    assert methods.among(runs) == [
        Method("dmat", {2: "dmat-2", 10: "dmat-10", 11: "dmat-11"}),
        Method("at", {0: "at-0", 1: "at-1"}),
    ]
    before = run(config, 1)
    del before["config"]["training"]["flip"]  # of a version that had no such setting
    assert methods.among({"a-0": run(config), "a-1": before}) == [Method("a", {0: "a-0", 1: "a-1"})]


@pytest.mark.parametrize("shared", [True, False])
def test_models_that_went_on_from_trainings_of_one_method_are_trainings_of_one_method(config: Config, shared: bool) -> None:
    """From one of them, or each from its own, which its lineage says the seed of only if it is another."""

    def went_on(seed: int, epochs: int) -> dict[str, Any]:
        of, base = run(config, seed, {"training": {"lr_values": [0.01] * 2}}), run(config, 0 if shared else seed + 1)
        line = trained_settings.ancestor({**base, "epoch": epochs}, Config.model_validate(of["config"]))
        return {**of, "lineage": [{**line, "name": f"base-{seed}"}]}

    found = methods.among({**{f"ft-{seed}": went_on(seed, 3) for seed in range(3)}, "longer-3": went_on(3, 4)})
    assert found == [Method("ft", {seed: f"ft-{seed}" for seed in range(3)}), Method("longer-3", {3: "longer-3"})]


@pytest.mark.parametrize(
    ("seed", "settings", "others"),
    [
        (1, {"training": {"epochs": 9}}, {}),
        (1, {"classifier": {"name": "resnet18"}}, {}),
        (1, {}, {"set_sha256": "another"}),
        (1, {}, {"generator_sha256": "another"}),
        (1, {}, {"lineage": [{"name": "x", "epoch": 3, "settings": {"training.lr": 1.0}}]}),
        (1, {}, {"finished": False}),
        (0, {}, {}),
    ],
)
def test_others_are_methods_of_their_own(config: Config, seed: int, settings: Any, others: Any) -> None:
    found = methods.among({"dmat-0": run(config), "dmat-1": run(config, seed, settings, **others)})
    assert [(m.name, m.models) for m in found] == [("dmat-0", ["dmat-0"]), ("dmat-1", ["dmat-1"])]


def test_imported_models_are_methods_of_their_own(config: Config) -> None:
    imported = [run(config, seed, set_sha256=None, generator_sha256=None) for seed in (0, 1)]
    assert [m.models for m in methods.among(dict(zip("ab", imported, strict=True)))] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["dmat-0", "dmat-1"], "dmat"),
        (["dmat-10", "dmat-11"], "dmat"),
        (["dmat", "dmat-1", "dmat-2"], "dmat"),
        (["resnet18", "resnet18_1"], "resnet18"),
        (["wide_best_seed0", "wide_best_seed1"], "wide_best"),
        (["adversaries1", "adversaries2"], "adversaries"),
        (["dmat_s-0", "dmat_s-1"], "dmat_s"),
        (["dmat-run-seed-8", "dmat-run-seed-10"], "dmat-run"),
        (["at", "at1", "at2"], "at"),
        (["eps1.0", "eps1.5"], "eps1.0, eps1.5"),
        (["dmat_first", "dmat_final"], "dmat_first, dmat_final"),
        (["one", "two"], "one, two"),
        (["other-1", "other-2"], "other-1, other-2"),
    ],
)
def test_methods_are_called_by_what_their_models_have_in_common(config: Config, names: list[str], method: str) -> None:
    runs = {name: run(config, seed) for seed, name in enumerate(names)}
    found = methods.among({**runs, "other": run(config, 0, {"training": {"epochs": 9}})})
    assert [m.name for m in found] == [method, "other"]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [([0, 1, 2], [0, 1, 2], [0, 1, 2]), ([0, 1, 2], [1, 2], [1, 2]), ([1, 2, 3], [0, 1, 2], []), ([0, 1], [0], [])],
)
def test_trainings_are_pairs_where_no_seed_of_a_method_is_left_over(one: list[int], other: list[int], shared: list[int]) -> None:
    sides = [Method(name, {seed: f"{name}-{seed}" for seed in seeds}) for name, seeds in (("a", one), ("b", other))]
    assert sides[0].seeds_shared(sides[1]) == sides[1].seeds_shared(sides[0]) == shared


SEEDS = {"dmat": [0, 1, 2], "at": [0, 1, 2], "trades": [2, 3], "alone": [0]}
NAMES = [f"{method}-{seed}" for method, seeds in SEEDS.items() for seed in seeds]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Written:
    """A page of models that are said to be trainings, of three methods with several seeds and one with a single one."""
    found = write_page(tmp_path_factory.mktemp("page"), config, set_folder, NAMES, history=False, check=False)
    before = {suffix: found.path.with_suffix(suffix).read_bytes() for suffix in (".md", ".csv")}
    assert b"trainings" not in before[".csv"], "of one seed each the page is as it was"
    assert b"over trainings" not in before[".md"]
    assert "By method" not in found.html
    for k, (name, folder) in enumerate(found.models.items()):
        method, seed = name.split("-")
        said = at(folder) / "run.json"
        settings = {"training": {"seed": int(seed)}, "objective": {"image": {"eps": 0.01 * (1 + list(SEEDS).index(method))}}}
        told = said.read_json()
        said.write_json({**told, "finished": True, "config": presets.merge(told["config"], {"name": f"{k}", **settings})})
    shown = gallery_here(config, set_folder, found.models)
    report.write(config, set_folder, found.models, found.results, ([], []), found.path, shown)
    return found


def read(written: Written, set_name: str) -> tuple[list[list[str]], list[list[str]]]:
    """The tables of means and of differences of a test set, in Markdown."""
    tables = Rendered(written.path.with_suffix(".md").read_text()).tables
    means = [table for table in tables if table[0][:2] == ["method", "trainings"]]
    apart = [table for table in tables if table[0][:2] == ["difference", "trainings"]]
    k = list(written.results.config.sets).index(set_name)
    return means[k], apart[k]


def of_trainings(written: Written, method: str, set_name: str, column: str) -> np.ndarray:
    return np.stack([written.results.per_example(f"{method}-{seed}", set_name, column) for seed in SEEDS[method]])


def expected(moved: np.ndarray, other: np.ndarray | None = None) -> tuple[float, float]:
    """Mean and half of its interval, by the formula of the documents."""
    images = moved.mean(axis=0) if other is None else moved.mean(axis=0) - other.mean(axis=0)
    parts = [(images.var(ddof=1) / images.size, images.size - 1)]
    parts += [(side.mean(axis=1).var(ddof=1) / len(side), len(side) - 1) for side in (moved, other) if side is not None]
    error = sum(part for part, _ in parts)
    freedom = error**2 / sum(part**2 / own for part, own in parts)
    return 100 * images.mean(), 100 * scipy.stats.t.ppf(0.975, freedom) * error**0.5


@pytest.mark.parametrize("set_name", ["on_manifold", "natural"])
def test_means_over_trainings_are_those_of_the_rows(written: Written, set_name: str) -> None:
    means, _ = read(written, set_name)
    columns = [column for column in COLUMNS if (set_name, column) != ("natural", "OM-PGD")]
    assert means[0] == ["method", "trainings", *columns], "a ratio of means is none over images"
    assert [row[:2] for row in means[1:]] == [["dmat", "3"], ["at", "3"], ["trades", "2"], ["alone-0", "1"]]
    for (method, _, *cells), column in itertools.product(means[1:4], columns):
        value, half = map(float, cells[columns.index(column)].split(" ± "))
        rows = of_trainings(written, method, set_name, column)
        assert (value, half) == pytest.approx(expected(rows), abs=0.051) or rows.std() == 0
    (alone,) = [row[2:] for row in means[1:] if row[0] == "alone-0"]
    wilson = [written.results.accuracy("alone-0", set_name, column) for column in columns]
    spread = [f"{100 * a.value:.1f} ± {50 * (a.high - a.low):.1f}" for a in wilson]
    assert alone[:-1] == spread[:-1]
    page = " ".join(Rendered(written.path.with_suffix(".md").read_text()).texts)
    assert "dmat (dmat-0, dmat-1, dmat-2); at (at-0, at-1, at-2); trades (trades-2, trades-3)." in page
    assert "Of one training, and not compared here: alone-0." in page


@pytest.mark.parametrize("set_name", ["on_manifold", "natural"])
def test_methods_are_compared_by_pairs_of_seeds_where_these_fit(written: Written, set_name: str) -> None:
    _, apart = read(written, set_name)
    found = {row[0]: row[1:] for row in apart[1:]}
    assert {title: row[0] for title, row in found.items()} == {
        "at − dmat": "3 pairs",
        "trades − dmat": "2 and 3, not paired",
        "trades − at": "2 and 3, not paired",
    }
    for title, column in itertools.product(found, apart[0][2:]):
        cell = found[title][apart[0].index(column) - 1].replace("−", "-")
        said = re.fullmatch(r"(\S+) \((\S+) to (\S+?)(?:, p (\S+))?\)", cell)
        assert said is not None
        value, low, high = map(float, said.groups()[:3])
        first, second = (of_trainings(written, method, set_name, column) for method in title.split(" − "))
        middle, half = expected(first - second) if len(first) == len(second) else expected(first, second)
        if (first.mean(axis=0) - second.mean(axis=0)).std() > 0:
            assert (value, (high - low) / 2) == pytest.approx((middle, half), abs=0.101)
            assert (low > 0 or high < 0) == (float(said[4]) < 0.05) or min(abs(low), abs(high)) < 0.1


def test_page_terminal_and_csv_say_the_same(written: Written) -> None:
    told, html = terminal.terminal_methods(written.results, written.models), written.html
    with written.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert told.count("mean accuracy (%) over trainings") == html.count("<h3>By method: mean accuracy (%) over trainings") == 2
    assert max(map(len, told.splitlines())) <= 110
    for set_name in ("on_manifold", "natural"):
        means, apart = read(written, set_name)
        for row in (*means[1:], *apart[1:]):
            assert all(f">{cell}</td>" in html for cell in row[1:])
        cells = [cell for row in means[1:] for cell in row[2:]]
        assert [cell for cell in cells if cell not in told] == []
        lines = {(r["method"], r["attack"]): r for r in rows if (r["table"], r["set"]) == ("mean over trainings", set_name)}
        assert {method for method, _ in lines} == {"dmat", "at", "trades"}
        for (method, column), line in lines.items():
            (row,) = [row for row in means if row[0] == method]
            value, half = float(line["accuracy"]), (float(line["high"]) - float(line["low"])) / 2
            assert row[means[0].index(column)] == f"{round(100 * value, 6):.1f} ± {round(100 * half, 6):.1f}"
            assert (line["count"], line["trainings"]) == ("12", str(len(SEEDS[method])))
        differences = [r for r in rows if (r["table"], r["set"]) == ("difference over trainings", set_name)]
        assert {(r["method"], r["source"], r["trainings"]) for r in differences} == {
            ("at", "dmat", "3"),
            ("trades", "dmat", "2 and 3"),
            ("trades", "at", "2 and 3"),
        }
    assert {r["trainings"] for r in rows if "over trainings" not in r["table"]} == {""}
    marked = [re.sub("<.*?>", "", cell) for cell in re.findall(r'<td class="best">[+−].*?</td>', html)]
    of_methods = [cell for cell in marked if any(cell in row for s in written.results.config.sets for row in read(written, s)[1])]
    assert told.count("*") - 2 == len(of_methods), "two lines say what the mark is"


def test_a_difference_that_excludes_nothing_is_marked_and_others_are_not() -> None:
    """Of three trainings each; on one attack methods differ far more than their trainings, on the other as much."""
    right = {"dmat": {"clean": (30, 31, 32), "PGD": (30, 22, 14)}, "at": {"clean": (12, 13, 11), "PGD": (14, 23, 18)}}
    rows = [
        {"model": f"{method}-{seed}", "source": f"{method}-{seed}", "set": "natural", "attack": attack, "id": f"{i:02d}"}
        | {"correct": i < counts[seed]}
        for method, found in right.items()
        for attack, counts in found.items()
        for seed, i in itertools.product(range(3), range(40))
    ]
    attacks = [{"threat": "clean", "name": "clean"}, {"threat": "image", "name": "PGD"}]
    evaluation = EvaluationConfig.model_validate({"sets": ["natural"], "attacks": attacks})
    results = Results(pa.Table.from_pylist(rows), evaluation)
    trained = [Method(method, {seed: f"{method}-{seed}" for seed in range(3)}) for method in ("at", "dmat")]
    found = report_methods.tables(results, trained)
    (apart,) = found["natural"].differences
    assert apart.cells["clean"].value == pytest.approx((93 - 36) / 120)
    assert [report_values.differs(one) for one in apart.cells.values()] == [True, False]
    text = report_text.markdown("title", results, results.models, [], [], "", found)
    (line,) = [line for line in text.splitlines() if line.startswith("| dmat − at |")]
    clean, pgd = line.strip("| ").split(" | ")[2:]
    assert (clean[:8], pgd[:6]) == ("**+47.5 ", "+9.2 (")
    assert report_methods.tables(results, [Method(model, {0: model}) for model in results.models]) == {}


def test_a_single_training_of_each_method_says_nothing_of_methods(written: Written) -> None:
    some = {name: written.models[name] for name in ("dmat-0", "at-1", "alone-0")}
    assert terminal.terminal_methods(written.results, some) == ""
