"""An on-manifold set with samples of the generator beside the projected images, labelled by a classifier.

    python benchmarks/sampled_set.py SET MODEL OUT [--count 4000] [--seed 0] [--preset demo] [--SECTION.FIELD VALUE ...]

OUT is SET with `count` more training examples g(w), w of random z; their label is what MODEL, a trained model's folder, says of
them, and the half of which it is least sure is left out. Training on both is the "sampled data" of a study's ablation. The
generator is that of the settings.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from dmat_ray import cli
from dmat_ray.data import set_format, set_reader, set_settings, set_writer
from dmat_ray.data.pixels import quantise, to_unit
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.models import checkpoint
from dmat_ray.storage import at


def main() -> None:
    config, given = cli.parse(str(__doc__), preset=["demo"], add=_arguments)
    source, target = at(str(given.set)), at(str(given.out))
    manifest = set_reader.read_manifest(source)
    if (target / set_format.MANIFEST).is_file():
        raise UserError(f"'{target}' is a whole set already; remove it, or give another folder")
    if generators.fingerprint(config.generator.path) != manifest["generator_sha256"]:
        raise UserError(f"the set '{source}' is of another generator than '{config.generator.path}'; give its --generator.path")
    generator = generators.load_configured(config.generator, torch.device("cpu"))
    classifier = checkpoint.load_classifier(at(str(given.model)), torch.device("cpu"))[0].eval()
    rng = torch.Generator().manual_seed(given.seed)
    drawn = zip(*_draw(generator, classifier, given.count, rng), strict=True)
    x_NCHW, w_NLD, label_N, sure_N = (torch.cat(parts) for parts in drawn)
    kept = sure_N.argsort(descending=True)[: given.count]
    print(f"{len(kept)} of {len(sure_N)} samples kept, probability of the label at least {sure_N[kept].min():.3f}")
    rows = _rows(x_NCHW[kept], w_NLD[kept], label_N[kept], given.seed, manifest["class_names"])

    shutil.rmtree(given.out, ignore_errors=True)  # what was begun
    settings = (source / set_settings.SETTINGS).read_json()
    set_settings.begin(target, settings)
    shutil.copytree(given.set / set_format.SHARDS, given.out / set_format.SHARDS)
    number = 1 + max(int(name[5:11]) for name in manifest["shards"])
    set_writer.write_shard(target, f"part-{number:06d}.parquet", rows, {})
    records = set_writer.read_records(target)
    shards = []
    for name, record in sorted(records.items()):
        found = set_reader.read_columns(target, [name], ["id", "split", "label"])
        # those of SET that could not be read, once each: a file of what was tried again names its own as well
        lacking = [id for id in record.rejected if id in manifest["rejected"] and not record.ids]
        # where those belong is known no more, and nothing asks: a place that occurs
        places = [{"id": id, "split": "train", "label": 0} for id in lacking]
        shards.append(set_writer.Shard(name, pa.concat_tables([found, pa.Table.from_pylist(places, found.schema)])))
    described = {key: manifest[key] for key in ("shapes", "lpips_is_perceptual")}
    described |= {
        "examples": manifest["examples"] + len(kept),
        "versions": checkpoint.versions(),
        "sampled": {"count": len(kept), "seed": given.seed, "means_of_the_others": manifest["means"]},
    }
    print(set_writer.finish(target, settings, shards, records, described)["usable"])


def _arguments(parser: argparse.ArgumentParser) -> None:
    for name, text in (("set", "on-manifold set"), ("model", "folder of the model that labels"), ("out", "folder to write")):
        parser.add_argument(name, type=Path, help=text)
    parser.add_argument("--count", type=int, default=4000, help="samples to add")
    parser.add_argument("--seed", type=int, default=0)


@torch.no_grad()
def _draw(
    generator: LatentGenerator, classifier: nn.Module, count: int, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of (images uint8, w, label, probability of the label), of twice as many as are wanted."""
    for start in range(0, 2 * count, 500):
        z = torch.randn(min(500, 2 * count - start), generator.z_dim, generator=rng)
        w = generator.mapping(z)
        pixels = quantise(generator.synthesis(w))
        sure, label = classifier(to_unit(pixels)).softmax(1).max(1)
        yield torch.from_numpy(pixels), w, label, sure


def _rows(x_NCHW: Tensor, w_NLD: Tensor, label_N: Tensor, seed: int, class_names: list[str]) -> pa.Table:
    pixels = x_NCHW.numpy()
    ids = [f"sample-{seed}-{k:06d}" for k in range(len(pixels))]
    images = set_format.to_netpbm(pixels)
    files = [{"bytes": image["bytes"], "path": id} for image, id in zip(images.to_pylist(), ids, strict=True)]
    none = np.zeros(len(ids), np.float32)
    columns = {
        "id": ids, "split": ["train"] * len(ids), "label": label_N.numpy(), "image": files, "on_manifold": images,
        "w": set_format.fixed_list(w_NLD.numpy(), pa.float32()), "lpips": none, "l1": none, "l2": none,
        "steps": none.astype(np.int32), "status": ["ok"] * len(ids),
    }  # fmt: skip
    return pa.table(columns, schema=set_format.schema(*pixels.shape[1:3], *w_NLD.shape[1:], class_names))


if __name__ == "__main__":
    cli.run(main)
