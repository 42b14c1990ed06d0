"""What test_encoder_resuming.py starts, by torchrun or alone, and kills: one encoder training, each report a line of JSON."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from dmat_ray.config import EncoderConfig
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer, generators


def main() -> None:
    torch.set_num_threads(1)
    folder, generator_folder = Path(sys.argv[1]), sys.argv[2]
    config = EncoderConfig.model_validate(json.loads((folder.parent / "config.json").read_text()))
    losses: list[float] = []

    def say(metrics: Mapping[str, float]) -> None:
        print(json.dumps(dict(metrics)), flush=True)
        losses.append(metrics["loss"])

    context = LocalContext(folder, say)
    seen: list[torch.Tensor] = []
    sample_w = encoder_trainer.sample_w

    def noted(*arguments: object) -> torch.Tensor:
        w = sample_w(*arguments)  # type: ignore[arg-type]
        seen.append(w)
        return w

    encoder_trainer.sample_w = noted
    generator = generators.load_generator(generator_folder)
    encoder = encoder_trainer.train_encoder(config, generator, generators.fingerprint(generator_folder), context)
    found = {"encoder": encoder.state_dict(), "samples": torch.stack(seen), "losses": losses}
    torch.save(found, folder / f"result{context.rank}.pt")
    if context.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
