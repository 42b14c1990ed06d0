"""How theta is searched: projected steepest ascent on a loss of net(render(batch, theta)), one loop for every threat.

FGSM is one step of it. The network runs in eval mode with its parameters frozen, so that only dloss/dtheta is
computed and neither gradients nor batch-norm statistics of the network move; nothing in the loop waits for the
device.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import AttackConfig
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats import ascend
from dmat_ray.types import Batch, Threat

Loss = Callable[[Tensor], Tensor]
"""logits_BK -> loss_B, to be raised by the attack."""


@dataclass(frozen=True)
class Attacked:
    """Result of an attack: the images, the theta that renders them, and the loss they reach."""

    x_BCHW: Tensor
    theta: Tensor
    loss_B: Tensor


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode without parameter gradients; every flag as it was afterwards, also after an error."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(p, p.requires_grad) for p in network.parameters()]
    network.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def cross_entropy(y_B: Tensor) -> Loss:
    """Loss that is high where the label's probability is low."""
    return lambda logits: F.cross_entropy(logits, y_B, reduction="none")


def kl_to(clean_logits_BK: Tensor) -> Loss:
    """KL(f(x) || f(x')), the divergence of TRADES (arXiv 1901.08573)."""
    target = clean_logits_BK.detach().log_softmax(dim=1)
    return lambda logits: F.kl_div(logits.log_softmax(dim=1), target, reduction="none", log_target=True).sum(dim=1)


def step_size_of(config: AttackConfig, threat: Threat) -> float:
    """The configured step, or a default: the threat's own (shrinking with sqrt(steps)), else 2.5 limit / steps."""
    if config.step_size is not None:
        return config.step_size
    if threat.default_step is not None:
        # the published sqrt(0.001 / steps) cannot cross the box; never less than crosses it 2.5 times over
        return max(threat.default_step / math.sqrt(config.steps), 2.5 * threat.limit / config.steps)
    return 2.5 * threat.limit / config.steps


def _search(network: nn.Module, threat: Threat, batch: Batch, loss: Loss, config: AttackConfig, draws: Draws | None) -> Attacked:
    step_size = step_size_of(config, threat)
    theta = threat.start(batch, draws)
    for _ in range(config.steps):
        theta = theta.detach().requires_grad_(True)
        value = loss(network(threat.render(batch, theta))).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        theta = ascend(threat, batch, theta.detach(), gradient, step_size)
    with torch.no_grad():
        x = threat.render(batch, theta)
        return Attacked(x, theta, loss(network(x)))


def _check(threat: Threat, batch: Batch, attacked: Attacked) -> None:
    """Only a bug in a threat breaks these."""
    far, low, high = threat.distance(batch, attacked.theta).max(), attacked.x_BCHW.min(), attacked.x_BCHW.max()
    assert far <= threat.limit * (1 + 1e-4) + 1e-6, f"attack left its budget: {far:.6g} > {threat.limit:.6g}"
    assert low >= 0, f"attack left [0, 1]: {low:.6g}"
    assert high <= 1, f"attack left [0, 1]: {high:.6g}"


def attack(
    network: nn.Module, threat: Threat, batch: Batch, config: AttackConfig, *, seed: int, purpose: str, loss: Loss | None = None
) -> Attacked:
    """Search the threat for each example's worst case of `loss` (default: cross entropy to the label).

    Random starts derive from (seed, example id, purpose, restart). With restarts, each example keeps the result with
    the highest loss. Raises UserError if the batch is outside [0, 1] or the network puts out values that are not finite.
    """
    low, high = batch.x_BCHW.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"images must lie in [0, 1]; these range from {low:.6g} to {high:.6g}")
    loss = loss or cross_entropy(batch.y_B)
    best: Attacked | None = None
    with frozen(network):
        for restart in range(config.restarts):
            draws = Draws(seed, batch.id, f"{purpose}/{restart}") if config.random_start else None
            found = _search(network, threat, batch, loss, config, draws)
            best = found if best is None else _worse(best, found)
    assert best is not None
    if not torch.isfinite(best.loss_B).all():
        raise UserError(
            "the attacked network puts out values that are not finite; if it is in training, lower training.lr_values"
        )
    _check(threat, batch, best)
    return best


def _worse(a: Attacked, b: Attacked) -> Attacked:
    def pick(first: Tensor, second: Tensor) -> Tensor:
        return torch.where((b.loss_B > a.loss_B).view(-1, *([1] * (first.dim() - 1))), second, first)

    return Attacked(pick(a.x_BCHW, b.x_BCHW), pick(a.theta, b.theta), pick(a.loss_B, b.loss_B))
