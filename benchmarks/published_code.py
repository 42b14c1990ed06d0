"""Running the authors' code of arXiv 1908.08016 from a clone, and digits to run it on; used by the other scripts.

The code is imported by path: it is the reader's own, no part of dmat_ray. It asks for CUDA wherever it makes a tensor; on a CPU
that is taken out as it is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dmat_ray.config import ClassifierConfig, FogRow, ImageRow, Row
from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import UserError
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.types import Batch

ElasticRow, GaborRow, JpegRow, SnowRow = (ROWS[name] for name in ("elastic", "gabor", "jpeg", "snow"))
GlitchRow, PixelRow, KaleidoscopeRow, WoodRow = (ROWS[name] for name in ("glitch", "pixel", "kaleidoscope", "wood"))
TESTS = Path(__file__).parent.parent / "tests"


class OnCpu(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports top-level `names` from a folder with every mention of CUDA taken out."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def _path(self, fullname: str) -> Path:
        place = self.root.joinpath(*fullname.split("."))
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        place = self._path(fullname)
        if fullname.split(".")[0] not in self.names or not place.is_file():
            return None
        folders = [str(place.parent)] if self.is_package(fullname) else None
        return importlib.util.spec_from_file_location(fullname, place, loader=self, submodule_search_locations=folders)

    def is_package(self, fullname: str) -> bool:
        return self._path(fullname).name == "__init__.py"

    def get_source(self, fullname: str) -> str:
        return self._path(fullname).read_text().replace(".cuda()", "").replace("'cuda'", "'cpu'").replace('"cuda"', '"cpu"')


def published(root: Path, names: Sequence[str], device: str = "cpu") -> Callable[[str], ModuleType]:
    """Importer of a clone's modules by name, to run on `device`."""
    if not all((root / name).exists() or (root / f"{name}.py").exists() for name in names):
        raise UserError(f"'{root}' has no {' and '.join(names)}; give a clone of the project named in --help")
    if device == "cpu":
        sys.meta_path.insert(0, OnCpu(root, names))
    else:
        sys.path.insert(0, str(root))
    return importlib.import_module


def advex_uar(root: Path, device: str = "cpu") -> ModuleType:
    """Attacks of the first version."""
    return published(root, ["advex_uar"], device)("advex_uar.attacks")


def advex_attack(code: ModuleType, row: Row, size: int) -> Any:
    """The first version's attack with the budget, steps and step size of a row."""
    steps, step = row.steps, row.step_size
    if isinstance(row, ImageRow):
        return code.PGDAttack(steps, 255 * row.eps, 255 * step, size, row.norm)
    if isinstance(row, FogRow):
        return code.FogAttack(steps, 255 * row.eps, step, size, wibble_decay=row.wibble_decay)
    if isinstance(row, SnowRow):
        # its last step is not projected: so it ends with the budget of ours
        return code.SnowAttack(steps, row.eps, step, size, budget=row.budget - step)
    if isinstance(row, ElasticRow):
        return code.ElasticAttack(steps, row.eps, step, size, kernel_std=row.std)
    if isinstance(row, GaborRow):
        return code.GaborAttack(steps, 255 * row.eps, 2 * step, size)  # in [-1, 1] where ours are in [0, 1]
    assert isinstance(row, JpegRow)
    # a coefficient moves by half of what its radius is measured in
    return code.JPEGAttack(steps, 2 * row.eps, 2 * step, size, opt=row.norm)


def run_advex(attack: Any, network: nn.Module, batch: Batch) -> Tensor:
    """Its images, without the normalisation of ImageNet that its call undoes and redoes."""
    return attack._forward(lambda pixels: network(pixels / 255), batch.x_BCHW * 255, batch.y_B, avoid_target=True) / 255


class Luma(nn.Module):
    """Colour to grey, for networks that know grey images only: the published attacks know colour only.

    As JPEG has it, so that its chroma, which theirs and ours treat differently, makes no difference.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW * x_BCHW.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


class Negative(nn.Module):
    """A network of digits, for digits in black on white."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.network(1 - x_BCHW)


def digit_network(name: str) -> nn.Module:
    """A classifier under tests/classifiers, for colour images."""
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=10)
    checkpoint.load_weights(TESTS / "classifiers" / name, network)
    return nn.Sequential(Luma(), network).eval()


def digits(count: int) -> Batch:
    """Colour images of test digits that both classifiers get right."""
    sys.path.append(str(TESTS))
    every = importlib.import_module("classifiers.make").digits("test")
    every = Batch(every.id, every.x_BCHW.expand(-1, 3, -1, -1).contiguous(), every.y_B)
    with torch.no_grad():
        right = [digit_network(name)(every.x_BCHW).argmax(dim=1) == every.y_B for name in ("standard", "robust")]
    rows = (right[0] & right[1]).nonzero()[:, 0]
    return every.take(rows[torch.arange(count) * len(rows) // count])
