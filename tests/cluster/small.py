"""Settings small enough for two cores."""

from pathlib import Path
from typing import Any

from dmat_ray import cli
from dmat_ray.config import Config

SMALL = [
    *("--data.train_limit", "60", "--data.test_limit", "40", "--projection.steps", "6", "--projection.candidates", "200"),
    *("--projection.batch_size", "20", "--projection.poor_l1", "0.9", "--training.epochs", "2", "--training.batch_size", "20"),
    *("--training.val_examples", "20", "--evaluation.batch_size", "20", "--training.lr_epochs", "0,2"),
    *("--training.lr_values", "0.05,0.01"),
]


def settings(output: Path, *options: Any, preset: tuple[str, ...] = ("demo",)) -> Config:
    """The demo's settings at a size for tests, under `output`."""
    config, _ = cli.parse("test", ["--preset", *preset, "--output", str(output), *SMALL, *map(str, options)])
    return config
