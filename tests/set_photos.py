"""Photos in parts, and settings that make an on-manifold set of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dmat_ray.config import Config, DataConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import set_maker

PLAIN = {"lpips": 0, "start": "mean", "steps": 1, "poor_l1": 1}
Make = Callable[..., Config]


def parted_photos(root: Path) -> Path:
    """Ten pictures of each of two classes in parts: two of them are in the folder test, the others in train."""
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = root / ("test" if number < 4 else "train") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return root


def settings_maker(photos: Path, folder: Path, generator_folder: Path) -> Make:
    """make(card, **data): settings with a generator whose card has `card` under data; both are of the photos."""

    def made(card: dict[str, Any] | None, **data: Any) -> Config:
        generator = folder / "generator"
        shutil.copytree(generator_folder, generator, dirs_exist_ok=True)
        known = json.loads((generator / "card.json").read_text())
        if card is not None:
            known["data"] = {"source": str(photos), "resolution": 8, **card}
        (generator / "card.json").write_text(json.dumps(known))
        gan = {"architecture": known["architecture"]}
        values = {"data": {"source": str(photos), "resolution": 8, **data}, "generator": {"path": str(generator)}, "gan": gan}
        return Config.model_validate({**values, "projection": PLAIN, "output": str(folder / "out")})

    return made


def said(config: Config) -> list[str]:
    """The warnings of a projection before it begins."""
    return set_maker.warnings_before(config, set_maker.prepare(config, print))


def unreadable(rows: pa.Table, data: DataConfig) -> list[np.ndarray | str]:
    raise UserError("no such column")
