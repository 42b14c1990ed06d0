"""Norm balls and boxes: steepest ascent, projection, sampling, size. Batch first, everything else flattened."""

import torch
from torch import Tensor

from dmat_ray.rng import Draws
from dmat_ray.types import Batch

SPARSE = 0.01  # share of the coordinates that a step in L1 moves; 0.05 is far weaker (tests/attack/test_attack_strength.py)
BISECTIONS = 50  # of a threshold: float64 is exhausted by then


def per_example(value_B: Tensor, like: Tensor) -> Tensor:
    """(B) reshaped to broadcast against `like` (B, ...)."""
    return value_B.view(-1, *([1] * (like.dim() - 1)))


def clip_straight_through(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """x clipped to [low, high] with the gradient of the identity."""
    return x + (x.clamp(low, high) - x).detach()


def ball_norm(theta: Tensor, norm: str) -> Tensor:
    """Size of each example's theta (B)."""
    flat = theta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(dim=1)
    return flat.abs().sum(dim=1) if norm == "l1" else flat.norm(dim=1)


def steepest(gradient: Tensor, norm: str, sparse_B: Tensor | None = None) -> Tensor:
    """Unit step that raises a linear loss: the sign for L-infinity, the normalised gradient for L2.

    For L1 the very steepest moves one coordinate; this one spreads over the share `sparse_B` of the coordinates in which the
    gradient is largest, by default SPARSE (SLIDE, arXiv 1904.13000).
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        # by a power of two first, which rounds nothing: squares of what is below 1e-19 are zero in single precision
        power_B = torch.frexp(gradient.flatten(1).abs().amax(dim=1)).exponent.clamp_min(-120)
        gradient = torch.ldexp(gradient, -per_example(power_B, gradient))
        return gradient / per_example(gradient.flatten(1).norm(dim=1).clamp_min(1e-12), gradient)
    flat = gradient.flatten(1)
    count, size = flat.shape[1], flat.abs()
    if sparse_B is None:
        least = size.topk(max(1, round(SPARSE * count)), dim=1).values[:, -1:]
    else:
        place = (count - (sparse_B * count).round().long()).clamp(0, count - 1)
        least = size.sort(dim=1).values.gather(1, place[:, None])
    signs = torch.where(size >= least, flat.sign(), 0.0)
    return (signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1.0)).view_as(gradient)


def project_ball(theta: Tensor, norm: str, eps: float) -> Tensor:
    """Closest point of the ball of radius eps."""
    if norm == "linf":
        return theta.clamp(-eps, eps)
    if norm == "l1":
        return project_l1_in_box(theta, eps, torch.full_like(theta, -torch.inf), torch.full_like(theta, torch.inf))
    size = per_example(theta.flatten(1).norm(dim=1).clamp_min(1e-12), theta)
    return theta * (eps / size).clamp(max=1.0)


def project_l1_in_box(theta: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
    """Closest point with L1 norm up to eps and low <= point <= high, where low <= 0 <= high (as in arXiv 2103.01208).

    By the conditions of Karush, Kuhn and Tucker that point is theta, its size reduced by one threshold for all coordinates,
    then clipped; the threshold is found by bisection.
    """
    size = theta.abs()

    def reduced(threshold_B: Tensor) -> Tensor:
        return torch.clamp(theta.sign() * (size - per_example(threshold_B, theta)).clamp_min(0.0), low, high)

    enough = size.flatten(1).amax(dim=1)
    too_little = torch.zeros_like(enough)
    inside = ball_norm(reduced(too_little), "l1") <= eps
    for _ in range(BISECTIONS):
        middle = (too_little + enough) / 2
        fits = ball_norm(reduced(middle), "l1") <= eps
        enough, too_little = torch.where(fits, middle, enough), torch.where(fits, too_little, middle)
    return reduced(torch.where(inside, torch.zeros_like(enough), enough))


def random_in_ball(draws: Draws, like: Tensor, norm: str) -> Tensor:
    """Uniform in the unit ball, of the shape of `like`."""
    shape = like.shape[1:]
    if norm == "linf":
        return draws.uniform(*shape, like=like) * 2 - 1
    dims = int(torch.tensor(shape).prod())
    if norm == "l1":
        # exponential sizes over their sum, with one more for what is left to the surface (arXiv math/0503650)
        sizes = -torch.log1p(-draws.uniform(dims + 1, like=like))
        signs = (draws.uniform(dims, like=like) < 0.5).to(like) * 2 - 1
        return (signs * sizes[:, :-1] / sizes.sum(dim=1, keepdim=True)).view(-1, *shape)
    direction = steepest(draws.normal(*shape, like=like), "l2")
    return direction * draws.uniform(*([1] * len(shape)), like=like).pow(1.0 / dims)


class Ball:
    """What threats have in common whose theta lies in a ball of `norm` and radius `eps`, whatever the image."""

    default_step: float | None = None

    def __init__(self, norm: str, eps: float) -> None:
        self.norm, self.eps, self.limit, self.span = norm, eps, eps, 2 * eps

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """Steepest ascent."""
        return self.sparse_direction(batch, theta, gradient)

    def sparse_direction(self, batch: Batch, theta: Tensor, gradient: Tensor, sparse_B: Tensor | None = None) -> Tensor:
        """The same, in L1 of so many coordinates: see `steepest`."""
        return steepest(gradient, self.norm, sparse_B)

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """Back into the ball."""
        return project_ball(theta, self.norm, self.eps)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Norm of theta."""
        return ball_norm(theta, self.norm)

    def length(self, batch: Batch, theta: Tensor, move: Tensor) -> Tensor:
        """Norm of the step, wherever it begins."""
        return ball_norm(move, self.norm)

    def within(self, draws: Draws | None, like: Tensor) -> Tensor:
        """Uniform in the ball; zero without draws."""
        return torch.zeros_like(like) if draws is None else random_in_ball(draws, like, self.norm) * self.eps


class UnitBox:
    """What threats have in common whose theta lies in [0, 1]^P."""

    default_step: float | None = None
    limit = span = 1.0

    def direction(self, batch: Batch, theta: Tensor, gradient: Tensor) -> Tensor:
        """The sign."""
        return gradient.sign()

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        """Back into the box."""
        return theta.clamp(0.0, 1.0)

    def distance(self, batch: Batch, theta: Tensor) -> Tensor:
        """Twice the largest distance from the middle: 1 or less means inside the box."""
        return (theta * 2 - 1).abs().flatten(1).amax(dim=1)
