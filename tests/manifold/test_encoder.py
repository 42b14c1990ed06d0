"""The encoder: its codes for any image, and the shipped one on real digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import images, random_encoder
from torch import Tensor

from dmat_ray.config import DataConfig, EncoderConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.manifold import generators
from dmat_ray.manifold.encoder import Encoder, load_encoder
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("resolution", "channels", "num_ws"), [(8, 1, 1), (28, 3, 5), (30, 1, 2), (2, 1, 3), (64, 3, 10)])
def test_any_size_of_image_and_code(resolution: int, channels: int, num_ws: int) -> None:
    encoder = Encoder(resolution, channels, num_ws, w_dim=6, width=8, width_max=16)
    encoder.w_mean.copy_(torch.arange(6.0))
    encoder.w_std.fill_(2.0)
    x = images(3, size=resolution, channels=channels)
    assert torch.equal(encoder(x), torch.arange(6.0).expand(3, num_ws, 6)), "untrained, it says w_mean"
    with torch.no_grad():
        encoder.head.bias.fill_(0.5)
    assert torch.equal(encoder(x), (torch.arange(6.0) + 1.0).expand(3, num_ws, 6)), "offsets are in units of w_std"
    assert encoder(x).dtype == torch.float32


def test_a_code_does_not_depend_on_the_neighbours(generator: StyleGAN2) -> None:
    encoder = random_encoder(generator)
    batch, others = images(6), images(6, seed=1)
    others[2] = batch[2]
    codes, mixed = encoder(batch), encoder(others)
    assert torch.equal(codes[2], mixed[2])
    assert not torch.equal(codes[3], mixed[3])
    torch.testing.assert_close(encoder(batch[2:3])[0], codes[2], rtol=1e-5, atol=1e-6)
    assert codes.std(dim=0).max() > 0.01


def digits(count: int) -> Tensor:
    """Test digits of MNIST-5k at 32x32, in [0, 1]."""
    config = DataConfig(source="mnist5k", resolution=32, channels=1, test_limit=count)
    pixels = read_pixels(list_examples(config).rows("test"), config)
    return torch.from_numpy(np.stack(pixels)).float() / 255


def test_the_shipped_encoder_is_for_the_shipped_generator_and_small() -> None:
    folder = Path(weights.generator_folder("mnist32"))
    card = json.loads((folder / "encoder.json").read_text())
    assert card["generator_sha256"] == generators.fingerprint("mnist32")
    assert card["training"] == EncoderConfig().model_dump(mode="json"), "the defaults are the recipe"
    assert card["command"] == "python jobs/train_encoder.py"
    assert sum((folder / name).stat().st_size for name in ("encoder.safetensors", "encoder.json")) < 1_000_000


def test_the_shipped_encoder_beats_the_nearest_of_2000_samples_on_real_digits() -> None:
    generator = generators.load_generator("mnist32")
    encoder = load_encoder(weights.generator_folder("mnist32"), generators.fingerprint("mnist32"))
    x = digits(200)
    z = torch.randn(2000, generator.z_dim, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([generator.synthesis(generator.mapping(part)) for part in z.split(250)])
    nearest = samples[torch.cdist(x.flatten(1), samples.flatten(1)).argmin(dim=1)]
    found = generator.synthesis(encoder(x))
    assert (found - x).abs().mean() < 0.75 * (nearest - x).abs().mean()
    assert (found - x).square().mean() < 0.5 * (nearest - x).square().mean()
