"""How good a manifold is a generator? What a separately trained classifier makes of g(w) after projection.

    python benchmarks/manifold_quality.py [--card] [--preset demo] [--SECTION.FIELD VALUE ...]

--card writes the result, with the command, into the generator's card.json.

Trains a small network on the natural training images only, then compares its accuracy on natural test images x and on
their projections g(w), and on class-conditional samples where the generator has classes; and judges samples against
natural training images as generator training does (gan.quality). One process, no Ray.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from dmat_ray import cli
from dmat_ray.data.pixels import to_unit
from dmat_ray.data.reading import read_good
from dmat_ray.data.sources import list_examples
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators, quality, set_maker
from dmat_ray.storage.files import write_json


@torch.no_grad()
def accuracy(network: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct answers."""
    return float((network(x).argmax(dim=1) == y).float().mean())


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", action="store_true", help="write the result into the generator's card.json")


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    data = config.data.model_copy(update={"train_limit": None, "test_limit": None})
    listing = list_examples(data)
    splits = {}
    for split in ("train", "test"):
        rows = listing.rows(split)
        good, pixels, _ = read_good(rows, data)
        ids, labels = (rows[name].take(pa.array(good)).to_pylist() for name in ("id", "label"))
        splits[split] = to_unit(pixels), torch.tensor(labels), ids
    cpu = torch.device("cpu")
    judge = quality.train_classifier(*splits["train"][:2], len(listing.class_names), 12, cpu)
    projector = set_maker.build_projector(config, cpu)
    generator = projector.generator
    x, y, ids = splits["test"]
    began, size = time.monotonic(), config.projection.batch_size
    parts = [projector.project(x[i : i + size], ids[i : i + size]) for i in range(0, len(x), size)]
    seconds = time.monotonic() - began
    rendered = torch.cat([p.x_BCHW for p in parts])
    on_x, on_g = accuracy(judge, x, y), accuracy(judge, rendered, y)
    result = {
        "test_images": len(x),
        "accuracy_natural": on_x,
        "accuracy_projected": on_g,
        "kept": on_g / on_x,
        "mean_l1": float(torch.cat([p.l1_B for p in parts]).mean()),
        "mean_l2": float(torch.cat([p.l2_B for p in parts]).mean()),
        "worst_l1": float(torch.cat([p.l1_B for p in parts]).max()),
        "seconds_per_image": seconds / len(x),
    }
    z = torch.randn(2000, generator.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = generator.synthesis(generator.mapping(z))
        guess = judge(samples).argmax(dim=1)
    result |= quality.Judge(
        config.gan.quality, *splits["train"][:2], LocalContext(Path()), conditional=generator.num_classes > 0
    )(generator)
    result["samples_per_class"] = torch.bincount(guess, minlength=len(listing.class_names)).tolist()
    made = generator.class_of(z)
    if made is not None:
        result["samples_of_their_class"] = float((guess == made).float().mean())
    result["pixel_deviation_samples_over_data"] = float(samples.std(dim=0).mean() / x.std(dim=0).mean())
    print(json.dumps(result, indent=1))
    if arguments.card:
        del result["seconds_per_image"]
        command = shlex.join(["python", "benchmarks/manifold_quality.py", *sys.argv[1:]])
        card = {**generators.read_card(config.generator.path), "metrics": {"command": command, **result}}
        write_json(generators.folder_of(config.generator.path) / generators.CARD, card)


if __name__ == "__main__":
    cli.run(main)
