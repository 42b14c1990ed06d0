"""The loop of generator training: alternating steps, lazy penalties, averaging, augmentation, snapshots, resume.

A StyleGAN 2 with an exponential moving average of its weights (arXiv 1912.04958), penalties every few steps with
their weight scaled up to match (lazy regularisation, section 3.1), and adaptive augmentation (arXiv 2006.06676). Every
snapshot is judged (see `quality`); the result is the best one, so that a collapse late in a training costs nothing but time.
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmat_ray.config import GanConfig
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan
from dmat_ray.manifold.augment import adapted, augment
from dmat_ray.manifold.discriminator import Discriminator
from dmat_ray.manifold.diversity import uneven
from dmat_ray.manifold.gan_progress import PROGRESS, read_progress, restored
from dmat_ray.manifold.quality import Judge
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.rng import derive
from dmat_ray.storage import Place
from dmat_ray.storage.folders import replace_folder
from dmat_ray.training.pace import LEAST_STEPS, TELL_AFTER_S, Pace
from dmat_ray.types import RunContext
from dmat_ray.wording import to_go

ADA_INTERVAL = 4
PATH_DECAY = 0.01
AS_IMAGES = "classes_as_images"  # key of a checkpoint's JSON: samples have the classes that images have, as often
APART = "pairs_share_class_alone"  # another: two samples whose distance is judged have their class in common, and nothing else
DEAD_END = "lower gan.lr_generator and gan.lr_discriminator or raise gan.r1_gamma"

# the averaged generator, thousands of images so far, and the quality of its samples
OnSnapshot = Callable[[StyleGAN2, float, dict[str, float]], None]


def check_images(config: GanConfig, images: Tensor, labels: Tensor) -> None:
    """Raise UserError unless images (N, C, H, W) and labels (N) are those that the architecture makes."""
    shape = config.architecture
    if images.shape[1:] != (shape.channels, shape.resolution, shape.resolution):
        raise UserError(
            f"images are {tuple(images.shape[1:])} (C, H, W), but gan.architecture makes "
            f"({shape.channels}, {shape.resolution}, {shape.resolution}); set its channels and resolution, or data.channels and "
            "data.resolution"
        )
    found = len(torch.unique(labels))
    if shape.num_classes and (found != shape.num_classes or int(labels.max()) >= shape.num_classes):
        raise UserError(
            f"gan.architecture.num_classes is {shape.num_classes}, but the images have {found} class(es), labels up to "
            f"{int(labels.max())}; set it to their number, or to 0 for a generator without classes"
        )


def check_workers(config: GanConfig, world_size: int) -> None:
    """Raise UserError unless the batch can be cut into pairs for this many workers."""
    if config.batch_size % (2 * world_size):
        raise UserError(
            f"gan.batch_size {config.batch_size} must be a multiple of {2 * world_size}: pairs of images for each of "
            f"{world_size} worker(s); change it or cluster.train_workers"
        )


class _Training:
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
        real = images[pick].to(device)
        real = (real.float() / 255 if real.dtype == torch.uint8 else real) * 2 - 1
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
        y = draws.normal(shape.channels, shape.resolution, shape.resolution)[: len(w)].to(w)
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


def train_generator(
    config: GanConfig,
    images: Tensor,
    labels: Tensor,
    context: RunContext,
    on_snapshot: OnSnapshot | None = None,
    *,
    shorter: Place | None = None,
    trunk: Path | None = None,
) -> StyleGAN2:
    """Train on `images` (N, C, H, W), float in [0, 1] or uint8, and return the averaged generator that `config.keep` names.

    `labels` (N) are used if the architecture has classes, which samples then have as often as images do, and by the judge of
    samples. Each worker works on its part of every batch; gradients are averaged over workers before each optimiser step.
    Losses go to `context.report` every `report_kimg`; every `snapshot_kimg` a checkpoint does, with the samples' quality, and
    `on_snapshot` is called on rank 0. One more is written when a machine is to be taken away, or the job is asked to stop. Goes
    on from the newest checkpoint, on one CPU worker with the very numbers of an uninterrupted run.
    A training that diverges ends with the best snapshot so far, or with a UserError if there is none.

    The last snapshot before the rates fall is also kept in the folder `trunk`: one of more `kimg`, and else the same settings
    and images, goes on from there if it is given as `shorter`, with the very numbers that it would have had from the start.
    """
    check_images(config, images, labels)
    check_workers(config, context.world_size)
    # else the discriminator could tell samples of a rare class by their label
    drawn = labels if config.architecture.num_classes and uneven(labels) else None
    training = _Training(config, context, drawn)
    first, best, best_quality, history, judged, comparable = 0, None, None, [], None, True
    found = checkpoint.newest(context, PROGRESS)
    if (begun := found or shorter) is not None:
        progress, state = read_progress(begun, config, shorter=found is None)
        training.load(state)
        first, best, best_quality, history = progress["step"], state["best"], progress["best"], progress["history"]
        judged = state.get("judge")
        # before these were noted samples were drawn of all classes equally, and so was what they were judged by, and two of a
        # class shared much of z
        changes = (drawn is not None, AS_IMAGES), (config.architecture.num_classes > 0, APART)
        comparable = all(progress.get(key, False) for matters, key in changes if matters)
        if found is None and trunk is not None and context.rank == 0:  # a little longer may fall from the same snapshot on
            renamed = {**progress, "config": config.model_dump(mode="json"), "of": training.steps}
            replace_folder(trunk, partial(checkpoint.write_state, name=PROGRESS, progress=renamed, state=state))
    if first == training.steps:
        return restored(config, best, context.device)
    judge = Judge(config.quality, images, labels, context, judged, conditional=config.architecture.num_classes > 0)
    if best is not None and best_quality is not None and not comparable:
        quality = judge(restored(config, best, context.device))
        best_quality = {**best_quality, **quality, "collapsed": float(judge.collapsed(quality))}

    def whole() -> dict[str, Any]:
        return {**training.state(), "best": best, "judge": judge.state}

    def progress_at(step: int, *, diverged: bool = False) -> dict[str, Any]:
        about = {"config": config.model_dump(mode="json"), "step": step, "of": training.steps, AS_IMAGES: True, APART: True}
        return {**about, "diverged": diverged, "best": best_quality, "history": history}

    def leave(step: int, metrics: dict[str, float]) -> None:
        training.agree()
        checkpoint.hand_over_state(context, metrics, PROGRESS, progress_at(step), whole(), wait=True)

    per_kimg = 1000 / config.batch_size
    report_every = max(1, round(config.report_kimg * per_kimg))
    # a multiple, so that a snapshot's losses are means over a whole interval
    snapshot_every = report_every * max(1, round(config.snapshot_kimg / config.report_kimg))
    straight = math.floor(training.steps * (1.0 - config.fade)) // snapshot_every * snapshot_every
    began, pace, told = time.monotonic(), Pace(context, None), False
    for i in range(first + 1, training.steps + 1):
        with tf32(config.precision != "float32"):
            training.step(i, images, labels)
        leaving = i < training.steps and pace.looks() and pace.wants_checkpoint()[1]
        if i % report_every and i < training.steps:
            if not told and i - first > LEAST_STEPS and (seconds := time.monotonic() - began) > TELL_AFTER_S:
                pace_so_far = {"kimg": i / per_kimg, "images_per_second": (i - first) * config.batch_size / seconds}
                context.say(f"{i / per_kimg:.3g} of {config.kimg:g} thousand images{to_go(pace_so_far, config.kimg)}")
                told = True
            if leaving:
                leave(i, {})
            continue
        told, speed = True, (i - first) * config.batch_size / (time.monotonic() - began)
        metrics = {"kimg": i / per_kimg, **training.losses(), "images_per_second": speed}
        diverged = not math.isfinite(metrics["loss_g"] + metrics["loss_d"])
        if diverged and best is None:
            raise UserError(f"generator training diverged: losses are {metrics['loss_g']} and {metrics['loss_d']}; {DEAD_END}")
        if i % snapshot_every and i < training.steps and not diverged:
            if leaving:
                leave(i, metrics)
            else:
                context.report(metrics)
            continue
        if not diverged:
            training.average.measure_w(seed=config.seed)
            quality = judge(training.average)
            quality["collapsed"] = float(judge.collapsed(quality))
            metrics |= quality
            if on_snapshot is not None and context.rank == 0:
                on_snapshot(training.average, metrics["kimg"], quality)
            if best_quality is None or config.keep == "last" or judge.is_better(quality, best_quality):
                best_quality = {**quality, "kimg": metrics["kimg"]}
                best = copy.deepcopy(training.average.state_dict())
        history.append(metrics)
        progress = progress_at(training.steps if diverged else i, diverged=diverged)
        if i == straight and trunk is not None and context.rank == 0 and not diverged:
            replace_folder(trunk, partial(checkpoint.write_state, name=PROGRESS, progress=progress, state=whole()))
        wait = leaving or progress["step"] == training.steps
        checkpoint.hand_over_state(context, metrics, PROGRESS, progress, whole(), wait=wait)
        if diverged:
            break
    return restored(config, best, context.device)
