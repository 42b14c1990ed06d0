"""The training loop, once, for laptop and cluster: it knows its `RunContext` and no more about where it runs."""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data.epochs import NOTHING, Done, EpochSource, InMemory
from dmat_ray.data.manifold_set import ManifoldSet, steps_per_epoch
from dmat_ray.data.set_reader import digest, lost_classes, require_generator
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.networks import classifiers
from dmat_ray.pace import LEAST_STEPS, TELL_AFTER_S, Pace
from dmat_ray.rng import derive
from dmat_ray.storage import Place
from dmat_ray.training import objectives
from dmat_ray.training.progress import Progress, Sums
from dmat_ray.training.schedules import learning_rate
from dmat_ray.training.step import TrainingStep
from dmat_ray.training.validation import Validator
from dmat_ray.training.yardstick import Yardstick
from dmat_ray.types import Generator, RunContext
from dmat_ray.wording import duration


def check_inputs(config: Config, manifest: Mapping[str, Any], generator_sha256: str, world_size: int) -> None:
    """Raise UserError for a combination of settings and set that cannot be trained."""
    require_generator(manifest, generator_sha256, "the on-manifold set")
    if config.training.images == "natural" and (terms := objectives.on_manifold_terms(config.objective)):
        raise UserError(f"objective.{terms[0]} needs training.images on_manifold: natural images have no exact w")
    if (config.training.flip or config.training.crop_padding) and (terms := objectives.on_manifold_terms(config.objective)):
        raise UserError(
            f"training.flip and training.crop_padding change the image, and objective.{terms[0]} needs the w that makes it: x "
            "would not be g(w) any more"
        )
    if (padding := config.training.crop_padding) >= (side := manifest["shapes"]["on_manifold"][1]):
        raise UserError(f"training.crop_padding {padding} leaves nothing of {side} pixels in some crops; give less than {side}")
    if config.training.batch_size < world_size:
        raise UserError(f"training.batch_size {config.training.batch_size} is smaller than the {world_size} workers")
    if len(manifest["class_names"]) < 2:
        raise UserError("the on-manifold set has one class only")
    if config.training.images == "natural" and config.training.val_examples and config.training.best_metric == "val_latent":
        raise UserError("training.best_metric val_latent needs training.images on_manifold: natural images have no exact w")


class _Run:
    """A training under way: what `train` goes through, and what its checkpoints hold."""

    def __init__(
        self,
        config: Config,
        source: EpochSource,
        generator: Generator,
        generator_sha256: str,
        context: RunContext,
        judged_by: EvaluationConfig | None,
        branch_from: Place | None,
    ) -> None:
        self.config, self.settings, self.source, self.context = config, config.training, source, context
        manifest, set_sha256 = source.manifest, digest(source.manifest)
        check_inputs(config, manifest, generator_sha256, context.world_size)
        torch.manual_seed(derive(self.settings.seed, "weights") % 2**31)
        channels, resolution, _ = manifest["shapes"]["on_manifold"]
        class_names = tuple(manifest["class_names"])
        network = classifiers.build(config.classifier, channels, len(class_names)).to(context.device)
        self.step = TrainingStep(config, network, generator, context)
        # of an epoch that was interrupted after its last step the network is validated before another step
        self.step.lay_out(torch.zeros(2, channels, resolution, resolution, device=context.device))
        recorded = trained_settings.of_set(config, manifest)
        self.about = checkpoint.describe_run(recorded, class_names, channels, resolution, generator_sha256, set_sha256)
        if lost := lost_classes(manifest, "train"):
            self.about[checkpoint.UNSEEN] = lost
        self.steps = steps_per_epoch(source.size, self.settings.batch_size)
        held_out = source.held_out(context.rank, context.world_size)
        self.validators: list[Callable[[nn.Module, RunContext], dict[str, float]]] = []
        if held_out is not None and judged_by is not None:
            self.validators.append(Yardstick(judged_by, held_out, generator))
        chooses = self.settings.keep == "best" or self.settings.patience is not None
        if held_out is not None and (judged_by is None or chooses):
            self.validators.append(Validator(config, held_out, generator))
        self.pace = Pace(context, self.settings.checkpoint_minutes)
        self.progress, self.told_pace = Progress(), False
        self.first_step: tuple[int, float] | None = None  # of this process: its number, and when it was done
        if (found := checkpoint.newest(context, checkpoint.RUN)) is not None:
            self._resume(found)
        elif branch_from is not None:
            self._resume(branch_from, branch=True)

    def _resume(self, folder: Place, *, branch: bool = False) -> None:
        run = checkpoint.require_whole(folder, checkpoint.RUN) if branch else checkpoint.read_run(folder)
        if not branch:
            trained_settings.require_same_config(run["config"], self.config, folder)
            checkpoint.require_network_of(run, folder, unchanged=True)
        if lineage := run.get("lineage", []) + ([trained_settings.ancestor(run, self.config)] if branch else []):
            self.about["lineage"] = lineage
        if run["set_sha256"] != self.about["set_sha256"]:
            raise UserError(f"'{folder}' was trained on another on-manifold set; train under another --name")
        state = checkpoint.load_state(folder)
        self.step.load(state["step"])
        self.progress = Progress.of(run, state["progress"], self.context.device)
        if branch:
            self.progress.finished = self.progress.epoch >= self.settings.epochs
        if not self.progress.finished:
            workers = f"{self.context.world_size} worker{'s' if self.context.world_size > 1 else ''}"
            done = self.progress.done.steps
            within = f", after step {done} of {self.steps}" if done else ""
            self.context.say(f"{self.config.name}: going on with epoch {self.progress.epoch + 1}{within}, with {workers}")

    def epoch(self) -> None:
        """The rest of an epoch, its validation, and what is reported of it."""
        progress, settings, context = self.progress, self.settings, self.context
        epoch, first, began = progress.epoch, progress.done, time.monotonic()
        self.step.network.train()
        # steps of an epoch that was begun by another number of workers cannot be dealt again as they were
        workers = context.world_size if first.steps == 0 or first.world_size == context.world_size else 0
        batches = self.source.batches(epoch, context.rank, context.world_size, first)
        for step, batch in enumerate(batches, start=first.steps):
            rate = learning_rate(settings, epoch + step / self.steps)
            try:
                losses = self.step(batch.to(context.device), epoch, step, rate)
            except NotFiniteError as error:
                raise NotFiniteError(self._diverged(*progress.sums.first_bad(), step, str(error))) from None
            progress.sums.add(losses, step)
            self._tell_pace(step)
            if self.pace.looks():
                due, leaving = self.pace.wants_checkpoint()
                if due:
                    self._require_finite(step)
                    progress.done = Done(step + 1, workers, self._seen())
                    progress.sums.agree(context)
                    self._save({}, wait=leaving)
                    if leaving:
                        at = f"epoch {epoch + 1}, step {step + 1} of {self.steps}"
                        context.say(f"{self.config.name}: a machine will be taken away; checkpoint written after {at}")
        seconds = time.monotonic() - began
        self._require_finite(self.steps - 1)
        metrics = {**progress.sums.means(context), "epoch": epoch + 1.0, "lr": learning_rate(settings, epoch + 1)}
        for validate in self.validators:
            try:
                metrics |= validate(self.step.result, context)
            except NotFiniteError as error:
                raise NotFiniteError(self._diverged(None, "", self.steps - 1, f"validation: {error}")) from None
        metrics["examples_per_second"] = self.source.size * (1 - first.steps / self.steps) / seconds
        progress.epoch, progress.done, progress.sums = epoch + 1, NOTHING, Sums()
        progress.history.append(metrics)
        self.told_pace = True  # by what is reported now
        self._note_best(metrics)
        progress.finished = progress.epoch == settings.epochs or self._has_stalled()
        if progress.finished or progress.epoch % settings.checkpoint_every == 0:
            self._save(metrics, wait=progress.finished)
        else:
            context.report(metrics)

    def _tell_pace(self, step: int) -> None:
        """In the first epoch of this process, if that is a long one: how long one takes. The first step, which may compile the
        network, does not count.
        """
        if self.first_step is None:
            self.first_step = (step, time.monotonic())
        taken, seconds = step - self.first_step[0], time.monotonic() - self.first_step[1]
        if self.told_pace or taken < LEAST_STEPS or seconds < TELL_AFTER_S:
            return
        self.told_pace, name, epoch = True, self.config.name, self.progress.epoch + 1
        self.context.say(
            f"{name}: epoch {epoch}, step {step + 1} of {self.steps}; about {duration(seconds / taken * self.steps)} an epoch"
        )

    def _seen(self) -> Tensor | None:
        seen = self.source.seen()
        if seen is None:
            return None
        seen = seen.to(self.context.device)
        self.context.average_([seen])
        return (seen > 0).cpu()

    def _note_best(self, metrics: dict[str, float]) -> None:
        name, best = self.settings.best_metric, self.progress.best
        if name not in metrics or (best is not None and metrics[name] <= best["metrics"][name]):
            return
        network = self.step.result.state_dict() if self.settings.keep == "best" else {}
        self.progress.best = {"metrics": metrics, "network": {key: value.detach().clone() for key, value in network.items()}}

    def _has_stalled(self) -> bool:
        best, patience = self.progress.best, self.settings.patience
        return patience is not None and best is not None and self.progress.epoch - best["metrics"]["epoch"] >= patience

    def _require_finite(self, step: int) -> None:
        """Raise NotFiniteError on all workers if on any a loss so far, or a weight after `step`, is not finite."""
        bad, name = self.progress.sums.first_bad()
        tensors = [t for t in self.step.network.state_dict().values() if t.is_floating_point()]
        finite = torch.stack([torch.isfinite(t).all() for t in tensors]).all()
        told = (~finite).float() if bad is None else torch.ones((), device=self.context.device)
        self.context.average_([told])
        if told > 0:
            raise NotFiniteError(
                self._diverged(bad, name, step, "the weights that come of it are not finite, or a worker's loss")
            )

    def _diverged(self, bad: int | None, name: str, step: int, what: str) -> str:
        if bad is not None:
            step, what = bad, f"term {'all' if name == 'loss' else name.removesuffix('_loss')}: the loss is not finite"
        kept = next(iter(self.context.checkpoints()), None)
        return (
            f"training diverged in epoch {self.progress.epoch + 1}, step {step + 1} of {self.steps}, {what}; lower "
            f"{'training.lr_values' if self.settings.schedule == 'piecewise' else 'training.lr'}, or set training.clip_norm, and "
            "train anew under another --name. "
            + (f"The last good checkpoint is '{kept}'" if kept else "There is no checkpoint before it")
        )

    def _save(self, metrics: dict[str, float], *, wait: bool) -> None:
        progress = self.progress
        best = None if progress.best is None else progress.best["metrics"]
        kept = best if best is not None and self.settings.keep == "best" else next(iter(progress.history[-1:]), {})
        run = {
            **self.about,
            "epoch": progress.epoch,
            "step": progress.done.steps,
            "finished": progress.finished,
            "metrics": kept,
            "best": best,
            "history": progress.history,
        }

        def write(folder: Path) -> None:
            network: nn.Module | dict[str, Tensor] = self.step.result
            if progress.best is not None and self.settings.keep == "best":
                network = progress.best["network"]
            checkpoint.save(folder, network, run, {"step": self.step.state(), "progress": progress.state()})

        checkpoint.hand_over(self.context, metrics, write, wait=wait)
        self.pace.saved()


def train(
    config: Config,
    data: ManifoldSet | EpochSource,
    generator: Generator,
    generator_sha256: str,
    context: RunContext,
    *,
    judged_by: EvaluationConfig | None = None,
    branch_from: Place | None = None,
) -> dict[str, float]:
    """Train a classifier on the training split `data`, in memory or streamed, and return the last epoch's metrics.

    After every epoch metrics go to `context.report`, with a checkpoint every `checkpoint_every` epochs and at the end; within
    an epoch one comes every `checkpoint_minutes`, and when `context` says that its machine will go. Goes on from the newest
    checkpoint that is whole, with the batch that would have come next; if there is none, from `branch_from`, a checkpoint of any
    settings. `judged_by` is a suite that is measured on the held-out examples after every epoch (see `yardstick`). Raises
    UserError if the newest checkpoint was trained with other settings, and NotFiniteError, with step and term, if it diverges.
    """
    source: EpochSource = InMemory(data, config.training) if isinstance(data, ManifoldSet) else data
    run = _Run(config, source, generator, generator_sha256, context, judged_by, branch_from)
    while not run.progress.finished:
        run.epoch()
    return run.progress.history[-1]


def describe(name: str, metrics: Mapping[str, float], epochs: int) -> str:
    """One line about an epoch."""
    terms = [re.fullmatch(r"train_(.+)_accuracy", key) for key in metrics]
    accuracies = ", ".join(f"{term[1]} {metrics[term[0]]:.0%}" for term in terms if term)
    line = f"{name}: epoch {metrics['epoch']:.0f}/{epochs}, loss {metrics['train_loss']:.3f}, training accuracy {accuracies}"
    if "val_robust" in metrics:
        line += f"; held out: clean {metrics['val_clean']:.0%}, under all attacks {metrics['val_robust']:.0%}"
    return line
