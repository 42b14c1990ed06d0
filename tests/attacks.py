"""Images, threats, a search over them and a loss written out, for the tests of attacks."""

from typing import Any

import torch
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import Attacked, attack
from dmat_ray.config import AttackConfig, FogThreat, ImageThreat, JpegThreat, LatentThreat
from dmat_ray.types import Batch

THREATS = {
    "image linf": ImageThreat(eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.0),
    "latent": LatentThreat(eps=0.3),
    "fog": FogThreat(eps=0.5),
    "jpeg": JpegThreat(eps=0.5),
}


def images(count: int = 16, *, seed: int = 0, spread: float = 1.6) -> Batch:
    """Random images, many of their pixels at 0 or 1 if `spread` is above 1."""
    rng = torch.Generator().manual_seed(seed)
    x = ((torch.rand(count, 1, 8, 8, generator=rng) - 0.5) * spread + 0.5).clamp(0, 1)
    return Batch([f"image-{i}" for i in range(count)], x, torch.randint(4, (count,), generator=rng))


def find(network: nn.Module, batch: Batch, settings: threats.ThreatSettings, **how: Any) -> Attacked:
    return attack(network, threats.build(settings, None), batch, AttackConfig(**how), seed=0, purpose="test")


def plain_dlr(logits: Tensor, y: Tensor) -> Tensor:
    ranked = logits[0].sort(descending=True).values
    other = torch.cat([logits[0, : y.item()], logits[0, int(y.item()) + 1 :]]).max()
    return -(logits[0, y.item()] - other) / (ranked[0] - ranked[2])
