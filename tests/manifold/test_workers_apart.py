"""Workers of a training that do not see the same checkpoints do not go on from different ones."""

import json
from pathlib import Path

import pytest
import torch
from encoders import settings as encoder_settings
from torchrun import run_two_workers

from dmat_ray.config import GanConfig
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.encoder_trainer import train_encoder
from dmat_ray.manifold.gan_trainer import train_generator
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow

SHAPE = {"resolution": 8, "z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 32, "channel_max": 8, "num_classes": 3}


def test_workers_that_see_different_checkpoints_end_in_one_line(
    tmp_path: Path, generator: StyleGAN2, generator_folder: Path
) -> None:
    gan = GanConfig.model_validate(
        {"architecture": SHAPE, "batch_size": 8, "kimg": 0.04, "quality": {"network": "none", "samples": 60}}
    )
    encoder = encoder_settings(kimg=0.16)
    configs = {"gan": gan.model_dump(mode="json"), "encoder": encoder.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(configs))
    contexts = [LocalContext(tmp_path / name) for name in configs]
    train_generator(gan, torch.zeros(40, 1, 8, 8), torch.arange(40) % 3, contexts[0])
    train_encoder(encoder, generator, generators.fingerprint(str(generator_folder)), contexts[1])
    run_two_workers("apart_process.py", str(tmp_path), str(generator_folder))
    told = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert sorted(told) == ["encoder0.txt", "encoder1.txt", "gan0.txt", "gan1.txt"]
    assert all(text.startswith("workers found different checkpoints to go on from") for text in told.values())
