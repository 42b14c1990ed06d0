"""Classifiers by others: small networks, the files that they come in, and how these are read."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign_files import torch_saved
from torch import Tensor, nn

from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.exchange import model_import
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

CLASSES = ("cat", "dog", "fox", "owl")
SIZE = 32
NAME = "shufflenet_v2_x0_5"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unsettle(network: nn.Module) -> nn.Module:
    """Batch-norm statistics other than those that every network begins with."""
    rng = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=rng)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2, generator=rng)  # type: ignore[union-attr]
    return network.eval()


@pytest.fixture(name="shufflenet", scope="session")
def shufflenet_fixture() -> nn.Module:
    """A small network of torchvision's, for four classes."""
    torch.manual_seed(0)
    return unsettle(torchvision.models.shufflenet_v2_x0_5(num_classes=4))


@pytest.fixture(name="images", scope="session")
def images_fixture() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


class Normalised(nn.Module):
    """What papers wrap their networks in: takes [0, 1]."""

    def __init__(self, network: nn.Module, names: tuple[str, str] = ("mean", "std"), inner: str = "model") -> None:
        super().__init__()
        for name, values in zip(names, IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.names, self.inner = names, inner
        self.add_module(inner, network)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name) for name in self.names)
        return self.get_submodule(self.inner)((x - mean) / std)


class Small(nn.Module):
    """x (B, 3, 32, 32) -> logits (B, 4), with batch norm and dropout."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


def small(kind: Callable[..., nn.Module] = Small, *arguments: Any) -> nn.Module:
    torch.manual_seed(2)
    return unsettle(kind(*arguments))


def program(network: nn.Module, path: Path, how: str, *, dynamic: bool = True) -> Path:
    """Exported as the guide says."""
    x = torch.rand(2, 3, SIZE, SIZE)
    if how == "script":
        torch.jit.script(network).save(str(path))
    elif how == "trace":
        torch.jit.trace(network, x, check_trace=False).save(str(path))
    else:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=shapes), path.with_suffix(".pt2"))
        return path.with_suffix(".pt2")
    return path


def read(path: Path, name: str = NAME, given: Any = None, classes: int = 4, channels: int = 3) -> model_import.Imported:
    return model_import.read_model(path, ClassifierConfig(name=name), given, channels, SIZE, classes)


def imported(path: Path, folder: Path, **options: Any) -> tuple[classifiers.Classifier, dict[str, Any]]:
    """Read, written, and loaded as evaluation does."""
    found = read(path, **options)
    channels = options.get("channels", 3)
    model_import.save_model(found, path, Config(name="theirs"), CLASSES[: options.get("classes", 4)], channels, SIZE, folder)
    return checkpoint.load_classifier(folder)


def saved(tree: Any, path: Path) -> Path:
    path.write_bytes(torch_saved(tree))
    return path


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in state.items())
