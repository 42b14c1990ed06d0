"""How theta is searched for a high loss of net(render(batch, theta)): one loop for every threat and every search.

FGSM is one step of projected steepest ascent. The network runs in eval mode with its parameters frozen, so that only
dloss/dtheta is computed and neither gradients nor batch-norm statistics of the network move; nothing in the loop waits
for the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack.search import SEARCHES, require_reach
from dmat_ray.config import ON_MANIFOLD, AttackConfig, Row, Term
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import per_example
from dmat_ray.types import Batch, Query, Threat


def require_possible(config: Term | Row, one: Batch, draws: Draws) -> None:
    """Raise UserError for a search that its threat, or an image as `one`, does not allow, as far as shows without a generator.

    And for one whose steps are too short.
    """
    if isinstance(config, ON_MANIFOLD):
        if config.method == "square":
            raise UserError("method square needs threat image")
        return
    threat = threats.build(config, None)
    require_reach(config, threat)
    threat.render(one, SEARCHES[config.method](threat, one, config, draws if config.random_start else None).start())


LPA_MARGIN = 1.0  # kappa of arXiv 2006.12655
Loss = Callable[[Tensor], Tensor]
"""logits_BK -> loss_B, to be raised by the attack."""


class Attacked(NamedTuple):
    """Result of an attack: the images, the theta that renders them, the loss they reach, and whether they are misclassified."""

    x_BCHW: Tensor
    theta: Tensor
    loss_B: Tensor
    broken_B: Tensor


def in_eval_mode(network: nn.Module) -> nn.Module:
    """The network, put in eval mode. What torch.export has made refuses that, and stays in the mode that it was exported in."""
    try:
        return network.eval()
    except NotImplementedError:
        for module in network.modules():
            module.training = False
        return network


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode without parameter gradients; every flag as it was afterwards, also after an error."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(p, p.requires_grad) for p in network.parameters()]
    in_eval_mode(network)
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
    """Loss that is high where the label's probability is low: log(1 + sum of exp(z_k - z_y) over the other classes).

    Written so that it does not round to zero where the label is ahead by 17 and more, as one minus a probability of one does:
    searches that compare losses would see none of their gains there.
    """

    def loss(logits: Tensor) -> Tensor:
        if logits.shape[1] < 2:
            return F.cross_entropy(logits, y_B, reduction="none")
        own = logits.gather(1, y_B[:, None])[:, 0]
        return F.softplus(logits.scatter(1, y_B[:, None], -torch.inf).logsumexp(dim=1) - own)

    return loss


def kl_to(clean_logits_BK: Tensor) -> Loss:
    """KL(f(x) || f(x')), the divergence of TRADES (arXiv 1901.08573)."""
    target = clean_logits_BK.detach().log_softmax(dim=1)
    return lambda logits: F.kl_div(logits.log_softmax(dim=1), target, reduction="none", log_target=True).sum(dim=1)


def dlr(y_B: Tensor) -> Loss:
    """Difference of logits ratio (arXiv 2003.01690), which no scaling of the logits changes. Needs three classes or more."""

    def loss(logits: Tensor) -> Tensor:
        best = _best(logits, 3, "dlr")
        own = logits.gather(1, y_B[:, None])[:, 0]
        other = torch.where(logits.argmax(dim=1) == y_B, best[:, 1], best[:, 0])
        return (other - own) / (best[:, 0] - best[:, 2]).clamp_min(1e-12)

    return loss


def targeted_dlr(y_B: Tensor, target_B: Tensor) -> Loss:
    """The same towards a class (arXiv 2003.01690). Needs four classes or more."""

    def loss(logits: Tensor) -> Tensor:
        best = _best(logits, 4, "dlr with targets")
        own, other = (logits.gather(1, label[:, None])[:, 0] for label in (y_B, target_B))
        return (other - own) / (best[:, 0] - (best[:, 2] + best[:, 3]) / 2).clamp_min(1e-12)

    return loss


def margin(y_B: Tensor, most: float = torch.inf) -> Loss:
    """By how much the highest other logit exceeds the label's, `most` at most (arXiv 1608.04644)."""

    def loss(logits: Tensor) -> Tensor:
        own = logits.gather(1, y_B[:, None])[:, 0]
        return (logits.scatter(1, y_B[:, None], -torch.inf).amax(dim=1) - own).clamp(max=most)

    return loss


def _best(logits: Tensor, count: int, name: str) -> Tensor:
    if logits.shape[1] < count:
        raise UserError(f"loss {name} needs {count} classes or more, here are {logits.shape[1]}; use ce")
    return logits.topk(count, dim=1).values


def losses_of(network: nn.Module, batch: Batch, config: AttackConfig) -> list[Loss]:
    """What the searches of an evaluation row raise, one after the other; of any other attack the cross entropy. LPA has its own.

    Of targets as many as there are other classes, at most. Raises UserError for a loss that needs more classes.
    """
    if config.method == "lpa":
        return [margin(batch.y_B, LPA_MARGIN)]
    name, targets = (config.loss, config.targets) if isinstance(config, Row) else ("ce", 0)
    if targets == 0:
        return [dlr(batch.y_B) if name == "dlr" else cross_entropy(batch.y_B)]
    with torch.no_grad():
        logits = network(batch.x_BCHW)
    others = logits.scatter(1, batch.y_B[:, None], -torch.inf)
    likeliest = others.topk(min(targets, logits.shape[1] - 1), dim=1).indices

    def towards(target_B: Tensor) -> Loss:
        return lambda out: -F.cross_entropy(out, target_B, reduction="none")

    return [targeted_dlr(batch.y_B, t) if name == "dlr" else towards(t) for t in likeliest.unbind(dim=1)]


class _Breaking:
    """Of the queries that broke an example the one with the highest loss: a loss may be higher where the label still wins."""

    def __init__(self, y_B: Tensor) -> None:
        self.y_B = y_B
        self.theta: Tensor | None = None

    def note(self, theta: Tensor, loss_B: Tensor, logits_BK: Tensor) -> None:
        """What a query found."""
        if self.theta is None:
            self.theta, self.loss_B = theta, torch.full_like(loss_B, -torch.inf)
        better = (logits_BK.argmax(dim=1) != self.y_B) & (loss_B > self.loss_B)
        self.theta = torch.where(per_example(better, theta), theta, self.theta)
        self.loss_B = torch.where(better, loss_B, self.loss_B)

    def instead_of(self, theta: Tensor) -> Tensor:
        """`theta`, but where a query broke the example."""
        assert self.theta is not None
        return torch.where(per_example(self.loss_B > -torch.inf, theta), self.theta, theta)


def _search(
    network: nn.Module,
    threat: Threat,
    batch: Batch,
    loss: Loss,
    config: AttackConfig,
    draws: Draws | None,
    judge: nn.Module | None,
) -> tuple[Attacked, Tensor]:
    """What one search ends with, and whether all of its gradients were finite: one that is not would move nothing."""
    search = SEARCHES[config.method](threat, batch, config, draws)
    breaking = _Breaking(batch.y_B) if search.keeps_best and judge is not None else None

    def query(theta: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = network(threat.render(batch, theta))
        value_B = loss(logits)
        if breaking is not None:
            breaking.note(theta.detach(), value_B.detach(), logits.detach())
        return logits, value_B

    theta = search.start()
    gradient, sound = theta.new_empty(0), torch.ones((), dtype=torch.bool, device=theta.device)
    for _ in range(config.steps):
        with torch.set_grad_enabled(search.needs_gradient):
            theta = theta.detach().requires_grad_(search.needs_gradient)
            logits, value_B = query(theta)
            if search.needs_gradient:
                (gradient,) = torch.autograd.grad(value_B.sum(), theta)
                sound = sound & gradient.isfinite().all()
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        broken_B = logits.detach().argmax(dim=1) != batch.y_B
        theta = search.next(theta.detach(), Query(value_B.detach(), gradient, broken_B))
    with torch.no_grad():
        theta = search.last(theta, lambda last: query(last)[1])
        if breaking is not None:
            theta = breaking.instead_of(theta)
        x = threat.render(batch, theta)
        if judge is not None:
            logits = judge(x)
            value_B = loss(logits)
        return Attacked(x, theta, value_B.detach(), logits.detach().argmax(dim=1) != batch.y_B), sound


def _check(threat: Threat, batch: Batch, attacked: Attacked) -> None:
    """Only a bug in a threat breaks these."""
    far, low, high = threat.distance(batch, attacked.theta).max(), attacked.x_BCHW.min(), attacked.x_BCHW.max()
    assert far <= threat.limit * (1 + 1e-4) + 1e-6, f"attack left its budget: {far:.6g} > {threat.limit:.6g}"
    assert low >= 0, f"attack left [0, 1]: {low:.6g}"
    assert high <= 1, f"attack left [0, 1]: {high:.6g}"


def attack(
    network: nn.Module,
    threat: Threat,
    batch: Batch,
    config: AttackConfig,
    *,
    seed: int,
    purpose: str,
    loss: Loss | None = None,
    measure: bool = True,
    judge: nn.Module | None = None,
) -> Attacked:
    """Search the threat for each example's worst case of `loss` (default: cross entropy to the label).

    Random starts derive from (seed, example id, purpose, restart). Of several searches each example keeps one that broke it, and
    among those the one with the highest loss; so of the queries of one search that keeps its best (apgd, square, random). Raises
    UserError if the batch is outside [0, 1], NotFiniteError if the network's outputs or gradients are not finite. Without
    `measure`, as in training, the best query is that of the highest loss alone, and the images that it ends with do not go
    through the network again: `loss_B` and `broken_B` are those of one step before. `judge` is the network, in eval mode, of
    which `network` is a copy for attacks, in another precision perhaps: it has the last word.
    """
    low, high = batch.x_BCHW.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"images must lie in [0, 1]; these range from {low:.6g} to {high:.6g}")
    best: Attacked | None = None
    sound = torch.ones((), dtype=torch.bool, device=batch.x_BCHW.device)
    last = (judge or network) if measure or config.restarts > 1 else None
    with frozen(network):
        number = 1 if loss is not None else len(losses_of(network, batch, config))
        for restart in range(config.restarts):
            for k in range(number):
                standing = None if best is None or not _exits_early(config) else (~best.broken_B).nonzero()[:, 0]
                if standing is not None and len(standing) == 0:
                    break
                part = batch if standing is None else batch.take(standing)
                raised = loss if loss is not None else losses_of(network, part, config)[k]
                which = f"{purpose}/{restart}" if number == 1 else f"{purpose}/{restart}/{k}"
                draws = Draws(seed, part.id, which) if config.random_start else None
                found, is_sound = _search(network, threat, part, raised, config, draws, last)
                sound = sound & is_sound
                best = found if best is None else _worse(best, found, standing)
    assert best is not None
    finite = torch.isfinite(best.loss_B).all()
    if not (finite & sound):
        if not finite:
            raise NotFiniteError("the attacked network puts out values that are not finite")
        raise NotFiniteError(
            "the attacked network's outputs are finite and their gradients are not, by which no attack moves: look for a root "
            "or a norm of what may be zero, and add a small number there"
        )
    _check(threat, batch, best)
    return best


def _exits_early(config: AttackConfig) -> bool:
    return isinstance(config, Row) and config.early_exit


def _worse(a: Attacked, b: Attacked, rows: Tensor | None) -> Attacked:
    """For each example the broken one, or of two alike the one with the higher loss; `b` may be of some `rows` only."""
    if rows is not None:
        b = Attacked(*(old.index_copy(0, rows, new) for old, new in zip(a, b, strict=True)))
    take_b = (b.broken_B & ~a.broken_B) | ((b.broken_B == a.broken_B) & (b.loss_B > a.loss_B))
    return Attacked(*(torch.where(per_example(take_b, new), new, old) for old, new in zip(a, b, strict=True)))
