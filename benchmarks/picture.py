"""The README's picture: test images, their projections, and what every attack of a study makes of them.

    python benchmarks/picture.py runs/study/mnist --models standard-0 at-0 dmat-0 --out docs/images/attacks.png

A line an image and model; under each picture what the model says of it, in red where it is wrong.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
import yaml

from dmat_ray import cli
from dmat_ray.data import manifold_set
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.units import applies
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.validated import validate

SHOWN = {
    "clean": "g(w)", "PGD-50": "L∞", "PGD-50 L2": "L2", "OM-PGD-50": "on the\nmanifold", "joint": "both", "fog": "fog",
    "snow": "snow", "elastic": "elastic", "gabor": "Gabor", "jpeg L1": "JPEG", "stadv": "StAdv",
}  # fmt: skip
INCH = 0.72


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--models", nargs="+", default=["standard-0", "at-0", "dmat-0"])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 7], help="an image of each")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config = validate(yaml.safe_load((given.study / "settings.yaml").read_text()))
    data = manifold_set.open_set(given.study / "on_manifold_set", "test")
    cpu = torch.device("cpu")

    def load(model: str) -> torch.nn.Module:
        return checkpoint.load_classifier(given.study / "models" / model, cpu)[0]

    generator = generators.load_configured(config.generator, cpu)
    evaluator = evaluation.Evaluator(config.evaluation, data, generator, load, given.models, cpu)
    positions = np.array([np.flatnonzero(np.asarray(data.label) == label)[0] for label in given.classes])
    rows = {row.name: row for row in config.evaluation.attacks if row.name in SHOWN and applies(row, "on_manifold")}

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [(model, k) for k in range(len(positions)) for model in given.models]
    figure, axes = pyplot.subplots(
        len(lines), len(SHOWN) + 1, figsize=(INCH * (len(SHOWN) + 2), 1.25 * INCH * len(lines)), layout="constrained"
    )
    for line, (model, k) in enumerate(lines):
        axes[line, 0].set_ylabel(model.rsplit("-", 1)[0], fontsize=9)
        natural = evaluator.batch(positions, "natural").x_BCHW
        seen = {"x": (natural, evaluator.logits(model, natural))}
        batch = evaluator.batch(positions, "on_manifold")
        for name in SHOWN:
            if name == "clean":
                seen[SHOWN[name]] = (batch.x_BCHW, evaluator.logits(model, batch.x_BCHW))
            else:
                found = evaluator.attacked(model, "on_manifold", rows[name], batch)
                seen[SHOWN[name]] = (found.x_BCHW, found.logits_BK)
        for column, (title, (x_BCHW, logits_BK)) in enumerate(seen.items()):
            place, guess = axes[line, column], int(logits_BK[k].argmax())
            place.imshow(x_BCHW[k].permute(1, 2, 0).numpy().squeeze(), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
            place.set_xlabel(data.class_names[guess], fontsize=9, color="black" if guess == data.label[positions[k]] else "red")
            if line == 0:
                place.set_title(title, fontsize=9)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    cli.run(main)
