"""Tables of a study (`benchmarks/study.py`) as Markdown: what was measured, and what it says to the paper's claims.

    python benchmarks/study_report.py runs/study/mnist --pack benchmarks/results/mnist
    python benchmarks/study_report.py benchmarks/results/mnist --page docs/results/mnist.md --headline README.md

No number is typed by hand. A cell is the mean over the models of a method and the half of its 95 % interval, which counts both
draws: that of the test images (by the spread over images of the mean over models) and that of the seeds (by the spread of the
models' accuracies, few as they are: Student's t by Welch and Satterthwaite; of three seeds that differ much it covers 92 %, says
the simulation in tests/test_study.py). Of one model it is the half of Wilson's
interval. A difference of two methods is taken image by image and seed by seed, on the same images.
--page writes the whole page, --headline the short table between the marks of a file. --pack keeps what the page is made of,
without the models, in a folder that this script reads as it reads the study's own.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from study_claims import NEAR, Claim, Estimate, claims, estimate, holm, verdict
from study_methods import ABLATIONS, METHODS, TABLE, WORST
from study_rows import Study, pack

from dmat_ray import cli, suites
from dmat_ray.config import EvaluationConfig
from dmat_ray.metrics import Results
from dmat_ray.report_values import SET_NAMES, columns_described, in_levels
from dmat_ray.units import VERSION

HEADLINE = ("clean", "PGD-50", "OM-PGD-50", "L2", "fog", "unseen mean", "worst")
STUDIES = {
    "mnist": ("MNIST-5k", "make results"),
    "cifar5": ("five classes of CIFAR-10", "make results CIFAR10=FOLDER"),
}
"""Folder of a study -> its data set, and the command that makes all of it."""
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
BESIDE = ("PGD-50", "APGD-CE", "APGD-DLR")  # of the study's own attacks, set beside AutoAttack


def table(
    study: Study, methods: Sequence[str], set_name: str, columns: Sequence[str], seeds: Sequence[int] | None = None
) -> list[str]:
    """Methods by columns, of each column the best in bold."""
    cells = {(m, c): study.cell(m, set_name, c, seeds) for m in methods for c in columns}
    best = {c: max(round(cells[m, c].value, 1) for m in methods) for c in columns}
    lines = [f"| method | models | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for m in methods:
        shown = [f"**{cells[m, c]}**" if round(cells[m, c].value, 1) == best[c] else str(cells[m, c]) for c in columns]
        lines.append(f"| {m} | {len(study.seeds[m] if seeds is None else seeds)} | {' | '.join(shown)} |")
    return lines


def differences(study: Study) -> dict[tuple[str, Claim], Estimate]:
    """Of every claim on every test set."""
    made = [(s, claim) for s in study.config.evaluation.sets for claim in claims(study.columns(s))]
    return {(s, claim): found for s, claim in made if (found := study.difference(claim, s)) is not None}


def together(study: Study, chances: Mapping[Any, float]) -> dict[Any, float]:
    """p-values of all of these (Holm), times how often the study was looked at before it went on (Bonferroni)."""
    return {key: min(1.0, study.looks * p) for key, p in zip(chances, holm(list(chances.values())), strict=True)}


def verdicts(study: Study, set_name: str) -> list[str]:
    """Each claim with the difference behind it, and its p-value among the claims of all test sets."""
    every = differences(study)
    chances = together(study, {key: one.chance(key[1].bound) for key, one in every.items() if one.models > 1})
    lines = ["| claim | column | difference in points | models | | p, all together |", "|---|---|---|---|---|---|"]
    for (where, claim), found in every.items():
        if where != set_name:
            continue
        shown = f"{found.value:+.1f} ± {found.half:.1f}"
        chance = chances.get((where, claim))
        told, p = ("open (one seed)", "") if chance is None else (verdict(found, claim.bound), _chance(chance))
        if told != "open" and chance is not None and chance < 0.05:
            told = f"**{told}**"
        lines.append(f"| {claim.text} | {claim.column} | {shown} | {found.models} | {told} | {p} |")
    return lines


def worst_cases(study: Study) -> list[str]:
    """Methods by test sets, and each method's difference to DMAT, to AT, and to AT of its own radius where that is another."""
    if study.worst is None:
        return []
    names = (name.rsplit("-", 1) for name in study.worst.models)
    seeds: dict[str, list[int]] = {}
    for method, seed in names:
        seeds.setdefault(method, []).append(int(seed))
    sets = study.config.evaluation.sets
    own = {method: at for method in seeds if (at := method.replace("dmat", "at", 1)) in seeds and at not in ("at", method)}
    beside = {"less DMAT's": dict.fromkeys(seeds, "dmat"), "less AT's": dict.fromkeys(seeds, "at")}
    beside |= {"less AT's of the same radius": own} if own else {}
    heads = [f"{SET_NAMES[s]}{what}" for s in sets for what in ("", *(f", {less}" for less in beside))]
    lines = [f"| method | models | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    methods = sorted(seeds, key=lambda m: (TABLE.index(m) if m in TABLE else len(TABLE), m))
    found: dict[tuple[str, str, str], Estimate] = {}
    for method, set_name, others in itertools.product(methods, sets, beside.values()):
        than = others.get(method, method)
        if both := sorted(set(seeds[method]) & set(seeds.get(than, ()))) if method != than else []:
            pairs = [(study.worst_of_others(method, s, set_name), study.worst_of_others(than, s, set_name)) for s in both]
            found[method, set_name, than] = estimate([a - b for a, b in pairs])
    twice = ("at", "dmat")  # the same difference, the other way round
    # those to AT of the same radius came later, and are told by their own intervals
    # of one model a difference is of images alone, and settles nothing about its method
    chances = together(
        study,
        {
            key: one.chance(0.0)
            for key, one in found.items()
            if key[2] in ("dmat", "at") and (key[0], key[2]) != twice and one.models > 1
        },
    )
    for method in methods:
        cells = []
        for set_name in sets:
            cells.append(str(estimate([study.worst_of_others(method, seed, set_name) for seed in seeds[method]])))
            for others in beside.values():
                than = others.get(method, method)
                one = found.get((method, set_name, than))
                key = ("dmat", set_name, "at") if (method, than) == twice else (method, set_name, than)
                told = "" if one is None else f"{one.value:+.1f} ± {one.half:.1f}"
                cells.append(f"**{told}**" if one is not None and chances.get(key, 1.0) < 0.05 else told)
        lines.append(f"| {method} | {len(seeds[method])} | {' | '.join(cells)} |")
    return lines


def autoattack(study: Study) -> list[str]:
    """The library's attacks, on the first seed's models."""
    files = sorted((study.folder / "autoattack").glob("*.parquet"))
    if not files:
        return []
    suite = study.notes["autoattack"]["suite"]
    config = suites.resolved(EvaluationConfig(suites=(suite,), sets=("natural",)))
    results = Results(pa.concat_tables([pq.read_table(file) for file in files]), config)
    columns, beside = results.columns("natural"), [c for c in BESIDE if c in study.results.columns("natural")]
    ours, theirs = (found.ids(results.models[0], "natural") for found in (study.results, results))
    both = np.isin(theirs, ours).sum()
    heads = [*columns, *(c if both == len(theirs) else f"{c}, of {both} of them" for c in beside)]
    lines = [f"| model | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for model in (f"{m}-0" for m in TABLE if f"{m}-0" in results.models):
        cells = [results.accuracy(model, "natural", column) for column in columns]
        shown = [f"{100 * c.value:.0f} ({100 * c.low:.0f} to {100 * c.high:.0f})" for c in cells]
        same = np.isin(study.results.ids(model, "natural"), results.ids(model, "natural"))
        shown += [f"{100 * study.results.per_example(model, 'natural', column)[same].mean():.0f}" for column in beside]
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return lines


def _chance(p: float) -> str:
    """A p-value; of the far tail, which few seeds say nothing of, only that it is there."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _looked(study: Study) -> str:
    return f", times {study.looks} as models were added after a look" if study.looks > 1 else ""


def headline(study: Study) -> list[str]:
    """The short table."""
    columns = [c for c in HEADLINE if c in study.results.columns("on_manifold")]
    return table(study, study.methods, "on_manifold", columns)


def put_between(path: Path, lines: list[str]) -> None:
    """Replace what stands between a file's marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


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
            lines += ["", f"### {title}", "", *table(study, there, "on_manifold", columns, shared)]
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
        lines += table(study, study.methods, set_name, study.columns(set_name))
        lines += ["", "What this says to the paper's claims:", "", *verdicts(study, set_name)]
    lines += [
        "",
        f"About as robust: less than {NEAR:g} points below. Open: the interval holds both answers. Intervals are of one claim "
        f"each; the last column is the claim's p-value among those of both tables (Holm){_looked(study)}, and bold what "
        "holds by that at 5 % "
        "(where three seeds differ by ten points that is up to 15 %, by simulation: they tell little of their spread).",
    ]
    if found := worst_cases(study):
        model, set_name = study.results.models[0], study.config.evaluation.sets[0]
        count = len(study.clean.ids(model, set_name)) - len(study.results.ids(model, set_name))
        lines += [
            "",
            "## The worst case, on the other test images",
            "",
            f"`{WORST}` on the {count} test images that the tables above have not: the same attacks one after the other, each on "
            "what the ones before have left. Intervals are of one difference each; bold is what differs among all those of "
            f"several models (Holm{_looked(study)}, 5 %); differences to AT of the same radius are not counted there, and "
            "never bold.",
            "",
            *found,
        ]
    if found := autoattack(study):
        lines += [
            "",
            "## AutoAttack",
            "",
            f"The library's standard version, L∞, on {study.notes['autoattack']['limit']} natural images, of models of the first "
            f"seed; Wilson's 95 % interval. Beside it what stands {', '.join(BESIDE)} of the suite, of the same images.",
            "",
            *found,
        ]
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
