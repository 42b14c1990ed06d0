"""What test_gan_trainer.py starts, by torchrun or alone, and kills: one generator training, each report a line of JSON."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dmat_ray.config import GanConfig
from dmat_ray.local import LocalContext
from dmat_ray.manifold.gan_trainer import train_generator


def say(metrics: Mapping[str, float]) -> None:
    print(json.dumps(dict(metrics)), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    config = GanConfig.model_validate(json.loads((folder.parent / "config.json").read_text()))
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 1, 8, 8, generator=rng), torch.arange(40) % 3
    context = LocalContext(folder, say)
    generator = train_generator(config, images, labels, context)
    torch.save(generator.state_dict(), folder / f"result{context.rank}.pt")
    if context.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
