"""Does training in bfloat16 cost accuracy? Trains the demo's DMAT in both precisions, over seeds, and attacks all in float32.

    python jobs/project.py --preset demo --output runs/demo
    python benchmarks/bf16_training.py --output runs/demo [--seeds 3] [--epochs 10] [--methods dmat at] [--json FILE]

Sides: float32; bf16 attacks and update (training.precision bf16); the generator in bf16 as well (generator.precision bf16).
Every model is a float32 network in the end, and meets the demo's suite in float32, on the set's on-manifold test images.
Reported are the mean over seeds and the standard deviation of one seed, in points, and bf16's difference seed by seed.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dmat_ray import presets, suites, threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackRow, CleanRow, Config
from dmat_ray.data import manifold_set
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.storage import at
from dmat_ray.training.trainer import train

SIDES = {
    "float32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "bf16, generator too": {"training": {"precision": "bf16"}, "generator": {"precision": "bf16"}},
}


def accuracies(folder: Path, config: Config, suite: Sequence[AttackRow], data: manifold_set.ManifoldSet) -> dict[str, float]:
    """Each attack's accuracy in percent, and the share that stands under all of them."""
    network, _ = checkpoint.load_classifier(folder)
    generator = generators.load_generator(config.generator.path)
    batch = data.batch(torch.arange(len(data)).numpy(), "on_manifold")
    standing = torch.ones(len(batch), dtype=torch.bool)
    found = {}
    for row in suite:
        if isinstance(row, CleanRow):
            with torch.no_grad():
                right = network(batch.x_BCHW).argmax(dim=1) == batch.y_B
        else:
            right = ~attack(network, threats.build(row, generator), batch, row, seed=0, purpose=f"bf16/{row.name}").broken_B
        found[row.name] = 100 * right.float().mean().item()
        standing &= right
    return {**found, "under all": 100 * standing.float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder with a finished on-manifold set of the demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["dmat"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place = at(arguments.output) / "on_manifold_set"
    data, test = manifold_set.open_set(place, "train"), manifold_set.open_set(place, "test")
    record = {}
    for method in arguments.methods:
        rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for seed in range(arguments.seeds):
            for side, changes in SIDES.items():
                knots = [k * arguments.epochs / 10 for k in (0, 1, 7, 10)]  # the demo's
                training = {"seed": seed, "epochs": arguments.epochs, "val_examples": 0, "lr_epochs": knots}
                layers = [presets.load(["demo", method]), {"training": training}, changes]
                values: dict[str, object] = {}
                for layer in layers:
                    values = presets.merge(values, layer)
                config = Config.model_validate(values)
                suite = suites.resolved(config.evaluation).attacks
                generator = generators.load_configured(config.generator)
                sha = generators.fingerprint(config.generator.path)
                with tempfile.TemporaryDirectory() as folder:
                    context = LocalContext(Path(folder))
                    train(config, data, generator, sha, context)
                    rows[side].append(accuracies(context.checkpoints()[0], config, suite, test))
                print(method, seed, side, {name: round(value, 1) for name, value in rows[side][-1].items()}, flush=True)
        record[method] = rows
        print(f"\n{method}, {arguments.seeds} seeds, {len(test)} test images: mean (deviation of one seed)")
        for name in rows["float32"][0]:
            cells = []
            for side in SIDES:
                values_of = [row[name] for row in rows[side]]
                spread = statistics.stdev(values_of) if len(values_of) > 1 else float("nan")
                cells.append(f"{side} {statistics.mean(values_of):.1f} ({spread:.1f})")
            lines = []
            for side in list(SIDES)[1:]:
                differences = [b[name] - a[name] for a, b in zip(rows["float32"], rows[side], strict=True)]
                lines.append(f"{side} - float32: {', '.join(f'{d:+.1f}' for d in differences)}")
            print(f"{name:<12} {', '.join(cells)}; {'; '.join(lines)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
