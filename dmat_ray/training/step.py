"""One step of adversarial training: attacks, loss, update, and everything that these move."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dmat_ray.attack import frozen
from dmat_ray.config import Config
from dmat_ray.devices import require_compiler
from dmat_ray.networks import batch_norm
from dmat_ray.networks.attack_view import AttackView, takes
from dmat_ray.rng import derive
from dmat_ray.training import objectives
from dmat_ray.training.augmentation import augment
from dmat_ray.training.objectives import CLEAN
from dmat_ray.types import Batch, Generator, RunContext


class TrainingStep:
    """The network, its optimiser, its average and its copy for attacks. Call it with a batch, and it has made a step.

    Raises UserError where `training.compile` finds no compiler.
    """

    def __init__(self, config: Config, network: nn.Module, generator: Generator | None, context: RunContext) -> None:
        settings = self.settings = config.training
        self.context, self.objective = context, objectives.build(config.objective, generator)
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._is_laid_out = not settings.channels_last
        self.network = network.to(memory_format=self._layout)  # type: ignore[call-overload]
        if config.objective.batch_norm == "per_term":
            batch_norm.keep_apart(network, len(self.objective.passes))
        lowered = (settings.attack_precision or settings.precision) == "bf16"
        attacked = torch.bfloat16 if lowered else next(network.parameters()).dtype
        self.view = AttackView(network, attacked, settings.channels_last)
        if settings.compile:
            require_compiler(context.device, "training.compile")
            self.view.view.compile()
        called: Any = torch.compile(network) if settings.compile else network
        self.trained = context.wrap(called)
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            self.average = AveragedModel(network, multi_avg_fn=self._follow, use_buffers=True)
        self._averages = 0  # as AveragedModel counts, but without asking the device

    @property
    def result(self) -> nn.Module:
        """The network to be validated and saved: the average of weights if there is one."""
        return self.network if self.average is None else self.average.module

    def __call__(self, batch: Batch, epoch: int, step: int, rate: float) -> dict[str, Tensor]:
        """Attack, update; returns the loss and each term's loss and accuracy, detached.

        Raises NotFiniteError, naming the term, if the network's outputs are not finite.
        """
        settings, objective = self.settings, self.objective
        self.lay_out(batch.x_BCHW[:2])
        if settings.flip or settings.crop_padding:
            batch = augment(batch, settings, epoch)
        # dropout's masks are those of this step, whatever came before
        torch.manual_seed(derive(settings.seed, "step", epoch, step, self.context.rank) % 2**31)
        drawn = objective.drawn(settings.seed, f"{epoch}/{step}")
        self.view.refresh()
        parts = list(self._parts(batch))
        found = [objective.worst(self.view, part, drawn, seed=settings.seed, purpose=f"train/{epoch}") for part in parts]
        with self._perturbed(parts, found, drawn) if epoch >= settings.awp_warmup else nullcontext():
            metrics = self._backward(parts, found, drawn)
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._agree()
        self._show_deployed()
        if self.average is not None:
            self.average.update_parameters(self.network)
            self._averages += 1
        return metrics

    def lay_out(self, x_BCHW: Tensor) -> None:
        """Give channels last up for a network that does not take it; the first call looks. A step does so by itself."""
        if self._is_laid_out:
            return
        with frozen(self.network):
            if not takes(self.network, x_BCHW, self._layout):
                self._layout = torch.contiguous_format
                for network in (self.network, self.result):
                    network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._is_laid_out = True

    @torch.no_grad()
    def _follow(self, averaged: Any, trained: Any, _: Any) -> None:
        """averaged <- d averaged + (1 - d) trained, over fewer steps while there have been few; called for each dtype."""
        kept = min(self.settings.ema_decay, (1 + self._averages) / (10 + self._averages))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, trained, 1 - kept)
        else:
            torch._foreach_copy_(averaged, trained)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        # a part of one example has no batch statistics
        count = max(1, min(self.settings.accumulate, len(batch) // 2))
        if count == 1:
            yield batch
            return
        for rows in torch.arange(len(batch)).tensor_split(count):
            yield batch.take(rows)

    def _backward(self, parts: list[Batch], found: list[dict[str, Tensor]], drawn: Mapping[str, float]) -> dict[str, Tensor]:
        """The gradient of the whole batch's loss, into the parameters; over all workers."""
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(len(part) for part in parts)
        sums: dict[str, Tensor] = {}
        for k, (part, images) in enumerate(zip(parts, found, strict=True)):
            share = len(part) / total
            # workers exchange gradients once, with the last part
            early = isinstance(self.trained, DistributedDataParallel) and k < len(parts) - 1
            with self.trained.no_sync() if early else nullcontext():  # type: ignore[operator]
                loss, metrics = self.objective.loss(self.network, self._forward, images, part.y_B, drawn)
                (loss * share).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + share * value
        return sums

    def _forward(self, x_BCHW: Tensor) -> Tensor:
        lowered = self.settings.precision == "bf16"
        with torch.autocast(self.context.device.type, torch.bfloat16, enabled=lowered):
            logits: Tensor = self.trained(x_BCHW.contiguous(memory_format=self._layout))
        return logits.float() if lowered else logits

    @contextmanager
    def _perturbed(self, parts: list[Batch], found: list[dict[str, Tensor]], drawn: Mapping[str, float]) -> Iterator[None]:
        """Inside, each weight tensor is moved by awp_gamma of its norm to where the loss is higher (arXiv 2004.05884)."""
        if not self.settings.awp_gamma:
            yield
            return
        with batch_norm.unmoved(self.network):
            self._backward(parts, found, drawn)
        # biases and the weights of normalisation are vectors and stay, as published
        weights = [p for p in self.network.parameters() if p.dim() > 1 and p.grad is not None]
        before = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights:
                assert p.grad is not None
                p.add_(p.grad * (self.settings.awp_gamma * p.norm() / (p.grad.norm() + 1e-20)))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(weights, before, strict=True):
                    p.copy_(old)

    def _show_deployed(self) -> None:
        """The statistics of the model as it is used: those of clean images, or the mean over terms."""
        passes = self.objective.passes
        batch_norm.show(self.network, [passes.index(CLEAN)] if CLEAN in passes else range(len(passes)))

    def _agree(self) -> None:
        """Every worker has moved its running statistics by its own part of the batch; afterwards all have their mean."""
        own = [b for b in self.network.buffers() if b.is_floating_point()] + batch_norm.apart(self.network)
        self.context.average_(own)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next step is the one that would have come."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "apart": batch_norm.apart(self.network),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken."""
        self.network.load_state_dict(state["network"])
        # with the optimizer's state come its settings, which a branch may have changed
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        if self.average is not None and state["average"] is None:
            self.average.module.load_state_dict(state["network"])  # averaging begins here
        elif self.average is not None:
            self.average.load_state_dict(state["average"])
            self._averages = int(self.average.n_averaged)
        batch_norm.restore(self.network, state["apart"])
