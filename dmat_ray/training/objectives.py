"""Training losses as weighted sums of worst cases.

    loss = sum over terms of weight * mean over the batch of max over theta of divergence(net(render(batch, theta)))

standard = {clean: 1}, AT = {image: 1}, OM-AT = {latent: 1}, DMAT = {image: 1/2, latent: 1/2} (arXiv 2009.02470);
TRADES = {clean: 1, image: beta with divergence kl} (arXiv 1901.08573).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack, frozen, kl_to
from dmat_ray.config import ON_MANIFOLD, ObjectiveConfig, Term
from dmat_ray.errors import NotFiniteError
from dmat_ray.networks import batch_norm
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.rng import derive
from dmat_ray.types import Batch, Generator, Threat

CLEAN = "clean"


@dataclass(frozen=True)
class Objective:
    """A configured training loss. Build it with `build`.

    A step is three calls: `drawn` names its terms, `worst` attacks, `loss` is what the optimiser minimises.
    """

    config: ObjectiveConfig
    active: tuple[tuple[str, Term, Threat], ...]

    @property
    def weights(self) -> dict[str, float]:
        """The active terms' weights, in the order in which batch norm meets them."""
        clean = {CLEAN: self.config.clean.weight} if self.config.clean.weight > 0 else {}
        return clean | {name: term.weight for name, term, _ in self.active}

    @property
    def passes(self) -> list[str]:
        """Whose images go through the network in training: the terms', and the clean ones that a divergence needs."""
        names = list(self.weights)
        needs_clean = CLEAN not in names and any(term.divergence == "kl" for _, term, _ in self.active)
        return [CLEAN, *names] if needs_clean else names

    def drawn(self, seed: int, purpose: str) -> dict[str, float]:
        """The terms of a step and their weights: all, or with terms=sample one, which then weighs as much as all."""
        weights = self.weights
        if self.config.terms == "sum" or len(weights) == 1:
            return weights
        total = sum(weights.values())
        rng = np.random.default_rng(derive(seed, "term", purpose))
        name = str(rng.choice(list(weights), p=[w / total for w in weights.values()]))
        return {name: total}

    def worst(
        self, network: nn.Module, batch: Batch, drawn: Mapping[str, float], *, seed: int, purpose: str
    ) -> dict[str, Tensor]:
        """What goes through the network in training: each pass's images x_BCHW.

        `network` is attacked in eval mode, and must not have moved since the step began: all attacks come before the first
        forward in training mode. It may be an `AttackView`, which then follows each term's own batch-norm statistics.
        Raises NotFiniteError, with the term's name, if the network puts out values that are not finite.
        """
        images: dict[str, Tensor] = {}
        for name, term, threat in self.active:
            if name not in drawn:
                continue
            loss = None
            if term.divergence == "kl":
                self._meet(network, CLEAN)
                images[CLEAN] = batch.x_BCHW
                with frozen(network), torch.no_grad():
                    loss = kl_to(network(batch.x_BCHW))
            self._meet(network, name)
            try:
                found = attack(network, threat, batch, term, seed=seed, purpose=f"{purpose}/{name}", loss=loss, measure=False)
            except NotFiniteError as error:
                raise NotFiniteError(f"term {name}: {error}") from None
            images[name] = found.x_BCHW
        if CLEAN in drawn:
            images[CLEAN] = batch.x_BCHW
        return {name: images[name] for name in self.passes if name in images}

    def _meet(self, network: nn.Module, name: str) -> None:
        """Let attacks see the running statistics of one pass, if they are kept apart."""
        if self.config.batch_norm == "per_term" and isinstance(network, AttackView):
            batch_norm.show(network.source, [self.passes.index(name)])
            network.refresh()

    def loss(
        self,
        network: nn.Module,
        forward: Callable[[Tensor], Tensor],
        images: dict[str, Tensor],
        y_B: Tensor,
        drawn: Mapping[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise over `network`'s weights, and each term's share and accuracy, detached.

        `forward` is how the network is called in training (under DDP through its wrapper, so that gradients are averaged).
        """
        logits = self._logits(network, forward, images)
        smoothing = self.config.label_smoothing
        total = y_B.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        divergences = {name: term.divergence for name, term, _ in self.active}
        for name, weight in drawn.items():
            if divergences.get(name) == "kl":
                # both sides carry gradient in the TRADES loss; the clean side, too, as logarithms: where a probability
                # underflows to 0 the gradient of q log q would not be finite
                log_p, log_q = logits[name].log_softmax(dim=1), logits[CLEAN].log_softmax(dim=1)
                loss = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
            else:
                loss = F.cross_entropy(logits[name], y_B, label_smoothing=smoothing)
            total = total + weight * loss
            metrics |= _term_metrics(name, loss, logits[name], y_B)
        metrics["loss"] = total.detach()
        return total, metrics

    def _logits(self, network: nn.Module, forward: Callable[[Tensor], Tensor], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each pass's logits, with batch norm as configured."""
        how, names = self.config.batch_norm, list(images)
        frozen_or_not = batch_norm.frozen_statistics(network) if how == "frozen" else nullcontext()
        with frozen_or_not:
            if how in ("joint", "frozen") or batch_norm.can_share_a_batch(network):
                # one pass for all: larger batches are faster, and each term may still have its own statistics
                terms = [self.passes.index(name) for name in names] if how in ("separate", "per_term") else []
                with batch_norm.terms_in_batch(network, terms):
                    out = forward(torch.cat([images[name] for name in names]))
                return dict(zip(names, out.chunk(len(names)), strict=True))
            return {name: forward(images[name]) for name in names}


def _term_metrics(name: str, loss: Tensor, logits: Tensor, y_B: Tensor) -> dict[str, Tensor]:
    accuracy = (logits.argmax(dim=1) == y_B).float().mean()
    return {f"{name}_loss": loss.detach(), f"{name}_accuracy": accuracy.detach()}


def on_manifold_terms(config: ObjectiveConfig) -> list[str]:
    """Names of the active terms that move w, and so need the generator and images that it made."""
    return [name for name, term in config.adversarial.items() if isinstance(term, ON_MANIFOLD) and term.weight > 0]


def build(config: ObjectiveConfig, generator: Generator | None) -> Objective:
    """The objective with its active threats."""
    active = [(n, t, threats.build(t, generator)) for n, t in config.adversarial.items() if t.weight > 0]
    return Objective(config, tuple(active))
