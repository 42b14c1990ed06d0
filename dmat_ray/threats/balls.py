"""Norm balls: steepest ascent, projection, sampling, size. Batch first, everything else flattened."""

import torch
from torch import Tensor

from dmat_ray.rng import Draws


def per_example(value_B: Tensor, like: Tensor) -> Tensor:
    """(B) reshaped to broadcast against `like` (B, ...)."""
    return value_B.view(-1, *([1] * (like.dim() - 1)))


def ball_norm(theta: Tensor, norm: str) -> Tensor:
    """Size of each example's theta (B)."""
    flat = theta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Unit step that raises a linear loss most: the sign for L-infinity, the normalised gradient for L2."""
    if norm == "linf":
        return gradient.sign()
    return gradient / per_example(gradient.flatten(1).norm(dim=1).clamp_min(1e-12), gradient)


def project_ball(theta: Tensor, norm: str, eps: float) -> Tensor:
    """Closest point of the ball of radius eps."""
    if norm == "linf":
        return theta.clamp(-eps, eps)
    size = per_example(theta.flatten(1).norm(dim=1).clamp_min(1e-12), theta)
    return theta * (eps / size).clamp(max=1.0)


def random_in_ball(draws: Draws, like: Tensor, norm: str) -> Tensor:
    """Uniform in the unit ball, of the shape of `like`."""
    shape = like.shape[1:]
    if norm == "linf":
        return draws.uniform(*shape, like=like) * 2 - 1
    direction = steepest(draws.normal(*shape, like=like), "l2")
    dims = torch.tensor(shape).prod().item()
    return direction * draws.uniform(*([1] * len(shape)), like=like).pow(1.0 / dims)
