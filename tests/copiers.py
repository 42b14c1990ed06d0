"""Grey digits, generators that copy them, and a classifier of them, for what judges samples."""

from pathlib import Path

import torch
from torch import Tensor

from dmat_ray.config import Config
from dmat_ray.local import LocalContext
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

HERE = LocalContext(Path())


def untrained_classifier(folder: Path, config: Config) -> Path:
    """One of three classes, as jobs/train.py leaves one."""
    torch.manual_seed(0)
    run = checkpoint.describe_run(config, ("a", "b", "c"), 1, 32, "g", "s") | {"epoch": 1}
    checkpoint.save(folder, classifiers.build(config.classifier, 1, 3), run)
    return folder


def digits(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes of one grey level each, on noise, as bytes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    level = torch.tensor([0.2, 0.5, 0.8])[labels].view(-1, 1, 1, 1)
    return ((level + 0.1 * torch.randn(count, 1, 32, 32, generator=rng)).clamp(0, 1) * 255).to(torch.uint8), labels


class Copier(LatentGenerator):
    """Makes image number i of `images` from z with |z_0| in the i-th part of [0, 1); `freedom` 0 makes one image only."""

    def __init__(self, images: Tensor, freedom: float = 1.0) -> None:
        super().__init__(4, 4, 1, 32, 1)
        self.images, self.freedom = images, freedom

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        return z_BZ[:, None]

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        place = (torch.erf(w_BLD[:, 0, 0].abs() / 2**0.5) * len(self.images) * self.freedom).long()
        return self.images[place.clamp(max=len(self.images) - 1)].float() / 255


class ClassCopier(LatentGenerator):
    """Makes images of the class that z asks for, of `dead` classes the same one always."""

    def __init__(self, images: Tensor, labels: Tensor, dead: tuple[int, ...] = ()) -> None:
        classes = int(labels.max()) + 1
        super().__init__(classes + 1, classes + 1, 1, images.shape[2], 1, num_classes=classes)
        self.groups, self.dead = [images[labels == c].float() / 255 for c in range(classes)], dead

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        return z_BZ[:, None]

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        images = []
        for z, c in zip(w_BLD[:, 0], self.class_of(w_BLD[:, 0]).tolist(), strict=True):
            place = 0 if c in self.dead else int(torch.erf(z[-1].abs() / 2**0.5) * len(self.groups[c]))
            images.append(self.groups[c][min(place, len(self.groups[c]) - 1)])
        return torch.stack(images)
