"""One step of generator training: the generator's update, the discriminator's, the average's, and lazy penalties."""

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmat_ray.config import GanConfig
from dmat_ray.data.pixels import unit
from dmat_ray.manifold import gan
from dmat_ray.manifold.augment import adapted, augment
from dmat_ray.manifold.discriminator import Discriminator
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive
from dmat_ray.types import RunContext

ADA_INTERVAL = 4
PATH_DECAY = 0.01


class GanTraining:
    """Everything that a step changes: two networks, their optimisers, the average, and a few numbers.

    With `labels` (N) samples' classes are drawn from them, else all are equally likely.
    """

    def __init__(self, config: GanConfig, context: RunContext, labels: Tensor | None = None) -> None:
        torch.manual_seed(derive(config.seed, "gan weights") % 2**31)
        self.config, self.context, self.device = config, context, context.device
        self.generator = StyleGAN2(config.architecture).to(self.device)
        self.discriminator = Discriminator(config.architecture).to(self.device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), lr=config.lr_generator, betas=(0.0, 0.99), eps=1e-8)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=config.lr_discriminator, betas=(0.0, 0.99), eps=1e-8)
        self.probability = config.augment
        self.random_w = partial(gan.mixed_w, self.generator, config.style_mixing, labels=labels)
        self.path_mean = torch.zeros((), device=self.device)
        # loss_g, loss_d, mean sign of D on real images, steps; since the last report, and since the last adaptation
        self.sums, self.signs = torch.zeros(4, device=self.device), torch.zeros(2, device=self.device)
        self.steps = max(1, math.ceil(config.kimg * 1000 / config.batch_size))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next step is the one that would have come."""
        networks = {
            name: getattr(self, name).state_dict() for name in ("generator", "discriminator", "average", "opt_g", "opt_d")
        }
        tensors = {"path_mean": self.path_mean, "sums": self.sums, "signs": self.signs}
        return {**networks, **tensors, "probability": self.probability}

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken."""
        for name in ("generator", "discriminator", "average", "opt_g", "opt_d"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("path_mean", "sums", "signs"):
            setattr(self, name, state[name].to(self.device))
        self.probability = state["probability"]

    def _update(self, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.context.average_([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()

    def step(self, i: int, images: Tensor, labels: Tensor) -> None:
        """Step `i`, counted from 1: the generator's update, then the discriminator's, then the average's."""
        config, device = self.config, self.device
        draws = gan.StepDraws(config.seed, i, config.batch_size, self.context.rank, self.context.world_size)
        torch.manual_seed(derive(config.seed, "gan noise", i, self.context.rank) % 2**31)
        fade = min(1.0, (1 - (i - 1) / self.steps) / config.fade) if config.fade else 1.0
        self.opt_g.param_groups[0]["lr"] = config.lr_generator * fade
        self.opt_d.param_groups[0]["lr"] = config.lr_discriminator * fade
        pick = draws.integers(0, len(images))
        real = unit(images[pick].to(device)) * 2 - 1
        label = labels[pick].to(device)

        def critic(x: Tensor, y: Tensor | None) -> Tensor:
            seen = augment(x, config.augmentations, self.probability, draws.uniform, draws.normal)
            logits: Tensor = self.discriminator(seen, y)
            return logits.float()

        lowered = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.discriminator.requires_grad_(False)
        w, y = self.random_w(draws, pairs=True)
        with lowered:
            fake = self.generator.synth(w).float()
            loss_g = gan.generator_loss(critic(fake, y))
        total = loss_g + config.mode_seeking * gan.mode_seeking(fake)
        if config.path_length and i % config.path_interval == 0:
            total = total + self._path_penalty(draws)
        self._update(self.opt_g, self.generator, total)
        self.discriminator.requires_grad_(True)

        with torch.no_grad():
            w, y = self.random_w(draws)
            with lowered:
                fake = self.generator.synth(w).float()
        with lowered:
            real_logit, fake_logit = critic(real, label), critic(fake, y)
        loss_d = gan.discriminator_loss(real_logit, fake_logit)
        total = loss_d
        if config.r1_gamma and i % config.r1_interval == 0:
            penalty = gan.r1_penalty(lambda x: critic(x, label), real)
            total = total + penalty * (config.r1_gamma / 2 * config.r1_interval)
        self._update(self.opt_d, self.discriminator, total)

        # a short average at first, so that the early samples are not those of the untrained network
        decay = min(0.5 ** (config.batch_size / (config.ema_kimg * 1000)), i / (i + 10))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                a.lerp_(p, 1.0 - decay)
            sign, one = real_logit.sign().mean(), torch.ones((), device=device)
            self.sums += torch.stack([loss_g, loss_d, sign, one]).detach()
            self.signs += torch.stack([sign, one]).detach()
        if config.ada_target is not None and i % ADA_INTERVAL == 0:
            self.context.average_([self.signs])
            kimg = float(self.signs[1]) * config.batch_size / 1000
            sign_mean = float(self.signs[0] / self.signs[1])
            self.probability = adapted(self.probability, sign_mean, config.ada_target, kimg, config.ada_kimg)
            self.signs.zero_()

    def _path_penalty(self, draws: gan.StepDraws) -> Tensor:
        """Squared distance of path lengths to their running mean, on half of the batch, as its authors do."""
        config = self.config
        w, _ = self.random_w(draws)
        w = w[: max(1, len(w) // 2)]
        shape = config.architecture
        y = draws.own_normal(w.new_empty(len(w), shape.channels, shape.resolution, shape.resolution))
        lengths = gan.path_lengths(self.generator.synth, w, y)
        mean = lengths.detach().mean()
        self.context.average_([mean])
        self.path_mean = self.path_mean.lerp(mean, PATH_DECAY)
        return (lengths - self.path_mean).square().mean() * (config.path_length * config.path_interval)

    def agree(self) -> None:
        """Give every worker the mean over workers of what is not the same on all, for a checkpoint within an interval."""
        self.context.average_([self.sums, self.signs])

    def losses(self) -> dict[str, float]:
        """Means since the last call, over all workers."""
        self.context.average_([self.sums])
        loss_g, loss_d, sign = (self.sums[:3] / self.sums[3]).tolist()
        self.sums.zero_()
        return {"loss_g": loss_g, "loss_d": loss_d, "real_sign": sign, "augment": self.probability}
