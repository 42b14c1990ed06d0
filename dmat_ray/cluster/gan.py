"""Generator training on Ray Train: images decoded once, workers on parts of each batch, checkpoints, samples in MLflow."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from dmat_ray.checkpoint import versions
from dmat_ray.cluster import tracking
from dmat_ray.cluster.context import RayContext
from dmat_ray.cluster.events import listen, send
from dmat_ray.cluster.session import worker_resources
from dmat_ray.config import Config, DataConfig
from dmat_ray.data.manifold_set import read_json
from dmat_ray.data.sources import Example, decode, list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.gan_trainer import check_images, check_workers, result_of, train_generator
from dmat_ray.manifold.generators import CARD, WEIGHTS, save_generator
from dmat_ray.manifold.samples import sample_grid

SAMPLES = "samples.png"
RUN_NAME = "generator"


def prepare_images(config: DataConfig, folder: Path) -> Path:
    """Decode the training split into `folder`, once; the result is read with `open_images`.

    Raises UserError if more than `config.max_rejected` of the images cannot be read.
    """
    path = folder / f"images-{config.fingerprint()}"
    if path.with_suffix(".labels.npy").is_file():
        return path
    examples = [e for e in list_examples(config).examples if e.split == "train"]
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(examples), config.channels, config.resolution, config.resolution)
    pixels = np.lib.format.open_memmap(path.with_suffix(".npy"), mode="w+", dtype=np.uint8, shape=shape)
    rejected: dict[str, str] = {}

    def load(i: int, example: Example) -> bool:
        try:
            pixels[i] = decode(example.read(), config.resolution, config.channels)
        except (OSError, ValueError) as error:
            rejected[example.id] = str(error)
        return example.id not in rejected

    with ThreadPoolExecutor(cpu_count()) as pool:  # Pillow decodes outside of the interpreter's lock
        good = np.array(list(pool.map(load, range(len(examples)), examples)), dtype=bool)
    if not good.any() or len(rejected) > config.max_rejected * len(examples):
        path.with_suffix(".npy").unlink()
        name, reason = next(iter(rejected.items()), ("", "there are none"))
        raise UserError(f"{len(rejected)} of {len(examples)} images were rejected; the first: '{name}' {reason}")
    pixels.flush()
    labels = np.array([e.label if ok else -1 for e, ok in zip(examples, good, strict=True)], dtype=np.int64)
    np.save(path.with_suffix(".labels.npy"), labels)  # last: without it the images are decoded anew
    return path


def open_images(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W), of which only those asked for are ever read, and labels (N)."""
    labels = np.load(path.with_suffix(".labels.npy"))
    # a private map: what is shared with all processes of a node is never written
    pixels = np.load(path.with_suffix(".npy"), mmap_mode="c")
    if (labels < 0).any():  # the few that could not be read: their places are empty
        pixels, labels = pixels[labels >= 0], labels[labels >= 0]
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs; the checkpoint of the last snapshot holds the result."""
    config = Config.model_validate(settings["config"])
    context = RayContext(RUN_NAME, settings["mailbox"])
    torch.set_num_threads(config.cluster.threads_per_worker)
    images, labels = open_images(Path(settings["images"]))

    def show(average: LatentGenerator, kimg: float, quality: dict[str, float]) -> None:
        send(settings["mailbox"], {"kimg": kimg, "samples": sample_grid(average, config.gan.seed)})

    train_generator(config.gan, images, labels, context, show)


def describe(metrics: dict[str, float], kimg: float) -> str:
    """One line about a report: what it says of losses, and of quality where it was measured."""
    names = ("loss_g", "loss_d", "real_sign", "augment", "fid", "precision", "recall", "diversity", "images_per_second")
    text = ", ".join(f"{name} {metrics[name]:.3g}" for name in names if name in metrics)
    return f"{metrics['kimg']:.3g} of {kimg:g} thousand images, {text}"


def is_trained(config: Config, folder: Path) -> bool:
    """True if `folder` holds the generator that these settings and this data make."""
    if not (folder / CARD).is_file() or not (folder / WEIGHTS).is_file():
        return False
    card = read_json(folder / CARD)
    same_training = card.get("training") == config.gan.model_dump(mode="json")
    return bool(same_training and card.get("data") == config.data.model_dump(mode="json"))


def check(config: Config, storage: Path) -> Path:
    """Raise UserError for settings that do not fit the images; returns where the decoded images are. Needs no Ray."""
    check_workers(config.gan, config.cluster.train_workers)
    images = prepare_images(config.data, storage)
    check_images(config.gan, *open_images(images))
    return images


def train(config: Config, folder: Path, command: str, say: Callable[[str], None]) -> Path:
    """Train a generator on the training split of `config.data` and write it to `folder`. Ray must be connected.

    A rerun after a crash goes on from the latest snapshot.
    """
    storage = Path(config.output).resolve() / "train"
    images = check(config, storage)
    name = f"generator-{config.gan.fingerprint()}-{config.data.fingerprint()}-{config.cluster.train_workers}"
    grids = folder.with_name(f"{folder.name}_samples")
    with tracking.tracked(config, "", "train_generator") as run:

        def handle(event: dict[str, Any]) -> None:
            if "samples" in event:
                grids.mkdir(parents=True, exist_ok=True)
                file = grids / f"samples-{event['kimg']:06.0f}.png"
                file.write_bytes(event["samples"])
                run.artifact(file, "samples")
                return
            metrics = event["metrics"]
            run.metrics(metrics, step=round(metrics["kimg"] * 1000))
            say(describe(metrics, config.gan.kimg))
            if metrics.get("collapsed"):
                say(
                    f"warning: two samples of a class are {metrics['diversity']:.0%} as far apart as real images: the generator "
                    "has collapsed here; an earlier snapshot is kept if one is better"
                )

        with listen(handle) as mailbox:
            result = ray.train.torch.TorchTrainer(
                worker,
                train_loop_config={"config": config.to_json(), "mailbox": mailbox, "images": str(images)},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.cluster.train_workers,
                    use_gpu=config.cluster.gpus_per_worker > 0,
                    resources_per_worker=worker_resources(config.cluster),
                ),
                run_config=ray.train.RunConfig(
                    name=name,
                    storage_path=str(storage),
                    failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                ),
            ).fit()
        assert result.checkpoint is not None
        generator, quality = result_of(Path(result.checkpoint.path), config.gan)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / SAMPLES).write_bytes(sample_grid(generator, config.gan.seed))
        card = {
            "command": command,
            "data": config.data.model_dump(mode="json"),
            "images": len(open_images(images)[1]),
            "training": config.gan.model_dump(mode="json"),
            "quality": quality,
            "seed": config.gan.seed,
            "versions": versions(),
        }
        save_generator(partial, generator, card)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        run.artifact(folder, "generator")
        run.metrics({f"kept_{key}": value for key, value in quality.items()}, step=round(quality["kimg"] * 1000))
    shutil.rmtree(storage / name, ignore_errors=True)
    for file in (images.with_suffix(".npy"), images.with_suffix(".labels.npy")):
        file.unlink(missing_ok=True)
    return folder
