"""A study's models for others: a folder each, as jobs/export_model.py makes it, and a page that lists them.

    python benchmarks/release.py runs/study/mnist models/mnist standard at_eps_20 dmat_eps_20

Of every method the model of the first seed, with what the study's rows say of it; the accuracy without an attack is that of all
test images, where the study has it (clean/). The page's numbers are those rows', too.
"""

import argparse
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from study_methods import OF_MODEL, are_kept, told_by

from dmat_ray import cli
from dmat_ray.config import CleanRow, Config
from dmat_ray.data import set_reader
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluated
from dmat_ray.evaluation.evaluation import left_out
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import VERSION
from dmat_ray.exchange import model_export
from dmat_ray.models import checkpoint
from dmat_ray.reports.columns import SET_NAMES
from dmat_ray.storage import set_folder
from dmat_ray.storage.files import sha256, write_json
from dmat_ray.storage.folders import replace_folder
from dmat_ray.validated import validate

COLUMNS = ("clean", "PGD-50", "OM-PGD-50", "L2", "unseen mean", "worst")
PAGE = """\
# Models of the study in [{page}](../../{page})

Of every method the model of the first seed. A folder holds `model.safetensors`, `config.json` (all that is needed to build the
network again), a card, and a README with the code that loads it. To attack one beside models of your own, with an on-manifold set
of the same shape and classes under OUTPUT:

```
python jobs/import_model.py --checkpoint {folder}/{last}/model.safetensors --classifier.name {network} \\
  --classifier.mean {mean} --classifier.std {std} --model theirs --output OUTPUT
```

Made by `{command}`.
Accuracy in %, of one model each on {images} test images (`clean`: {clean_images}):

| model | test set | {columns} | sha256 of its weights |
|---|---|{dashes}|---|
{rows}
"""


Found = tuple[str, Results, Results]
"""A method, what the rows of its model say, and what those of more images without an attack do, which may be the same."""


def released(study: Path, config: Config, folder: Path, names: list[str]) -> list[Found]:
    """Export the models, and return what the study's rows say of each.

    Raises UserError for a model that has none, and for a study without its set.
    """
    found: list[Found] = []
    place = set_folder(config.model_copy(update={"output": str(study)}))
    missing = left_out(set_reader.read_manifest(place))
    for name in names:
        model, rows = study / "models" / f"{name}-0", study / "rows" / f"{name}-0.parquet"
        if not (model / checkpoint.RUN).is_file() or not rows.is_file():
            raise UserError(f"'{study}' has no model {name}-0 with rows; run benchmarks/study.py")
        digest = _require_kept(rows, model)
        clean = unattacked(study, config, model)
        with tempfile.TemporaryDirectory() as scratch:
            evaluation = Path(scratch)  # in the form that an evaluation has
            shutil.copyfile(rows, evaluation / evaluated.ROWS)
            about = {"version": VERSION, "models": {f"{name}-0": digest}, evaluated.LEFT_OUT: missing}
            write_json(evaluation / evaluated.DONE, {**about, "evaluation": config.evaluation.model_dump(mode="json")})
            write = functools.partial(model_export.export, model, f"{name}-0", evaluation, clean=clean)
            replace_folder(folder / name, write)
            results, _ = model_export.read_evaluation(evaluation, f"{name}-0", model)
        assert results is not None
        found.append((name, results, clean or results))
    return found


def _require_kept(rows: Path, model: Path) -> str:
    """The model's digest. Raises UserError for rows of older attacks, and of other weights where they say of which."""
    if not are_kept(rows):
        raise UserError(f"'{rows}' is of older attacks than these of version {VERSION}; run benchmarks/study.py again")
    digest = checkpoint.digest(model)
    if told_by(rows).get(OF_MODEL, digest) != digest:
        raise UserError(f"'{rows}' is of another model than '{model}' is now; run benchmarks/study.py again")
    return digest


def unattacked(study: Path, config: Config, model: Path) -> Results | None:
    """What the study's rows of all test images say of a model, without an attack; None if there are none."""
    if not (rows := study / "clean" / f"{model.name}.parquet").is_file():
        return None
    _require_kept(rows, model)
    suite = {"suites": (), "attacks": (CleanRow(),), "summaries": (), "transfer": (), "limit": None}
    return Results(pq.read_table(rows), config.evaluation.model_copy(update=suite))


def page(config: Config, folder: Path, found: list[Found]) -> str:
    """The list of what lies in `folder`, in Markdown."""
    lines, counts, of_clean = [], set(), set()
    for name, results, clean in found:
        for set_name in results.config.sets:
            columns = results.columns(set_name)
            cells = [results.accuracy(f"{name}-0", set_name, c) if c in columns else None for c in COLUMNS[1:]]
            counts |= {cell.count for cell in cells if cell}
            cells.insert(0, clean.accuracy(f"{name}-0", set_name, clean.clean))
            of_clean.add(len(clean.ids(f"{name}-0", set_name)))
            numbers = " | ".join("" if cell is None else f"{100 * cell.value:.1f}" for cell in cells)
            digest = sha256(folder / name / checkpoint.MODEL)[:16]
            lines.append(f"| [{name}]({name}) | {SET_NAMES[set_name]} | {numbers} | {digest} |")
    mean, std = (",".join(f"{value:g}" for value in values) for values in (config.classifier.mean, config.classifier.std))
    return PAGE.format(
        page=f"docs/results/{folder.name}.md",
        folder=folder,
        last=found[-1][0],
        network=config.classifier.name,
        mean=mean,
        std=std,
        command=" ".join(["python benchmarks/release.py", *sys.argv[1:]]),
        images=_or(counts),
        clean_images=_or(of_clean),
        columns=" | ".join(COLUMNS),
        dashes="|".join(["---"] * len(COLUMNS)),
        rows="\n".join(lines),
    )


def _or(counts: set[int]) -> str:
    return " or ".join(f"{count:,}" for count in sorted(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study, with its models")
    parser.add_argument("folder", type=Path, help="where the models go; its name is that of the study's page in docs/results")
    parser.add_argument("methods", nargs="+")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    config = validate(yaml.safe_load((given.study / "settings.yaml").read_text()))
    found = released(given.study, config, given.folder, given.methods)
    (given.folder / "README.md").write_text(page(config, given.folder, found), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
