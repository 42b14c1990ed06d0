"""Shared fixtures: everything tiny, random and seeded, so that the whole core suite runs in a minute on one core."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn

from dmat_ray.config import Config, StyleGAN2Config
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.types import Batch

# the same examples on every run, and no folder of failing ones left behind
settings.register_profile("dmat_ray", derandomize=True, deadline=None, database=None, max_examples=20)
settings.load_profile("dmat_ray")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start: threads that wait for each other take turns

CLASS_NAMES = ["dark", "light", "<b>bright & white</b>"]


def random_generator(resolution: int = 8, channels: int = 1, seed: int = 0) -> StyleGAN2:
    """A StyleGAN 2 with a few hundred weights whose images lie mostly inside (0, 1)."""
    torch.manual_seed(seed)
    shape = StyleGAN2Config(
        resolution=resolution, channels=channels, z_dim=8, w_dim=8, mapping_layers=2, channel_base=32, channel_max=8
    )
    generator = StyleGAN2(shape)
    with torch.no_grad():
        for layer in generator.synth.images:
            layer.conv.weight *= 0.4
    generator.measure_w(samples=1000)
    return generator.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., StyleGAN2]:
    """make_generator(resolution, channels, seed)."""
    return random_generator


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved 8x8 grey generator."""
    folder = tmp_path_factory.mktemp("generator")
    generators.save_generator(folder, random_generator(), {"name": "tiny"})
    return folder


@pytest.fixture(scope="session")
def generator(generator_folder: Path) -> StyleGAN2:
    """The generator of `generator_folder`, loaded."""
    return generators.load_generator(str(generator_folder))


def png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W) or (H, W, C) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def features(class_names: Sequence[str], w_size: int) -> dict[str, object]:
    """What Hugging Face datasets read in a file's metadata, as their documentation describes it."""
    text, number = {"dtype": "string", "_type": "Value"}, {"dtype": "float32", "_type": "Value"}
    return {
        "id": text,
        "split": text,
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "image": {"_type": "Image"},
        "on_manifold": {"_type": "Image"},
        "w": {"feature": number, "length": w_size, "_type": "List"},
        "lpips": number,
        "l1": number,
        "l2": number,
        "steps": {"dtype": "int32", "_type": "Value"},
        "status": text,
    }


def write_set(
    folder: Path,
    generator_folder: Path,
    *,
    train: int = 24,
    test: int = 12,
    shards: int = 3,
    seed: int = 0,
    class_names: Sequence[str] = CLASS_NAMES,
    noise: int = 5,
) -> Path:
    """An on-manifold set as its documentation describes it, written with plain pyarrow; the label is the brightness of g(w).

    Natural images are g(w) plus up to `noise` levels; from about 50 on they are poor.
    """
    generator = generators.load_generator(str(generator_folder))
    count, size = train + test, generator.resolution
    rng = np.random.default_rng(seed)
    w = generator.mapping(torch.from_numpy(rng.standard_normal((count, generator.z_dim), dtype=np.float32))).contiguous()
    with torch.no_grad():
        g = generator.synthesis(w).numpy()
    x = (g * 255).round().astype(np.uint8)
    brightness = x.reshape(count, -1).mean(axis=1)
    label = brightness.argsort().argsort() * len(class_names) // count
    natural = np.clip(x.astype(int) + rng.integers(-noise, noise + 1, x.shape), 0, 255).astype(np.uint8)
    l1 = np.abs(g - natural / 255).mean(axis=(1, 2, 3)).astype(np.float32)
    l2 = np.square(g - natural / 255).mean(axis=(1, 2, 3)).astype(np.float32)
    split = np.where(np.arange(count) < train, "train", "test")
    status = np.where(l1 <= 0.1, "ok", "poor")
    header = f"{'P5' if generator.channels == 1 else 'P6'}\n{size} {size}\n255\n".encode()
    shapes = {"on_manifold": [generator.channels, size, size], "w": [generator.num_ws, generator.w_dim]}
    w_size = generator.num_ws * generator.w_dim
    metadata = {
        "dmat_ray": json.dumps({"version": 2, "shapes": shapes, "class_names": list(class_names)}),
        "huggingface": json.dumps({"info": {"features": features(class_names, w_size)}}),
        "dmat_ray_rejected": "{}",
    }
    (folder / "shards").mkdir(parents=True)
    rows = {}
    for k, index in enumerate(np.array_split(rng.permutation(count), shards)):
        table = pa.table(
            {
                "id": [f"example-{i:03d}" for i in index],
                "split": split[index],
                "label": pa.array(label[index], pa.int64()),
                "image": [{"bytes": png(natural[i].transpose(1, 2, 0).squeeze()), "path": f"{i}.png"} for i in index],
                "on_manifold": pa.array(
                    [{"bytes": header + x[i].transpose(1, 2, 0).tobytes(), "path": None} for i in index],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
                "w": pa.FixedSizeListArray.from_arrays(pa.array(w.numpy()[index].ravel()), w_size),
                "lpips": pa.array(np.zeros(len(index)), pa.float32()),
                "l1": l1[index],
                "l2": l2[index],
                "steps": pa.array(np.full(len(index), 10), pa.int32()),
                "status": status[index],
            }
        ).replace_schema_metadata(metadata)
        name = f"part-{k:06d}.parquet"
        pq.write_table(table, folder / "shards" / name)
        rows[name] = table.num_rows
    manifest = {
        "version": 2,
        "data": {"source": "somewhere", "resolution": size, "channels": generator.channels},
        "projection": {"lpips": 0.1, "steps": 10, "poor_l1": 0.1, "poor_lpips": None},
        "generator_sha256": generators.fingerprint(str(generator_folder)),
        "generator_precision": "reference",
        "class_names": list(class_names),
        "examples": count,
        "shards": rows,
        "shapes": shapes,
        "count": count,
        "splits": counts(split),
        "status": counts(status),
        "usable": counts(split[status == "ok"]),
        "means": {"lpips": 0.0, "l1": round(float(l1.mean()), 6), "l2": round(float(l2.mean()), 6)},
        "lpips_is_perceptual": False,
        "rejected": {},
        "versions": {"dmat_ray": "0.1.0", "torch": "2"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def counts(values: np.ndarray) -> dict[str, int]:
    """How often each value occurs."""
    return dict(Counter(values.tolist()))


@pytest.fixture
def make_set(tmp_path: Path, generator_folder: Path) -> Callable[..., Path]:
    """make_set(train=, test=, shards=) writes a fresh set that a test may damage."""
    return lambda **sizes: write_set(tmp_path / "on_manifold_set", generator_folder, **sizes)


@pytest.fixture(scope="session")
def write_any_set(generator_folder: Path) -> Callable[..., Path]:
    """write_any_set(folder, train=, test=, shards=, noise=) for fixtures that outlive a test."""
    return lambda folder, **sizes: write_set(folder, generator_folder, **sizes)


@pytest.fixture(scope="session")
def set_folder(tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> Path:
    """A set to read only."""
    return write_set(tmp_path_factory.mktemp("shared") / "on_manifold_set", generator_folder)


@pytest.fixture(scope="session")
def make_config(generator_folder: Path) -> Callable[..., Config]:
    """make_config(training={...}, objective={...}): the settings of a training that takes a second."""

    def make(**sections: Any) -> Config:
        objective = {
            "clean": {"weight": 0},
            "image": {"weight": 0.5, "eps": 0.1, "steps": 2},
            "latent": {"weight": 0.5, "eps": 0.1, "steps": 2},
        }
        training = {"epochs": 2, "batch_size": 8, "lr_epochs": [0, 2], "lr_values": [0.05, 0.01], "val_examples": 6}
        values: dict[str, Any] = {
            "data": {"resolution": 8},
            "generator": {"path": str(generator_folder)},
            "classifier": {"name": "digits_cnn"},
            "objective": {**objective, **sections.pop("objective", {})},
            "training": {**training, **sections.pop("training", {})},
            **sections,
        }
        return Config.model_validate(values)

    return make


class SmallNet(nn.Module):
    """Two convolutions with batch norm and dropout: whatever an attack must leave alone."""

    def __init__(self, channels: int = 1, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x * 4 - 2)).relu()
        return self.head(self.drop(self.conv2(x).tanh()).flatten(1))


class ViewingNet(nn.Sequential):
    """A convolution with batch norm whose map `view` takes apart, which activations that have their channels last refuse."""

    def __init__(self, channels: int = 1, num_classes: int = 4) -> None:
        super().__init__(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, num_classes))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self[2](self[1](self[0](x_BCHW)).view(len(x_BCHW), -1))  # type: ignore[no-any-return]


@pytest.fixture
def small_net() -> SmallNet:
    """A seeded network for 8x8 grey images and 4 classes, in training mode, its batch-norm statistics not the initial ones."""
    torch.manual_seed(3)
    network = SmallNet()
    network(torch.rand(32, 1, 8, 8))
    return network


@pytest.fixture(scope="session")
def make_batch(generator: StyleGAN2) -> Callable[..., Batch]:
    """make_batch(count, seed): examples of `generator`, with their w and labels below 4."""

    def make(count: int = 6, seed: int = 0, prefix: str = "example") -> Batch:
        rng = torch.Generator().manual_seed(seed)
        w = generator.mapping(torch.randn(count, generator.z_dim, generator=rng)).contiguous()
        y = torch.randint(4, (count,), generator=rng)
        return Batch([f"{prefix}-{i}" for i in range(count)], generator.synthesis(w), y, w)

    return make
