"""Generator training on Ray Train."""

import shutil
import tempfile
from collections.abc import Callable
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
from dmat_ray.cluster.events import listen
from dmat_ray.cluster.session import worker_resources
from dmat_ray.config import Config, DataConfig
from dmat_ray.data.sources import decode, list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold.gan import train_generator
from dmat_ray.manifold.generators import CARD, WEIGHTS, save_generator

SAMPLES = "samples.png"


def training_images(config: DataConfig) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and labels (N) of the training split."""
    examples = [e for e in list_examples(config).examples if e.split == "train"]
    images, labels, rejected = [], [], {}
    for example in examples:
        try:
            images.append(decode(example.read(), config.resolution, config.channels))
            labels.append(example.label)
        except (OSError, ValueError) as error:
            rejected[example.id] = str(error)
    if len(rejected) > config.max_rejected * len(examples) or not images:
        name, reason = next(iter(rejected.items()))
        raise UserError(f"{len(rejected)} of {len(examples)} images were rejected; the first: '{name}' {reason}")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs; rank 0 hands the finished generator over as the checkpoint."""
    config = Config.model_validate(settings["config"])
    context = RayContext("generator", settings["mailbox"])
    torch.set_num_threads(config.cluster.threads_per_worker)
    images, labels = training_images(config.data)
    generator = train_generator(config.gan, images, labels, context)
    if context.rank != 0:
        context.report({})
        return
    with tempfile.TemporaryDirectory(prefix="dmat_ray_") as folder:
        card = {
            "command": settings["command"],
            "data": config.data.model_dump(mode="json"),
            "images": len(images),
            "training": config.gan.model_dump(mode="json"),
            "seed": config.gan.seed,
            "versions": versions(),
        }
        save_generator(Path(folder), generator, card)
        _save_samples(Path(folder) / SAMPLES, generator, config.gan.seed)
        context.report({}, Path(folder))


@torch.no_grad()
def _save_samples(path: Path, generator: Any, seed: int, rows: int = 8, columns: int = 10) -> None:
    """A grid of samples; column c holds class c (modulo the classes) where the generator has classes."""
    from torchvision.utils import save_image

    z = torch.randn(rows * columns, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    classes = generator.config.num_classes
    if classes:
        column = torch.arange(len(z)) % columns % classes
        z[torch.arange(len(z)), column] = z[:, :classes].amax(dim=1) + 1
    save_image(generator.synthesis(generator.mapping(z.to(generator.w_mean.device))), path, nrow=columns)


def train(config: Config, folder: Path, command: str, say: Callable[[str], None]) -> Path:
    """Train a generator on the training split of `config.data` and write it to `folder`. Ray must be connected."""
    if config.gan.batch_size % config.cluster.train_workers:
        raise UserError(
            f"gan.batch_size {config.gan.batch_size} does not divide by cluster.train_workers {config.cluster.train_workers}"
        )
    storage = Path(config.output).resolve() / "train"
    name = f"generator-{config.gan.fingerprint()}-{config.data.fingerprint()}"
    with tracking.tracked(config, "", "train_generator") as run:

        def handle(event: dict[str, Any]) -> None:
            metrics = event["metrics"]
            if metrics:
                run.metrics(metrics, step=int(metrics["kimg"] * 1000))
                text = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if key != "kimg")
                say(f"{metrics['kimg']:.0f} of {config.gan.kimg:.0f} thousand images, {text}")

        with listen(handle) as mailbox:
            result = ray.train.torch.TorchTrainer(
                worker,
                train_loop_config={"config": config.to_json(), "mailbox": mailbox, "command": command},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.cluster.train_workers,
                    use_gpu=config.cluster.gpus_per_worker > 0,
                    resources_per_worker=worker_resources(config.cluster),
                ),
                run_config=ray.train.RunConfig(name=name, storage_path=str(storage)),
            ).fit()
        assert result.checkpoint is not None
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in (WEIGHTS, SAMPLES, CARD):
            shutil.copy2(Path(result.checkpoint.path) / file, partial / file)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        run.artifact(folder, "generator")
    shutil.rmtree(storage / name, ignore_errors=True)
    return folder
