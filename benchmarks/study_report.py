"""Tables of a study (`benchmarks/study.py`) as Markdown: what was measured, and what it says to the paper's claims.

    python benchmarks/study_report.py runs/study/mnist --pack benchmarks/results/mnist
    python benchmarks/study_report.py benchmarks/results/mnist --page docs/results/mnist.md --headline README.md

No number is typed by hand. A cell is the mean over the models of a method and the half of its 95 % interval, which counts both
draws: that of the test images (by the spread over images of the mean over models) and that of the seeds (by the spread of the
models' accuracies, few as they are: Student's t by Welch and Satterthwaite; of three seeds that differ much it covers 92 %, says
the simulation in tests/test_study.py). A difference of two methods is taken image by image and seed by seed, on the same images.
--page writes the whole page, --headline the short table between the marks of a file. --pack keeps what the page is made of,
without the models, in a folder that this script reads as it reads the study's own.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from scipy import stats
from study_methods import ABLATIONS, METHODS, TABLE, WORST, version_of, worst_case

from dmat_ray import cli, suites
from dmat_ray.config import EvaluationConfig
from dmat_ray.data.sources import NAMED
from dmat_ray.errors import UserError
from dmat_ray.files import read_json
from dmat_ray.metrics import Results
from dmat_ray.report_values import SET_NAMES, columns_described, in_levels
from dmat_ray.units import VERSION

HEADLINE = ("clean", "PGD-50", "OM-PGD-50", "L2", "PGD-50 L2", "fog", "unseen mean", "worst")
STUDIES = {
    "mnist": ("MNIST-5k", "make results"),
    "cifar5": ("five classes of CIFAR-10", "make results CIFAR10=FOLDER"),
}
"""Folder of a study -> its data set, and the command that makes all of it."""
KEPT = ["model", "source", "set", "attack", "id", "label", "prediction", "correct"]
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
BESIDE = ("PGD-50", "APGD-CE", "APGD-DLR")  # of the study's own attacks, set beside AutoAttack
REMEASURED = "remeasured.json"  # what benchmarks/remeasure.py writes beside the rows
NEAR = 2.0  # points of accuracy that count as comparable
# those of the claims; of two names the one that a study's suite has
UNSEEN = ("L2", "PGD-50 L2", "fog", "snow", "elastic", "gabor", "jpeg L1", "jpeg", "L1", "PGD-50 L1", "stadv")


@dataclass(frozen=True)
class Claim:
    """`better` has a larger accuracy than `than` in a column; with `comparable` one not smaller by more than NEAR points."""

    text: str
    better: str
    than: str
    column: str
    comparable: bool = False


def claims(columns: list[str]) -> list[Claim]:
    """Those of the paper's abstract, as far as a test set has the columns."""
    image = next((c for c in columns if c.startswith("PGD-")), "")
    latent = next((c for c in columns if c.startswith("OM-PGD")), "")
    found = [
        Claim("DMAT has a better clean accuracy than AT", "dmat", "at", "clean"),
        Claim("DMAT is about as robust to L∞ as AT", "dmat", "at", image, comparable=True),
        Claim("DMAT is more robust to unseen attacks than AT", "dmat", "at", "unseen mean"),
        *(
            Claim(f"DMAT is more robust to {c} than AT", "dmat", "at", c)
            for c in UNSEEN
        ),
        Claim("AT is not robust on the manifold, DMAT is more", "dmat", "at", latent),
        Claim("OM-AT is not robust to L∞, DMAT is more", "dmat", "om_at", image),
        Claim("OM-AT has a better clean accuracy than standard training", "om_at", "standard", "clean"),
        Claim("DMAT with TRADES is more robust to unseen attacks than TRADES", "dmat_trades", "trades", "unseen mean"),
        *(
            Claim(f"{name} is more robust than DMAT in its worst case over all attacks", method, "dmat", "worst")
            for method, name in (("joint", "The joint threat"),
                                 ("joint_plus", "The joint threat, with averaged and perturbed weights,"),
                                 ("dmat_trades", "DMAT with TRADES"),
                                 ("dmat_trades_plus", "DMAT with TRADES, averaged and perturbed weights"),
                                 ("dmat_trades_wide", "DMAT with TRADES, averaged and perturbed weights, twice the radius,"))
        ),
        *(
            Claim(f"DMAT with {terms} is {better} than {name} {where}", with_more, method, column)
            for with_more, terms in (("dmat_recolor", "ReColorAdv as a third term"),
                                     ("dmat_fog_recolor", "fog and ReColorAdv as further terms"),
                                     ("dmat_fog_recolor_stadv", "fog, ReColorAdv and StAdv as further terms"))
            for method, name in (("dmat", "DMAT"), ("at", "AT"))
            for column, better, where in (("worst", "more robust", "in its worst case over all attacks"),
                                          ("clean", "more accurate", "on clean images"))
        ),
        Claim("DMAT with ReColorAdv is about as robust to L∞ as AT", "dmat_recolor", "at", image, comparable=True),
        Claim("DMAT with fog and ReColorAdv is about as robust to L∞ as AT", "dmat_fog_recolor", "at", image, comparable=True),
        Claim("DMAT with all three is about as robust to L∞ as AT", "dmat_fog_recolor_stadv", "at", image, comparable=True),
        *(
            Claim(f"DMAT with fog and ReColorAdv is more robust to {c} than DMAT", "dmat_fog_recolor", "dmat", c)
            for c in (image, *(c for c in UNSEEN if c != "fog"))
        ),
        Claim("DMAT with twice the radius is more robust than DMAT in its worst case", "dmat_eps_20", "dmat", "worst"),
        *(
            Claim(f"With twice the radius in both, DMAT is better than AT {where}", "dmat_eps_20", "at_eps_20", column)
            for column, where in (("clean", "on clean images"), ("unseen mean", "under unseen attacks"),
                                  (latent, "on the manifold"), ("worst", "in its worst case"))
        ),
    ]  # fmt: skip
    return [claim for claim in found if claim.column in columns]


@dataclass(frozen=True)
class Estimate:
    """A mean with the half of its 95 % interval, in points, how many models are behind it, and the t that the interval is of."""

    value: float
    half: float
    models: int
    error: float = 0.0
    freedom: float = math.inf

    def chance(self, of: float) -> float:
        """Two-sided p-value of the mean being `of`; 1 where all values were the same, which no t is of."""
        return float(2 * stats.t.sf(abs(self.value - of) / self.error, self.freedom)) if self.error else 1.0

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half:.1f}"


def estimate(models: Sequence[np.ndarray]) -> Estimate:
    """Of values in [-1, 1], a row a model of (N) examples, which are the same for all models."""
    values = 100 * np.stack(models)
    count, examples = values.shape
    of_images = values.mean(axis=0).std(ddof=1) ** 2 / examples
    of_seeds = values.mean(axis=1).std(ddof=1) ** 2 / count if count > 1 else 0.0
    variance = of_images + of_seeds
    if variance == 0:  # all the same: what may still be is 3 of N, by the rule of three
        return Estimate(float(values.mean()), 300.0 / examples, count)
    # few seeds: Student's t with the degrees of freedom of a sum of two variances (Welch, Satterthwaite)
    freedom = variance**2 / (of_images**2 / (examples - 1) + of_seeds**2 / max(count - 1, 1))
    error = math.sqrt(variance)
    return Estimate(float(values.mean()), float(stats.t.ppf(0.975, freedom)) * error, count, error, freedom)


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of claims that are made together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(chances, kind="stable")
    together = np.empty(len(chances))
    together[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(chances)[order] * np.arange(len(chances), 0, -1)))
    return [float(p) for p in together]


class Study:
    """A study's rows, by method and seed."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "rows").is_dir():
            raise UserError(f"there are no rows in '{folder}'; run benchmarks/study.py")
        self.folder, self.notes = folder, read_json(folder / "study.json")
        self.config = cli.validate(yaml.safe_load((folder / "settings.yaml").read_text()))
        self.results = self._read("rows", {})
        self.clean = self._read("clean", {"suites": [], "attacks": [{"threat": "clean", "name": "clean"}]})
        self.worst: Results | None = None
        if (folder / "worst").is_dir():
            self.worst = self._read("worst", {"suites": [], "attacks": worst_case(self.config.evaluation)})
        names = [name.rsplit("-", 1) for name in self.results.models if name in self.clean.models]
        self.seeds = {method: sorted(int(s) for m, s in names if m == method) for method, _ in names}

    def _read(self, kind: str, settings: dict[str, Any]) -> Results:
        files = sorted((self.folder / kind).glob("*.parquet"))
        if not files:
            raise UserError(f"there are no rows in '{self.folder / kind}'; run benchmarks/study.py")
        evaluation = self.config.evaluation.model_dump(mode="json")
        evaluation |= {**({"summaries": [], "transfer": []} if settings else {}), **settings}
        config = cli.validate({**self.config.to_json(), "evaluation": evaluation}).evaluation
        return Results(pa.concat_tables([pq.read_table(file) for file in files]), config)

    @cached_property
    def methods(self) -> list[str]:
        """Those of the main tables, in their order."""
        return [method for method in TABLE if method in self.seeds]

    def of_examples(self, method: str, seed: int, set_name: str, column: str) -> np.ndarray:
        """Right or not, of each example; `clean` of all test images."""
        results = self.clean if column == "clean" else self.results
        return results.per_example(f"{method}-{seed}", set_name, column)

    def cell(self, method: str, set_name: str, column: str, seeds: Sequence[int] | None = None) -> Estimate:
        """Of all models of a method, or of some."""
        chosen = self.seeds[method] if seeds is None else seeds
        return estimate([self.of_examples(method, seed, set_name, column) for seed in chosen])

    def columns(self, set_name: str) -> list[str]:
        """Those whose cells are means over examples."""
        ratios = {summary.name for summary in self.config.evaluation.summaries if summary.how == "uar"}
        return [column for column in self.results.columns(set_name) if column not in ratios]

    def difference(self, claim: Claim, set_name: str) -> Estimate | None:
        """Of two methods, on the seeds that both have; None if there are none."""
        both = sorted(set(self.seeds.get(claim.better, ())) & set(self.seeds.get(claim.than, ())))
        better, than = (
            [self.of_examples(method, seed, set_name, claim.column) for seed in both] for method in (claim.better, claim.than)
        )
        return estimate([a - b for a, b in zip(better, than, strict=True)]) if both else None

    def table(
        self, methods: Sequence[str], set_name: str, columns: Sequence[str], seeds: Sequence[int] | None = None
    ) -> list[str]:
        """Methods by columns, of each column the best in bold."""
        cells = {(m, c): self.cell(m, set_name, c, seeds) for m in methods for c in columns}
        best = {c: max(round(cells[m, c].value, 1) for m in methods) for c in columns}
        lines = [f"| method | models | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
        for m in methods:
            shown = [f"**{cells[m, c]}**" if round(cells[m, c].value, 1) == best[c] else str(cells[m, c]) for c in columns]
            lines.append(f"| {m} | {len(self.seeds[m] if seeds is None else seeds)} | {' | '.join(shown)} |")
        return lines

    def verdicts(self, set_name: str) -> list[str]:
        """Each claim with the difference behind it."""
        made = [(c, found) for c in claims(self.columns(set_name)) if (found := self.difference(c, set_name)) is not None]
        settled = [(c, found) for c, found in made if found.models > 1]
        together = dict(zip((c for c, _ in settled), holm([found.chance(_bound(c)) for c, found in settled]), strict=True))
        lines = ["| claim | column | difference in points | models | | p, all together |", "|---|---|---|---|---|---|"]
        for claim, found in made:
            shown = f"{found.value:+.1f} ± {found.half:.1f}"
            told, p = (verdict(found, _bound(claim)), _chance(together[claim])) if claim in together else ("open (one seed)", "")
            if told != "open" and together.get(claim, 1.0) < 0.05:
                told = f"**{told}**"
            lines.append(f"| {claim.text} | {claim.column} | {shown} | {found.models} | {told} | {p} |")
        return lines

    def worst_of_others(self, method: str, seed: int, set_name: str) -> np.ndarray:
        """What stands every attack, of the test images that `results` has not."""
        assert self.worst is not None
        model = f"{method}-{seed}"
        others = ~np.isin(self.worst.ids(model, set_name), self.results.ids(self.results.models[0], set_name))
        found: np.ndarray = self.worst.per_example(model, set_name, WORST)[others]
        return found

    def worst_cases(self) -> list[str]:
        """Methods by test sets, and each method's difference to DMAT and to AT."""
        if self.worst is None:
            return []
        names = (name.rsplit("-", 1) for name in self.worst.models)
        seeds: dict[str, list[int]] = {}
        for method, seed in names:
            seeds.setdefault(method, []).append(int(seed))
        sets = self.config.evaluation.sets
        heads = [f"{SET_NAMES[s]}{what}" for s in sets for what in ("", ", less DMAT's", ", less AT's")]
        lines = [f"| method | models | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
        methods = sorted(seeds, key=lambda m: (TABLE.index(m) if m in TABLE else len(TABLE), m))
        found: dict[tuple[str, str, str], Estimate] = {}
        for method, set_name, than in itertools.product(methods, sets, ("dmat", "at")):
            if both := sorted(set(seeds[method]) & set(seeds.get(than, ()))) if method != than else []:
                pairs = [(self.worst_of_others(method, s, set_name), self.worst_of_others(than, s, set_name)) for s in both]
                found[method, set_name, than] = estimate([a - b for a, b in pairs])
        twice = ("at", "dmat")  # the same difference, the other way round
        counted = {key: one for key, one in found.items() if (key[0], key[2]) != twice}
        together = dict(zip(counted, holm([one.chance(0.0) for one in counted.values()]), strict=True))
        for method in methods:
            cells = []
            for set_name in sets:
                cells.append(str(estimate([self.worst_of_others(method, seed, set_name) for seed in seeds[method]])))
                for than in ("dmat", "at"):
                    one = found.get((method, set_name, than))
                    key = ("dmat", set_name, "at") if (method, than) == twice else (method, set_name, than)
                    told = "" if one is None else f"{one.value:+.1f} ± {one.half:.1f}"
                    cells.append(f"**{told}**" if one is not None and together.get(key, 1.0) < 0.05 else told)
            lines.append(f"| {method} | {len(seeds[method])} | {' | '.join(cells)} |")
        return lines

    def autoattack(self) -> list[str]:
        """The library's attacks, on the first seed's models."""
        files = sorted((self.folder / "autoattack").glob("*.parquet"))
        if not files:
            return []
        suite = self.notes["autoattack"]["suite"]
        config = suites.resolved(EvaluationConfig(suites=(suite,), sets=("natural",)))
        results = Results(pa.concat_tables([pq.read_table(file) for file in files]), config)
        columns, beside = results.columns("natural"), [c for c in BESIDE if c in self.results.columns("natural")]
        lines = [f"| model | {' | '.join([*columns, *beside])} |", "|" + "---|" * (len(columns) + len(beside) + 1)]
        for model in (f"{m}-0" for m in TABLE if f"{m}-0" in results.models):
            cells = [results.accuracy(model, "natural", column) for column in columns]
            shown = [f"{100 * c.value:.0f} ({100 * c.low:.0f} to {100 * c.high:.0f})" for c in cells]
            same = np.isin(self.results.ids(model, "natural"), results.ids(model, "natural"))
            shown += [f"{100 * self.results.per_example(model, 'natural', column)[same].mean():.0f}" for column in beside]
            lines.append(f"| {model} | {' | '.join(shown)} |")
        return lines


def _chance(p: float) -> str:
    """A p-value; of the far tail, which few seeds say nothing of, only that it is there."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _bound(claim: Claim) -> float:
    """The difference beyond which the claim holds."""
    return -NEAR if claim.comparable else 0.0


def verdict(found: Estimate, bound: float) -> str:
    """Confirmed or not where the whole interval says so, else open."""
    if found.value - found.half > bound:
        return "confirmed"
    return "not confirmed" if found.value + found.half < bound else "open"


def headline(study: Study) -> list[str]:
    """The short table."""
    columns = [c for c in HEADLINE if c in study.results.columns("on_manifold")]
    return study.table(study.methods, "on_manifold", columns)


def put_between(path: Path, lines: list[str]) -> None:
    """Replace what stands between a file's marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


def pack(folder: Path, target: Path) -> None:
    """All rows of a kind in one file, the columns that numbers are made of; settings without paths; notes.

    What the target has of other models stays, if it is of the same settings, else UserError.
    """
    values = yaml.safe_load((folder / "settings.yaml").read_text())
    slim = {
        "evaluation": values["evaluation"],
        "data": {"source": values["data"]["source"]} if values["data"]["source"] in NAMED else {},
        "training": values["training"],
        "objective": values["objective"],
    }
    before = target / "settings.yaml"
    if before.is_file() and yaml.safe_load(before.read_text()) != slim:
        raise UserError(f"'{target}' holds rows of other settings; pack into another folder")
    for kind in ("rows", "clean", "worst", "autoattack"):
        if files := sorted((folder / kind).glob("*.parquet")):
            (target / kind).mkdir(parents=True, exist_ok=True)
            rows = pa.concat_tables([pq.read_table(file).select(KEPT) for file in files])
            if odd := {version_of(file) for file in files} - {VERSION}:
                told = ", ".join("older" if version is None else f"of version {version}" for version in odd)
                raise UserError(
                    f"some rows in '{folder / kind}' are {told}; run benchmarks/study.py again, which makes them anew"
                )
            if (packed := target / kind / "all.parquet").is_file():
                old = pq.read_table(packed)
                others = pc.invert(pc.is_in(old["source"], value_set=pc.unique(rows["source"])))
                rows = pa.concat_tables([old.filter(others), rows])
            pq.write_table(rows, packed, compression="zstd")
    before.write_text(yaml.safe_dump(slim))
    notes = {name: note for name, note in read_json(folder / "study.json").items() if name != "generator"}
    old_notes = read_json(target / "study.json") if (target / "study.json").is_file() else {}
    (target / "study.json").write_text(json.dumps({**old_notes, **notes}, indent=1) + "\n")


def ablations(study: Study) -> list[str]:
    """Tables of which most methods are there, and not only those that the main tables set side by side as well."""
    tables = {title: [m for m in methods if m in study.seeds] for title, methods in ABLATIONS.items()}
    shown = {
        title: there
        for title, there in tables.items()
        if 2 * len(there) > len(ABLATIONS[title]) and set(there) - set(METHODS[:8])
    }
    columns = [c for c in HEADLINE if c in study.results.columns("on_manifold")]
    lines = []
    for title, there in shown.items():
        shared = sorted(set.intersection(*(set(study.seeds[m]) for m in there)))
        if shared:
            lines += ["", f"### {title}", "", *study.table(there, "on_manifold", columns, shared)]
    about = (
        f"On {SET_NAMES['on_manifold']}. One thing is changed of `dmat`, evaluation is the same. Only seeds that a table's "
        "methods share are counted; with one seed, intervals are of images alone."
    )
    return ["", "## Ablations", "", about, *lines] if lines else []


def rows_versions(notes: dict[str, Any]) -> str:
    """Of which versions the rows are, by the notes of their evaluations."""
    found = {note.get("rows_version") for name, note in notes.items() if not name.endswith(" training")}
    known = sorted(version for version in found if version is not None)
    told = f"of version {' and '.join(map(str, known))}" if known else ""
    older = f"older than version {known[0] if known else VERSION}" if None in found else ""
    return f"Rows are {', some '.join(filter(None, (told, older)))} ([what that means](../evaluation.md#versions-of-rows))."


def remeasured(study: Study) -> list[str]:
    """What attacks that have been mended since the rows were made leave of the released models."""
    path = study.folder / REMEASURED
    if not path.is_file():
        return []
    values = read_json(path)
    models, columns = (list(dict.fromkeys(one[key] for one in values["found"])) for key in ("model", "column"))
    cells = {(one["model"], one["column"]): f"{100 * one['before']:.0f} → {100 * one['now']:.0f}" for one in values["found"]}
    return [
        "",
        "## Attacks that have changed since",
        "",
        "The tables' rows were made before these attacks were mended ([Versions of rows](../evaluation.md#versions-of-rows)). "
        f"What stands of {values['images']} natural images of the released models, then and by rows of version "
        f"{values['version']}, in %:",
        "",
        f"| model | {' | '.join(columns)} |",
        "|" + "---|" * (len(columns) + 1),
        *(f"| {model} | {' | '.join(cells[model, column] for column in columns)} |" for model in models),
        "",
        f"`{values['command']}`",
    ]


def page(study: Study) -> list[str]:
    """The whole page."""
    ours = {name: note for name, note in study.notes.items() if " " in name}  # MODEL training, MODEL rows+clean, ...
    minutes = {"training": 0.0, "evaluation": 0.0}
    for name, note in ours.items():
        minutes["training" if name.endswith(" training") else "evaluation"] += note["seconds"] / 60
    first, training, objective = next(iter(ours.values())), study.config.training, study.config.objective
    name, command = STUDIES.get(study.folder.name, (study.folder.name, "benchmarks/study.py"))
    of_latent = " standard deviations" if objective.latent.scale == "std" else ""
    lines = [f"# The study on {name}", ""]
    if (written := study.folder / "notes.md").is_file():
        lines += [*written.read_text(encoding="utf-8").splitlines(), ""]
    lines += ["## How", ""]
    lines += [
        f"{sum(map(len, study.seeds.values()))} models: {minutes['training']:.0f} minutes of training and "
        f"{minutes['evaluation']:.0f} of evaluation, {first['processes']} at a time on {first['machine']}, not quiet, "
        f"torch {first['versions']['torch']}. `{command}` is the command of all. {rows_versions(ours)}",
        "",
        f"In training, unless a method's entry in benchmarks/studies/ says otherwise: {training.epochs} epochs, "
        f"L∞ {in_levels(objective.image.eps)} in pixels of [0, 1], {objective.latent.eps:g}{of_latent} in W+, "
        f"{objective.image.steps} steps each.",
        "",
        "Accuracy in %, ± the half of a 95 % interval that counts the draw of test images and, where there are several models, "
        "that of seeds; the best in bold. Intervals are of one cell each: of twenty, one is expected to miss.",
    ]
    for set_name in study.config.evaluation.sets:
        count, clean = (len(r.ids(r.models[0], set_name)) for r in (study.results, study.clean))
        lines += ["", f"## {count} {SET_NAMES[set_name]}", "", f"(`clean`: all {clean:,})", ""]
        lines += study.table(study.methods, set_name, study.columns(set_name))
        lines += ["", "What this says to the paper's claims:", "", *study.verdicts(set_name)]
    lines += [
        "",
        f"About as robust: less than {NEAR:g} points below. Open: the interval holds both answers. Intervals are of one claim "
        "each; the last column is the claim's p-value among all of its table (Holm), and bold what holds by that at 5 % "
        "(where three seeds differ by ten points that is up to 15 %, by simulation: they tell little of their spread).",
    ]
    if found := study.worst_cases():
        model, set_name = study.results.models[0], study.config.evaluation.sets[0]
        count = len(study.clean.ids(model, set_name)) - len(study.results.ids(model, set_name))
        lines += [
            "",
            "## The worst case, on the other test images",
            "",
            f"`{WORST}` on the {count} test images that the tables above have not: the same attacks one after the other, each on "
            "what the ones before have left. Intervals are of one difference each; bold is what differs among all (Holm, 5 %).",
            "",
            *found,
        ]
    if found := study.autoattack():
        lines += [
            "",
            "## AutoAttack",
            "",
            f"The library's standard version, L∞, on {study.notes['autoattack']['limit']} natural images, of models of the first "
            f"seed; Wilson's 95 % interval. Beside it what stands {', '.join(BESIDE)} of the suite, of the same images.",
            "",
            *found,
        ]
    lines += remeasured(study)
    lines += ablations(study)
    lines += ["", "## Columns", ""]
    lines += [f"- {name}: {text}" for name, text in columns_described(study.results).items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument("--headline", type=Path, help="file that has the short table between its marks")
    parser.add_argument("--pack", type=Path, help="folder to keep the rows in")
    given = parser.parse_args()
    if given.pack:
        pack(given.folder, given.pack)
    study = Study(given.folder)
    if given.page:
        given.page.write_text("\n".join(page(study)) + "\n", encoding="utf-8")
    if given.headline:
        put_between(given.headline, headline(study))
    if not (given.page or given.headline or given.pack):
        print("\n".join(page(study)))


if __name__ == "__main__":
    cli.run(main)
