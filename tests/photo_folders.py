"""Folders of small pictures of noise, and settings for them."""

from pathlib import Path

import numpy as np
from PIL import Image

from dmat_ray import cli
from dmat_ray.config import Config


def photo_folder(root: Path, count: int = 12, classes: int = 2) -> Path:
    """Small pictures in `classes` sub-folders, or in none."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / (f"class{i % classes}" if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 10), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return root


def photo_settings(source: Path, output: Path, *options: str) -> Config:
    shape = ("--data.source", str(source), "--data.resolution", "8", "--gan.architecture.resolution", "8")
    return cli.parse("test", ["--output", str(output), *shape, *options])[0]
