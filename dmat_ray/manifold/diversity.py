"""Classes of samples: of which they are made, and how far pairs of one lie apart, which tells a generator that has collapsed."""

import torch
from torch import Tensor

from dmat_ray.manifold.base import class_of_z

PAIRS = 30  # of every class at least, by which its diversity is judged


def pair_count(samples: int, num_classes: int) -> int:
    """Images in pairs, `samples` or as many as give every class `PAIRS`; even."""
    return max(samples // 2 * 2, 2 * PAIRS * num_classes)


def of_classes(z_BZ: Tensor, class_B: Tensor, num_classes: int) -> Tensor:
    """z of these classes, which are random where z is: its largest coordinate of a class changes places with the wanted one."""
    rows, largest = torch.arange(len(z_BZ)), z_BZ[:, :num_classes].argmax(dim=1)
    turned = z_BZ.clone()
    turned[rows, largest], turned[rows, class_B] = z_BZ[rows, class_B], z_BZ[rows, largest]
    return turned


def of_same_class(z_BZ: Tensor, one_BZ: Tensor, num_classes: int) -> Tensor:
    """z of the classes of `one_BZ`, with which they share nothing else; as they are for a generator without classes (0)."""
    return of_classes(z_BZ, class_of_z(one_BZ, num_classes), num_classes) if num_classes else z_BZ


def uneven(labels: Tensor) -> bool:
    """Whether of images of these labels (N) some classes have more than others."""
    counts = torch.unique(labels, return_counts=True)[1]
    return bool((counts != counts[0]).any())


def distances(x_BCHW: Tensor) -> Tensor:
    """Mean absolute pixel difference between images 2i and 2i + 1 (B / 2), in the images' units."""
    return (x_BCHW[0::2] - x_BCHW[1::2]).abs().mean(dim=(1, 2, 3))


def class_means(values: Tensor, classes: Tensor | None, least: int = 20) -> dict[int | None, float]:
    """Mean of values (N), of all (under None) and of each class (N) that has `least` or more of them."""
    means: dict[int | None, float] = {None: float(values.mean())}
    if classes is not None:
        for c in torch.unique(classes).tolist():
            members = values[classes == c]
            if len(members) >= least:
                means[int(c)] = float(members.mean())
    return means


def real_pairs(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Positions (count) of images: a random one of a class, then another of it; the classes in turn."""
    groups = [torch.nonzero(labels == c).flatten() for c in torch.unique(labels)]
    pairs: list[int] = []
    for k in range(max(1, count // 2)):
        group = groups[k % len(groups)]
        first = int(torch.randint(len(group), (1,), generator=rng))
        step = 1 + int(torch.randint(len(group) - 1, (1,), generator=rng)) if len(group) > 1 else 0
        pairs += [int(group[first]), int(group[(first + step) % len(group)])]
    return torch.tensor(pairs)


def warning_of_collapse(quality: dict[str, float], rest: str) -> str:
    """What is to be said of a snapshot of this quality, with `rest` behind it; empty unless it has collapsed."""
    if not quality.get("collapsed"):
        return ""
    return (
        f"warning: two samples of a class are only {quality['lowest_diversity']:.0%} as far apart as real images: the generator "
        f"has collapsed {rest}"
    )
