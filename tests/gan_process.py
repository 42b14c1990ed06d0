"""What test_gan_trainer.py starts, by torchrun or alone, and kills: one generator training, each report a line of JSON."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dmat_ray.config import GanConfig
from dmat_ray.local import LocalContext
from dmat_ray.manifold.gan_step import GanTraining
from dmat_ray.manifold.gan_trainer import train_generator


def say(metrics: Mapping[str, float]) -> None:
    print(json.dumps(dict(metrics)), flush=True)


def noting_signs(noted: list[torch.Tensor]) -> None:
    """Have every step append what this worker has counted of the discriminator's signs since they were adapted to."""
    step = GanTraining.step

    def noting(self: GanTraining, i: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        step(self, i, images, labels)
        noted.append(self.signs.clone())

    GanTraining.step = noting  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    config = GanConfig.model_validate(json.loads((folder.parent / "config.json").read_text()))
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 8, 8, generator=rng), torch.arange(40) % 3
    context, noted = LocalContext(folder, say), list[torch.Tensor]()
    noting_signs(noted)
    generator = train_generator(config, images, labels, context)
    torch.save(generator.state_dict(), folder / f"result{context.rank}.pt")
    torch.save(noted, folder / f"signs{context.rank}.pt")
    if context.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
