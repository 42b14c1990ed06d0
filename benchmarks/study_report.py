"""Tables of a study (`benchmarks/study.py`) as Markdown: what was measured, and what it says to the paper's claims.

    python benchmarks/study_report.py runs/study/mnist --pack benchmarks/results/mnist
    python benchmarks/study_report.py benchmarks/results/mnist --page docs/results/mnist.md --headline README.md

No number is typed by hand. A cell is the mean over the models of a method and the half of its 95 % interval, which counts both
draws: that of the test images (by the spread over images of the mean over models) and that of the seeds (by the spread of the
models' accuracies, few as they are: Student's t by Welch and Satterthwaite; of three seeds that differ much it covers 91 %, says
the simulation in tests/evaluation/test_intervals.py). Of one model it is the half of Wilson's interval.
A difference of two methods is taken image by image and seed by seed, on the same images.
--page writes the whole page, --headline the short table between the marks of a file. --pack keeps what the page is made of,
without the models, in a folder that this script reads as it reads the study's own.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from study_claims import NEAR
from study_methods import WORST
from study_rows import Study, pack
from study_tables import BESIDE, ablations, again, autoattack, headline, table, verdicts, worst_cases

from dmat_ray import cli
from dmat_ray.evaluation.intervals import points
from dmat_ray.evaluation.units import VERSION
from dmat_ray.reports.columns import SET_NAMES, columns_described, in_levels

HERE = Path(__file__).resolve().parent
STUDIES = {
    "mnist": ("MNIST-5k", "make results"),
    "cifar5": ("five classes of CIFAR-10", "make results CIFAR10=FOLDER"),
}
"""Folder of a study -> its data set, and the command that makes all of it."""
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


def _looked(study: Study) -> str:
    return f", times {study.looks} as models were added after a look" if study.looks > 1 else ""


def put_between(path: Path, lines: list[str]) -> None:
    """Replace what stands between a file's marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


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
        f"About as robust: less than {points(NEAR):g} points below. Open: the interval holds both answers. Intervals are of one "
        f"claim each; the last column is the claim's p-value among those of both tables (Holm){_looked(study)}, and bold what "
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
    if (done_again := study.folder / "again" / "rows").is_dir():
        once_more = Study(done_again.parent)
        fixed = yaml.safe_load((HERE / "studies" / f"{study.folder.name}_claims.yaml").read_text(encoding="utf-8"))["claims"]
        lines += [
            "",
            "## Done again",
            "",
            "With another draw of training and test images and other seeds, to test these claims, which were fixed before "
            f"(benchmarks/studies/{study.folder.name}_claims.yaml) and are taken together (Holm); bold is what holds by that "
            "at 5 %. `worst` is of all test images, of both.",
            "",
            *again(study, once_more, fixed),
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
