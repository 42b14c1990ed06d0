"""Run attacks of a study again on its released models: what attacks that have been mended since leave standing.

    python benchmarks/remeasure.py benchmarks/results/mnist models/mnist "PGD-50 L1" snow
    python benchmarks/remeasure.py benchmarks/results/cifar5 models/cifar5 "PGD-50 L1" snow recolor --source DIR \\
      --preset cifar10 benchmarks/studies/cifar5.yaml

On the natural test images that the study's rows are of (DIR holds CIFAR-10's own binary files); writes remeasured.json beside the
rows, which benchmarks/study_report.py sets on the page.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from study_report import REMEASURED
from study_rows import Study

from dmat_ray import checkpoint, classifiers, cli, presets, threats
from dmat_ray.attack import attack
from dmat_ray.attack_view import view_of
from dmat_ray.config import DataConfig, Row
from dmat_ray.data.pixels import to_unit
from dmat_ray.data.sources import list_examples, read_pixels
from dmat_ray.errors import UserError
from dmat_ray.files import read_json, write_json
from dmat_ray.types import Batch
from dmat_ray.units import VERSION


def images(data: DataConfig, ids: list[str]) -> Batch:
    """Those of a study, from its source."""
    rows = list_examples(data).rows("test")
    rows = rows.filter(pc.is_in(rows["id"], value_set=pa.array(ids))).sort_by("id")
    if rows["id"].to_pylist() != ids:
        raise UserError(f"'{data.source}' has not the study's test images; give its settings, and --source")
    x = to_unit(np.stack(read_pixels(rows, data)))  # type: ignore[arg-type]
    return Batch(ids, x, torch.tensor(rows["label"].to_pylist()))


def released(folder: Path, channels: int, classes: int) -> torch.nn.Module:
    """The network of an exported model, with its normalisation."""
    about = read_json(folder / "config.json")
    how = {"name": about["architecture"]["name"], **about["normalisation"]}
    network = classifiers.build(cli.validate({"classifier": how}).classifier, channels, classes)
    network.load_state_dict(load_file(folder / checkpoint.MODEL))
    return network.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="packed rows")
    parser.add_argument("models", type=Path, help="folder of released models")
    parser.add_argument("attacks", nargs="+", help="names of the study's rows")
    parser.add_argument("--preset", nargs="+", default=["demo", "benchmarks/studies/mnist.yaml"], help="the study's settings")
    parser.add_argument("--source", help="data.source, if the settings do not name it")
    given = parser.parse_args()
    study = Study(given.results)
    values = presets.load(given.preset)
    if given.source:
        values["data"]["source"] = given.source
    data = cli.validate(values).data
    names = [folder.name for folder in sorted(given.models.iterdir()) if (folder / "config.json").is_file()]
    batch = images(data, sorted(map(str, study.results.ids(f"{names[0]}-0", "natural"))))
    rows = {row.name: row for row in study.config.evaluation.attacks if isinstance(row, Row)}
    found: list[dict[str, Any]] = []
    for name in names:
        network = released(given.models / name, data.channels, len(set(batch.y_B.tolist())))
        for column in given.attacks:
            row = rows[column]
            purpose = f"evaluation/natural/{row.name}"
            threat, seed = threats.build(row, None), study.config.evaluation.seed
            seen = attack(view_of(network), threat, batch, row, seed=seed, purpose=purpose)
            before = float(study.results.accuracy(f"{name}-0", "natural", column).value)
            now = float((~seen.broken_B).float().mean())
            found.append({"model": name, "column": column, "before": before, "now": now})
            print(f"{name}: {column} {100 * before:.0f} -> {100 * now:.0f} % of {len(batch)}", flush=True)
    command = " ".join(["python benchmarks/remeasure.py", *(f'"{word}"' if " " in word else word for word in sys.argv[1:])])
    if given.source:
        command = command.replace(given.source, "DIR")
    write_json(given.results / REMEASURED, {"version": VERSION, "images": len(batch), "command": command, "found": found})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
