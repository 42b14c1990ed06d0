"""Tables of a study (`benchmarks/study.py`) as Markdown: mean and spread over seeds, and what the rows say to the paper's claims.

    python benchmarks/study_report.py runs/study/mnist > docs/results/mnist.md

No number is typed by hand. A cell is the mean of the accuracies of a method's models, and the standard deviation over them. Of
two methods the differences are taken seed by seed, on the same test images.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dmat_ray import cli
from dmat_ray.errors import UserError
from dmat_ray.files import read_json
from dmat_ray.metrics import Results
from dmat_ray.report_values import SET_NAMES, columns_described

ORDER = ("standard", "at", "om_at_fgsm", "om_at", "dmat", "trades", "dmat_trades", "joint", "dmat_plus", "joint_plus")
NEAR = 2.0  # points of accuracy that count as comparable


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
    image, latent = next(c for c in columns if c.startswith("PGD-50")), "OM-PGD-50"
    found = [
        Claim("DMAT has a better clean accuracy than AT", "dmat", "at", "clean"),
        Claim("DMAT is about as robust to L∞ as AT", "dmat", "at", image, comparable=True),
        Claim("DMAT is more robust to unseen attacks than AT", "dmat", "at", "unseen mean"),
        Claim("DMAT is more robust to L2 than AT", "dmat", "at", "PGD-50 L2"),
        Claim("DMAT is more robust to fog than AT", "dmat", "at", "fog"),
        Claim("AT is not robust on the manifold, DMAT is more", "dmat", "at", latent),
        Claim("OM-AT is not robust to L∞, DMAT is more", "dmat", "om_at", image),
        Claim("OM-AT has a better clean accuracy than standard training", "om_at", "standard", "clean"),
        Claim("DMAT with TRADES is more robust to unseen attacks than TRADES", "dmat_trades", "trades", "unseen mean"),
    ]
    return [claim for claim in found if claim.column in columns]


class Study:
    """A study's rows, by method and seed."""

    def __init__(self, folder: Path) -> None:
        files = sorted((folder / "rows").glob("*.parquet"))
        if not files:
            raise UserError(f"there are no rows in '{folder}'; run benchmarks/study.py")
        self.folder = folder
        self.config = cli.validate(yaml.safe_load((folder / "settings.yaml").read_text()))
        self.results = Results(pa.concat_tables([pq.read_table(file) for file in files]), self.config.evaluation)
        names = [file.stem.rsplit("-", 1) for file in files]
        self.seeds = {method: sorted(int(s) for m, s in names if m == method) for method, _ in names}

    @property
    def methods(self) -> list[str]:
        """In the order of the tables."""
        return sorted(self.seeds, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))

    def accuracies(self, method: str, set_name: str, column: str) -> list[float]:
        """In percent, of each seed's model."""
        return [100 * self.results.accuracy(f"{method}-{seed}", set_name, column).value for seed in self.seeds[method]]

    def table(self, set_name: str) -> list[str]:
        """Methods by columns."""
        columns = self.results.columns(set_name)
        lines = [f"| method | seeds | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
        for method in self.methods:
            cells = [spread(self.accuracies(method, set_name, column)) for column in columns]
            lines.append(f"| {method} | {len(self.seeds[method])} | {' | '.join(cells)} |")
        return lines

    def verdicts(self, set_name: str) -> list[str]:
        """Each claim with the differences behind it."""
        lines = ["| claim | by | points, seed by seed | |", "|---|---|---|---|"]
        for claim in claims(self.results.columns(set_name)):
            if claim.better not in self.seeds or claim.than not in self.seeds:
                continue
            both = sorted(set(self.seeds[claim.better]) & set(self.seeds[claim.than]))
            better, than = (
                dict(zip(self.seeds[m], self.accuracies(m, set_name, claim.column), strict=True))
                for m in (claim.better, claim.than)
            )
            differences = [better[seed] - than[seed] for seed in both]
            told = ", ".join(f"{d:+.1f}" for d in differences)
            lines.append(f"| {claim.text} | {claim.column} | {told} | {verdict(differences, claim.comparable)} |")
        return lines


def verdict(differences: list[float], comparable: bool) -> str:
    """Confirmed or not by all seeds, else mixed."""
    met = [d > (-NEAR if comparable else 0.0) for d in differences]
    return "confirmed" if all(met) else "not confirmed" if not any(met) else "mixed"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def page(study: Study) -> list[str]:
    """The whole page."""
    notes = read_json(study.folder / "study.json")
    models = [notes[f"{m}-{s}"] for m in study.methods for s in study.seeds[m] if f"{m}-{s}" in notes]
    trained, evaluated = sum(note["trained_s"] for note in models), sum(note["evaluated_s"] for note in models)
    lines = [f"# {study.folder.name}", "", f"`python benchmarks/study_report.py {study.folder}`", ""]
    count = sum(map(len, study.seeds.values()))
    lines += [f"{count} models: {trained / 60:.0f} minutes of training and {evaluated / 60:.0f} of evaluation."]
    if models:
        first = models[0]
        lines += [f"{first['processes']} at a time on {first['machine']}, torch {first['versions']['torch']}."]
    for set_name in study.config.evaluation.sets:
        count = len(study.results.ids(study.results.models[0], set_name))
        lines += ["", f"## {count} {SET_NAMES[set_name]}", "", "Accuracy in %, mean and standard deviation over seeds.", ""]
        lines += [*study.table(set_name), "", *study.verdicts(set_name)]
    lines += ["", f"Comparable: less than {NEAR:g} points below. What the columns are:", ""]
    lines += [f"- {name}: {text}" for name, text in columns_described(study.results).items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print("\n".join(page(Study(parser.parse_args().folder))))


if __name__ == "__main__":
    cli.run(main)
