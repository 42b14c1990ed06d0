"""Training losses as weighted sums of worst cases.

    loss = sum over terms of weight * mean over the batch of max over theta of divergence(net(render(batch, theta)))

standard = {clean: 1}, AT = {image: 1}, OM-AT = {latent: 1}, DMAT = {image: 1/2, latent: 1/2} (arXiv 2009.02470);
TRADES = {clean: 1, image: beta with divergence kl} (arXiv 1901.08573).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack, frozen, kl_to
from dmat_ray.config import ON_MANIFOLD, ObjectiveConfig, Term
from dmat_ray.types import Batch, Generator, Threat


@dataclass(frozen=True)
class Objective:
    """A configured training loss. Build it with `build`."""

    config: ObjectiveConfig
    active: tuple[tuple[str, Term, Threat], ...]

    def __call__(
        self, network: nn.Module, trained: nn.Module, batch: Batch, *, seed: int, purpose: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and each term's share and accuracy, detached.

        `network` is attacked; `trained` is the same network as the optimiser sees it (under DDP, the wrapper, so
        that gradients are averaged). Each term is its own train-mode forward, as published: batch norm sees
        image-space and latent-space examples apart.
        """
        # every attack comes before the first train-mode forward, which moves the batch-norm statistics that attacks see
        worst = [self._worst(network, batch, term, threat, seed, f"{purpose}/{name}") for name, term, threat in self.active]
        smoothing = self.config.label_smoothing
        total = batch.x_BCHW.new_zeros(())
        metrics: dict[str, Tensor] = {}
        clean_logits: Tensor | None = None
        if self.config.clean.weight > 0:
            clean_logits = trained(batch.x_BCHW)
            loss = F.cross_entropy(clean_logits, batch.y_B, label_smoothing=smoothing)
            total = total + self.config.clean.weight * loss
            metrics |= _term_metrics("clean", loss, clean_logits, batch.y_B)
        for (name, term, _), x_BCHW in zip(self.active, worst, strict=True):
            logits = trained(x_BCHW)
            if term.divergence == "ce":
                loss = F.cross_entropy(logits, batch.y_B, label_smoothing=smoothing)
            else:
                # both sides carry gradient in the TRADES loss
                reference = trained(batch.x_BCHW) if clean_logits is None else clean_logits
                loss = F.kl_div(logits.log_softmax(dim=1), reference.softmax(dim=1), reduction="batchmean")
            total = total + term.weight * loss
            metrics |= _term_metrics(name, loss, logits, batch.y_B)
        metrics["loss"] = total.detach()
        return total, metrics

    def _worst(self, network: nn.Module, batch: Batch, term: Term, threat: Threat, seed: int, purpose: str) -> Tensor:
        """The images that a term's attack ends with."""
        loss = None
        if term.divergence == "kl":
            with frozen(network), torch.no_grad():
                loss = kl_to(network(batch.x_BCHW))
        return attack(network, threat, batch, term, seed=seed, purpose=purpose, loss=loss).x_BCHW


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
