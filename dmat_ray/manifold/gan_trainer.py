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
from torch import Tensor

from dmat_ray.config import GanConfig
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.manifold.diversity import uneven
from dmat_ray.manifold.gan_progress import PROGRESS, read_progress, restored
from dmat_ray.manifold.gan_step import GanTraining
from dmat_ray.manifold.quality import Judge
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.pace import LEAST_STEPS, TELL_AFTER_S, Pace
from dmat_ray.storage import Place
from dmat_ray.storage.folders import replace_folder
from dmat_ray.types import RunContext
from dmat_ray.wording import to_go

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


class _Run:
    """A training under way: what `train_generator` goes through, and what its checkpoints hold."""

    def __init__(
        self,
        config: GanConfig,
        images: Tensor,
        labels: Tensor,
        context: RunContext,
        on_snapshot: OnSnapshot | None,
        shorter: Place | None,
        trunk: Path | None,
    ) -> None:
        check_images(config, images, labels)
        check_workers(config, context.world_size)
        self.config, self.images, self.labels, self.context = config, images, labels, context
        self.on_snapshot = on_snapshot
        self.trunk = trunk if context.rank == 0 else None
        # else the discriminator could tell samples of a rare class by their label
        self.drawn = labels if config.architecture.num_classes and uneven(labels) else None
        self.training = GanTraining(config, context, self.drawn)
        self.first = 0  # the step that this process goes on from
        self.best: dict[str, Tensor] | None = None  # weights of the averaged generator
        self.best_quality: dict[str, float] | None = None
        self.history: list[dict[str, float]] = []
        judged, comparable = self._resume(shorter)
        if self.first == self.training.steps:
            return
        self.judge = Judge(config.quality, images, labels, context, judged, conditional=config.architecture.num_classes > 0)
        if self.best is not None and self.best_quality is not None and not comparable:
            quality = self.judge(restored(config, self.best, context.device))
            self.best_quality = {**self.best_quality, **quality, "collapsed": float(self.judge.collapsed(quality))}
        self.per_kimg = 1000 / config.batch_size
        self.report_every = max(1, round(config.report_kimg * self.per_kimg))
        # a multiple, so that a snapshot's losses are means over a whole interval
        self.snapshot_every = self.report_every * max(1, round(config.snapshot_kimg / config.report_kimg))
        self.straight = math.floor(self.training.steps * (1.0 - config.fade)) // self.snapshot_every * self.snapshot_every

    def _resume(self, shorter: Place | None) -> tuple[Any, bool]:
        """Go on from the newest checkpoint, if there is one, else from `shorter`. Returns the judge's state, if it holds one, and
        whether the quality of its best snapshot can be compared with that of others.
        """
        found = checkpoint.newest(self.context, PROGRESS)
        if (begun := found or shorter) is None:
            return None, True
        progress, state = read_progress(begun, self.config, shorter=found is None)
        self.training.load(state)
        self.first, self.history = progress["step"], progress["history"]
        self.best, self.best_quality = state["best"], progress["best"]
        progress |= {"config": self.config.model_dump(mode="json"), "of": self.training.steps}
        if found is None and self.trunk is not None:  # a little longer may fall from the same snapshot on
            replace_folder(self.trunk, partial(checkpoint.write_state, name=PROGRESS, progress=progress, state=state))
        if found is None and self.first == self.training.steps:  # longer by less than a step
            checkpoint.hand_over_state(self.context, {}, PROGRESS, progress, state, wait=True)
        # before these were noted samples were drawn of all classes equally, and so was what they were judged by, and two of a
        # class shared much of z
        changes = (self.drawn is not None, AS_IMAGES), (self.config.architecture.num_classes > 0, APART)
        return state.get("judge"), all(progress.get(key, False) for matters, key in changes if matters)

    def train(self) -> None:
        """The steps that are left, an interval at a time."""
        done = self.first
        self.began, self.pace, self.told = time.monotonic(), Pace(self.context, None), False
        while done < self.training.steps:
            done = self._interval(done)

    def _interval(self, done: int) -> int:
        """The steps after `done` until losses are reported, and their report; returns the last of them, of a training that has
        diverged that of all.
        """
        end = min((done // self.report_every + 1) * self.report_every, self.training.steps)
        leaving = False
        for i in range(done + 1, end + 1):
            with tf32(self.config.precision != "float32"):
                self.training.step(i, self.images, self.labels)
            leaving = i < self.training.steps and self.pace.looks() and self.pace.wants_checkpoint()[1]
            if i < end:
                self._tell_pace(i)
                if leaving:
                    self._leave(i, {})
        self.told, speed = True, self._speed(end)  # by what is reported now
        metrics = {"kimg": end / self.per_kimg, **self.training.losses(), "images_per_second": speed}
        diverged = not math.isfinite(metrics["loss_g"] + metrics["loss_d"])
        if diverged and self.best is None:
            raise UserError(f"generator training diverged: losses are {metrics['loss_g']} and {metrics['loss_d']}; {DEAD_END}")
        if end % self.snapshot_every == 0 or end == self.training.steps or diverged:
            self._snapshot(end, metrics, leaving=leaving, diverged=diverged)
        elif leaving:
            self._leave(end, metrics)
        else:
            self.context.report(metrics)
        return self.training.steps if diverged else end

    def _speed(self, i: int) -> float:
        """Images a second of this process."""
        return (i - self.first) * self.config.batch_size / (time.monotonic() - self.began)

    def _tell_pace(self, i: int) -> None:
        """In the first interval of this process, if that is a long one: how long the rest takes."""
        if self.told or i - self.first <= LEAST_STEPS or time.monotonic() - self.began <= TELL_AFTER_S:
            return
        self.told, kimg = True, i / self.per_kimg
        so_far = {"kimg": kimg, "images_per_second": self._speed(i)}
        self.context.say(f"{kimg:.3g} of {self.config.kimg:g} thousand images{to_go(so_far, self.config.kimg)}")

    def _snapshot(self, i: int, metrics: dict[str, float], *, leaving: bool, diverged: bool) -> None:
        """Judge the averaged generator after step `i`, keep it if it is the best, and write a checkpoint."""
        if not diverged:
            metrics |= self._judged(metrics["kimg"])
        self.history.append(metrics)
        self.training.agree()
        step = self.training.steps if diverged else i
        progress, state = self._progress(step, diverged=diverged), self._state()
        if i == self.straight and self.trunk is not None and not diverged:
            replace_folder(self.trunk, partial(checkpoint.write_state, name=PROGRESS, progress=progress, state=state))
        wait = leaving or step == self.training.steps
        checkpoint.hand_over_state(self.context, metrics, PROGRESS, progress, state, wait=wait)

    def _judged(self, kimg: float) -> dict[str, float]:
        average = self.training.average
        average.measure_w(seed=self.config.seed)
        quality = self.judge(average)
        quality["collapsed"] = float(self.judge.collapsed(quality))
        if self.on_snapshot is not None and self.context.rank == 0:
            self.on_snapshot(average, kimg, quality)
        best = self.best_quality
        if best is None or self.config.keep == "last" or self.judge.is_better(quality, best):
            self.best_quality = {**quality, "kimg": kimg}
            self.best = copy.deepcopy(average.state_dict())
        return quality

    def _leave(self, i: int, metrics: dict[str, float]) -> None:
        """A checkpoint between two snapshots, which is stored before anything else is done."""
        self.training.agree()
        checkpoint.hand_over_state(self.context, metrics, PROGRESS, self._progress(i), self._state(), wait=True)

    def _state(self) -> dict[str, Any]:
        return {**self.training.state(), "best": self.best, "judge": self.judge.state}

    def _progress(self, step: int, *, diverged: bool = False) -> dict[str, Any]:
        about = {"config": self.config.model_dump(mode="json"), "step": step, "of": self.training.steps}
        return {**about, AS_IMAGES: True, APART: True, "diverged": diverged, "best": self.best_quality, "history": self.history}


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
    run = _Run(config, images, labels, context, on_snapshot, shorter, trunk)
    run.train()
    return restored(config, run.best, context.device)
