"""What test_workers_apart.py starts by torchrun: trainings whose second worker does not see the checkpoints of the first."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dmat_ray.config import EncoderConfig, GanConfig
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.encoder_trainer import train_encoder
from dmat_ray.manifold.gan_trainer import train_generator


class Apart(LocalContext):
    def checkpoints(self) -> Sequence[Path]:
        return super().checkpoints() if self.rank == 0 else []


def main() -> None:
    torch.set_num_threads(1)
    folder, generator_folder = Path(sys.argv[1]), sys.argv[2]
    configs = json.loads((folder / "config.json").read_text())
    gan, encoder = GanConfig.model_validate(configs["gan"]), EncoderConfig.model_validate(configs["encoder"])
    generator, sha = generators.load_generator(generator_folder), generators.fingerprint(generator_folder)
    trainings: dict[str, Callable[[LocalContext], object]] = {
        "gan": lambda context: train_generator(gan, torch.zeros(40, 1, 8, 8), torch.arange(40) % 3, context),
        "encoder": lambda context: train_encoder(encoder, generator, sha, context),
    }
    for name, train in trainings.items():
        context = Apart(folder / name)
        try:
            train(context)
        except UserError as error:
            (folder / f"{name}{context.rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
