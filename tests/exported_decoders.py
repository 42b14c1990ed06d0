"""Decoders as modules, and as the programs that are exported of them."""

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.manifold import exported, generators

CPU = torch.device("cpu")
W_DIM = 5


class Decoder(nn.Module):
    """w (B, 5) -> (B, 1, 8, 8) in [0, 1], with what VAEs have: batch norm, dropout, upsampling, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W_DIM, 8 * 4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.last = nn.Conv2d(6, 1, 3, padding=1)

    def features(self, w: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(w).view(w.shape[0], 8, 2, 2)))
        x = F.gelu(self.up(x), approximate="tanh") * torch.tensor([1.5])
        return self.last(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def forward(self, w: Tensor) -> Tensor:
        return self.features(w).sigmoid()


class LayeredDecoder(Decoder):
    """w (B, 3, 5) -> (B, 3, 8, 8) in [-1, 1], each layer used in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(W_DIM, 1)
        self.colour = nn.Linear(W_DIM, 3)

    def forward(self, w: Tensor) -> Tensor:
        x = self.features(w[:, 0]) * (1 + self.style(w[:, 1]))[:, :, None, None]
        return (x + self.colour(w[:, 2])[:, :, None, None]).tanh()


CARDS: dict[type[nn.Module], dict[str, Any]] = {
    Decoder: {"w_dim": W_DIM, "resolution": 8, "channels": 1},
    LayeredDecoder: {"w_dim": W_DIM, "num_ws": 3, "resolution": 8, "channels": 3, "output_range": [-1, 1]},
}


def module(kind: type[nn.Module]) -> Any:
    """A seeded decoder in eval mode whose batch-norm statistics are not the initial ones, and whose images vary."""
    torch.manual_seed(1)
    decoder = kind()
    with torch.no_grad():
        decoder.last.weight.mul_(20)  # type: ignore[union-attr, operator]
        shape = (64, W_DIM) if kind is Decoder else (64, CARDS[kind].get("num_ws", 1), W_DIM)
        decoder(torch.randn(shape))
    return decoder.eval()


def save(program: nn.Module, path: Path, how: str, w: Tensor, *, dynamic: bool = True) -> Path:
    """Export as the guide says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "script":
        torch.jit.script(program).save(str(path))
    elif how == "trace":
        torch.jit.trace(program, w, check_trace=False).save(str(path))
    else:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        torch.export.save(torch.export.export(program, (w,), dynamic_shapes=shapes), path.with_suffix(".pt2"))
        return path.with_suffix(".pt2")
    return path


def example(kind: type[nn.Module] = Decoder, count: int = 2) -> Tensor:
    layers = CARDS[kind].get("num_ws", 1)
    w = torch.randn(count, layers, W_DIM, generator=torch.Generator().manual_seed(count))
    return w[:, 0] if kind is Decoder else w


@pytest.fixture(name="made", scope="session")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(kind, how): a program's file, exported once."""
    root = tmp_path_factory.mktemp("programs")

    @functools.cache
    def make(kind: type[nn.Module], how: str) -> Path:
        return save(module(kind), root / f"{kind.__name__}_{how}.pt", how, example(kind))

    return make


@pytest.fixture(name="load")
def load_fixture(tmp_path: Path) -> Callable[..., exported.ExportedDecoder]:
    """load(program, **card): imported, and loaded as everything else loads a generator."""

    def make(path: Path, **card: Any) -> exported.ExportedDecoder:
        (tmp_path / "mine.json").write_text(json.dumps({**CARDS[Decoder], **card}))
        exported.import_program(path, tmp_path / "mine.json", tmp_path / "generator")
        generator = generators.load_generator(str(tmp_path / "generator"))
        assert isinstance(generator, exported.ExportedDecoder)
        return generator

    return make


def edited(path: Path, target: Path, edit: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """A copy of an archive with records changed, left out, or added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = edit(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target
