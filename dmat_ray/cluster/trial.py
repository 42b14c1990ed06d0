"""A trial of a search: a training that reports to Ray Tune after every epoch, and that can go on from its or another's weights.

A trial of one worker trains in the process that Tune gives it; more workers are a Ray Train run, started by that process.
Checkpoints are kept in the search's folder, the trial's own or, after population based training has moved it, in a new
folder for what it became; what Tune keeps of them is a pointer. So nothing that was written is lost with Tune's memory of it.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
import torch
from torch import Tensor, nn

from dmat_ray.cluster import session, spaces, workers
from dmat_ray.cluster.context import stored_checkpoints
from dmat_ray.cluster.events import listen
from dmat_ray.cluster.train import worker
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data import manifold_set
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.reports.trials import metric, value
from dmat_ray.storage.files import read_json, text_digest, write_json
from dmat_ray.storage.folders import put
from dmat_ray.training.trainer import train
from dmat_ray.training.yardstick import PREFIX, columns

POINTER = "pointer.json"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Work:
    """What all trials of a search share. Plain values, for another process."""

    base: dict[str, Any]
    space: spaces.Space
    judged_by: dict[str, Any]
    objectives: list[str]
    set_path: str
    folder: str
    keep: int | None
    models: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # whole settings by name; then a sample names one

    def of_models(self, models: Mapping[str, dict[str, Any]]) -> "Work":
        """The same for trainings that are not drawn."""
        return replace(self, models=models, keep=2)

    def trial_folder(self, name: str) -> Path:
        """Where a trial keeps its checkpoints, in folders of its lines."""
        if name in self.models:  # of other settings another folder, though it is called the same
            name = f"{name}-{text_digest(json.dumps(self.models[name], sort_keys=True))[:8]}"
        return Path(self.folder) / "trials" / name

    @property
    def is_alone(self) -> bool:
        """Whether a trial trains in the process that Tune gives it."""
        return self.base["cluster"]["train_workers"] == 1 and self.base["training"]["loader"] == "memory"

    def config(self, sample: Mapping[str, Any], name: str) -> Config:
        """All settings of a trial."""
        if self.models:
            return Config.model_validate(self.models[sample["model"]])
        return spaces.trial_config(self.base, self.space.settings(sample), name, self.base["tune"]["epochs"])


def line_folders(folder: Path) -> list[Path]:
    """A trial's lines: what it was before and after it went on from another's weights, the newest first."""
    return sorted(folder.glob("line_[0-9]*"), key=_line_number, reverse=True)


def _line_number(folder: Path) -> int:
    return int(folder.name.removeprefix("line_"))  # of a population's trial there may be hundreds


class _TrialContext:
    """RunContext of the one worker of a trial, in the trial's own process."""

    rank, world_size = 0, 1

    def __init__(self, line: "_Line", keep: int | None) -> None:
        self.device, self._line, self._keep = session.device_of_actor(), line, keep

    def wrap(self, module: nn.Module) -> nn.Module:
        """See RunContext."""
        return module

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """See RunContext."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        """See RunContext."""
        if checkpoint is not None:
            kept = stored_checkpoints(self._line.folder)
            number = int(kept[0].name.split("_")[1]) + 1 if kept else 0
            put(checkpoint, self._line.folder / f"checkpoint_{number:06d}")
            shutil.rmtree(checkpoint)
            for old in [] if self._keep is None else kept[self._keep - 1 :]:
                old.remove()
        if metrics:
            self._line.report(metrics)

    def checkpoints(self) -> Sequence[str]:
        """See RunContext."""
        return [str(place) for place in stored_checkpoints(self._line.folder)]

    def preempted(self) -> bool:
        """See RunContext: a trial that loses its machine goes on from its last epoch."""
        return False

    def say(self, text: str) -> None:
        """To Ray's log of this process."""
        print(text, file=sys.stderr, flush=True)


class _Line:
    """The folder that a trial writes to now, what it starts from, and what it has told Tune."""

    def __init__(self, work: Work, config: Config, told: dict[str, Any] | None) -> None:
        name = config.name
        self.objectives, self.name, self.epochs = work.objectives, name, config.training.epochs
        self.branch_from: Path | None = None
        self.epoch = 0  # the last that Tune has been told of
        folder = work.trial_folder(name)
        lines = line_folders(folder)
        if told is not None and told["trial"] != name:
            self.branch_from, self.epoch = Path(told["folder"]), int(told["epoch"])
            self.folder = folder / f"line_{_line_number(lines[0]) + 1 if lines else 0:02d}"
        elif told is not None:
            self.epoch, self.folder = int(told["epoch"]), Path(told["folder"]).parent
            for newer in (line for line in lines if _line_number(line) > _line_number(self.folder)):
                shutil.rmtree(newer)  # what Tune had decided was lost with it, and is decided anew
        else:
            self.folder = lines[0] if lines else folder / "line_00"
        self.folder.mkdir(parents=True, exist_ok=True)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Tell Tune of an epoch, and where its checkpoint is."""
        kept = next(iter(stored_checkpoints(self.folder)), None)
        self.epoch = int(metrics["epoch"])
        scores = {key.removeprefix(PREFIX): found for key, found in metrics.items() if key.startswith(PREFIX)}
        values = {metric(number): value(objective, scores) for number, objective in enumerate(self.objectives)}
        with _pointer({"trial": self.name, "folder": str(kept), "epoch": self.epoch}) as pointer:
            # said by the trial, so that no scheduler moves it after its last epoch
            done = self.epoch >= self.epochs or DIVERGED in metrics
            ray.tune.report({**metrics, **values, "done": done}, checkpoint=pointer if kept is not None else None)

    def newest(self) -> dict[str, Any] | None:
        """run.json of the newest checkpoint that is whole."""
        for folder in stored_checkpoints(self.folder):
            with contextlib.suppress(UserError):
                return checkpoint.require_whole(folder, checkpoint.RUN)
        return None

    def catch_up(self) -> bool:
        """Tell Tune of epochs that it does not know of, after a kill; returns whether the training is finished."""
        run = self.newest()
        if run is None:
            return False
        for metrics in run["history"]:
            if metrics["epoch"] > self.epoch:
                self.report(metrics)
        return bool(run["finished"])


@contextlib.contextmanager
def _pointer(content: dict[str, Any]) -> Iterator[ray.tune.Checkpoint]:
    with tempfile.TemporaryDirectory(prefix="dmat_ray_") as folder:
        write_json(Path(folder) / POINTER, content)
        yield ray.tune.Checkpoint.from_directory(folder)


def _told() -> dict[str, Any] | None:
    """The pointer that Tune starts this trial from: its own, or that of the trial whose weights it is to take."""
    given = ray.tune.get_checkpoint()
    if given is None:
        return None
    with given.as_directory() as folder:
        return dict(read_json(Path(folder) / POINTER))


def run(sample: dict[str, Any], *, work: Work) -> None:
    """What Tune calls for every trial, and again for one that goes on."""
    config = work.config(sample, ray.tune.get_context().get_trial_name())
    line = _Line(work, config, _told())
    try:
        if not line.catch_up():
            (_train_here if work.is_alone else _train_on_workers)(config, line, work)
    except NotFiniteError as error:
        # a searcher must learn that this is bad; a failure would teach it nothing, and be tried again
        print(error, file=sys.stderr, flush=True)
        worst = {f"{PREFIX}{name}": 0.0 for name in columns(EvaluationConfig.model_validate(work.judged_by))}
        line.report({**worst, "epoch": float(line.epoch + 1), DIVERGED: 1.0})


def _train_here(config: Config, line: _Line, work: Work) -> None:
    torch.set_num_threads(config.cluster.threads_per_worker)
    context = _TrialContext(line, work.keep)
    train(
        config,
        manifold_set.open_set(work.set_path, "train"),
        generators.load_configured(config.generator, context.device),
        generators.fingerprint(config.generator.path),
        context,
        judged_by=EvaluationConfig.model_validate(work.judged_by),
        branch_from=line.branch_from,
    )


def _train_on_workers(config: Config, line: _Line, work: Work) -> None:
    failed: list[BaseException] = []
    last: list[dict[str, float]] = []

    def handle(event: dict[str, Any]) -> None:
        if "text" in event:
            print(event["text"], file=sys.stderr, flush=True)
            return
        if event["metrics"]["epoch"] >= line.epochs:
            last.append(event["metrics"])  # Tune ends a trial that has said its last, and Ray Train has yet to clear up
            return
        try:
            line.report(event["metrics"])
        except BaseException as error:  # Tune has ended the trial
            failed.append(error)

    with listen(handle) as mailbox:
        settings = {
            "configs": [config.to_json()],
            "set": work.set_path,
            "mailbox": mailbox,
            "judged_by": work.judged_by,
            "branch_from": None if line.branch_from is None else str(line.branch_from),
        }

        def say(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        workers.fit(worker, settings, config.cluster, line.folder, say, keep=work.keep, elastic=True)
    if failed:
        raise failed[0]
    for metrics in last:
        line.report(metrics)


def keep_newest(folder: Path) -> None:
    """Remove all checkpoints of a trial but its last: of a population there are many, and nobody will go on from them."""
    newest = state_of(folder)
    for line in line_folders(folder):
        for kept in stored_checkpoints(line):
            if newest is not None and str(kept) != newest["folder"]:
                kept.remove()


def state_of(folder: Path) -> dict[str, Any] | None:
    """run.json of a trial's newest whole checkpoint, with "folder", or None if it has none."""
    for line in line_folders(folder):
        for kept in stored_checkpoints(line):
            with contextlib.suppress(UserError, json.JSONDecodeError):
                return {**checkpoint.require_whole(kept, checkpoint.RUN), "folder": str(kept)}
    return None
