"""Search: trials on Ray Tune, each a training, under one MLflow run; killed, it goes on with what it knew."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray import suites, trials
from dmat_ray.checkpoint import relevant
from dmat_ray.cluster import champion, searchers, spaces, tracking
from dmat_ray.cluster.trial import DIVERGED, Work, run, state_of
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data import set_reader
from dmat_ray.errors import UserError
from dmat_ray.files import read_json, text_digest, write_json
from dmat_ray.manifold import generators
from dmat_ray.models import untrained
from dmat_ray.storage import set_folder
from dmat_ray.trials import Trial
from dmat_ray.trials_table import LiveTable, shown
from dmat_ray.yardstick import PREFIX, columns

SEARCH, SPENT = "search.json", "spent.json"


def search_folder(config: Config) -> Path:
    """Where a search keeps everything but the models it publishes."""
    return Path(config.output).resolve() / "tune" / (config.tune.name or Path(config.tune.space).stem)


class _Search:
    """A search that has been checked: its space, its yardstick, what identifies it."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config = config.model_copy(update={"output": str(Path(config.output).resolve())})
        self.folder = search_folder(config)
        self.space, self.base = spaces.load(config.tune.space, self.config)
        probe = spaces.trial_config(self.base, self.space.constants, "probe", config.tune.epochs)
        if not probe.training.val_examples:
            raise UserError("a search judges trials by held-out images; training.val_examples is 0")
        sets = (probe.training.images,)
        self.judged_by = suites.resolved(EvaluationConfig(suites=config.tune.suites, sets=sets, check_examples=0))
        self.columns = columns(self.judged_by)
        trials.require_columns(config.tune.objective, self.columns, config.tune.suites)
        untrained([probe], say)
        self.axes = trials.axes(config.tune.objective, self.columns)
        self.work = Work(
            self.base,
            self.space,
            self.judged_by.model_dump(mode="json"),
            list(config.tune.objective),
            str(set_folder(probe)),
            str(self.folder),
            None if config.tune.scheduler == "pbt" else 2,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the results depend on, by name. Budgets, machines and what is done afterwards may change on the way."""
        probe = spaces.trial_config(self.base, self.space.constants, "probe", self.config.tune.epochs)
        names = (
            "searcher",
            "grid_points",
            "scheduler",
            "objective",
            "samples",
            "epochs",
            "grace_epochs",
            "reduction",
            "seed",
        )
        found = {f"tune.{name}": getattr(self.config.tune, name) for name in names}
        found |= {f"space: {key}": value for key, value in self.space.description().items()}
        found |= {f"yardstick: {row.name}": row.fingerprint() for row in (*self.judged_by.attacks, *self.judged_by.summaries)}
        found |= {**relevant(probe), "training.epochs": self.base["training"]["epochs"]}
        found["the on-manifold set"] = set_reader.digest(set_reader.read_manifest(set_folder(self.config)))
        found["the generator"] = generators.fingerprint(self.config.generator.path)
        return dict(json.loads(json.dumps(found)))

    @property
    def digest(self) -> str:
        """Names this search, in this folder."""
        return text_digest(json.dumps([str(self.folder), self.identity], sort_keys=True))[:12]

    def is_finished(self, *, resume: bool) -> bool:
        """Whether the search is there and done. Raises UserError for another one that is there, or one that is not to go on."""
        if not (self.folder / SEARCH).is_file():
            if resume:
                raise UserError(f"there is no search in '{self.folder}' to resume")
            return False
        before, now = read_json(self.folder / SEARCH), self.identity
        other = "give it another name by --tune.name"
        for name in [*now, *before]:
            if before.get(name, "absent") != now.get(name, "absent"):
                raise UserError(
                    f"the search in '{self.folder}' has {name} = {before.get(name, 'absent')}, now it is "
                    f"{now.get(name, 'absent')}; go on with the old value, or {other}"
                )
        result = self.folder / champion.RESULT
        if result.is_file() and (not read_json(result)["ended_by"] or not resume):
            return True
        if not resume:
            raise UserError(f"there is an unfinished search in '{self.folder}'; --resume goes on with it, or {other}")
        return False


class _Watcher:
    """What the driver does as trials go: it tracks, says, draws and counts. Tune reaches it through `_Tell`."""

    def __init__(self, search: _Search, parent: tracking.Run, say: Callable[[str], None], live: LiveTable) -> None:
        self.search, self.parent, self.say, self.live = search, parent, say, live
        self.found: dict[str, Trial] = {}
        self.runs: dict[str, tracking.Run] = {}
        self.began, self.ended_by = time.monotonic(), ""
        self.ended: list[TuneTrial] = []
        spent = search.folder / SPENT
        self.spent: dict[str, Any] = dict(read_json(spent)) if spent.is_file() else {"seconds": {}}

    def started(self, trial: TuneTrial) -> None:
        """A trial starts, goes on, or goes on from another's weights with other settings."""
        name, knobs = str(trial), self.search.space.knobs(trial.config)
        before = self.found.get(name)
        verb = "starts" if before is None else "goes on" if before.knobs == knobs else "takes another's weights"
        if verb != "goes on" or self.search.config.tune.scheduler != "pbt":  # whose trials take turns
            self.say(f"{name} {verb}: " + ", ".join(f"{key} = {shown(value)}" for key, value in knobs.items()))
        epochs, scores = (before.epochs, before.scores) if before else (0, {})
        self._put(Trial(name, "running", knobs, epochs, self.spent["seconds"].get(name, 0.0), scores))
        self.run_of(name, trial)
        for key, value in knobs.items():
            self.runs[name].tag(f"knob.{key}", str(value))

    def run_of(self, name: str, trial: TuneTrial) -> tracking.Run:
        """A trial's run in MLflow: the one that it had before a kill, too."""
        if name not in self.runs:
            config = self.search.work.config(trial.config, name)
            key = f"trial/{name}/{self.search.digest}"
            self.runs[name] = tracking.open_run(config, name, "trial", self.parent, key=key)
        return self.runs[name]

    def reported(self, trial: TuneTrial, result: dict[str, Any]) -> None:
        """An epoch of a trial."""
        name, work, objectives = str(trial), self.search.work, self.search.config.tune.objective
        scores = {column: float(result[f"{PREFIX}{column}"]) for column in self.search.columns}
        if (self.found[name].epochs, self.found[name].scores) == (int(result["epoch"]), scores):
            return  # told again, by a process that took over from one that had died
        seconds = self.spent["seconds"]
        seconds[name] = seconds.get(name, 0.0) + float(result.get("time_this_iter_s", 0.0))
        write_json(self.search.folder / SPENT, self.spent)
        knobs = self.found[name].knobs  # the trial's may already be those of what it will become
        self._put(Trial(name, "running", knobs, int(result["epoch"]), seconds[name], scores))
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and _is_ours(k)}
        if self.search.config.tune.scheduler == "pbt":
            numbers |= {f"knob.{k}": v for k, v in knobs.items() if isinstance(v, int | float)}
        self.run_of(name, trial).metrics(numbers, step=int(result["epoch"]))
        values = ", ".join(f"{o} {100 * trials.value(o, scores):.1f} %" for o in objectives)
        diverged = "; it has diverged" if result.get(DIVERGED) else ""
        self.say(f"{name}: epoch {result['epoch']:.0f}/{work.base['tune']['epochs']}, {values}{diverged}")

    def failed(self, trial: TuneTrial, *, again: bool) -> None:
        """A trial has failed, and will be tried `again` or not."""
        name = str(trial)
        what = "is tried again from its last checkpoint" if again else "is given up, the others go on"
        self.say(f"warning: {name} has failed ({_reason(trial)}) and {what}")

    def over(self) -> bool:
        """Whether a budget is used up."""
        tune, cluster = self.search.config.tune, self.search.config.cluster
        gpus = cluster.gpus_per_worker * cluster.train_workers
        hours = gpus * sum(self.spent["seconds"].values()) / 3600
        if not self.ended_by:
            if tune.max_wall_minutes is not None and time.monotonic() - self.began > 60 * tune.max_wall_minutes:
                self.ended_by = f"tune.max_wall_minutes {tune.max_wall_minutes:g}"
            elif tune.max_gpu_hours is not None and hours > tune.max_gpu_hours:
                self.ended_by = f"tune.max_gpu_hours {tune.max_gpu_hours:g}"
            if self.ended_by:
                self.say(f"{self.ended_by} is used up: ending with what there is")
        return bool(self.ended_by)

    def _put(self, trial: Trial) -> None:
        self.found[trial.name] = trial
        self.live.update(self.found.values())

    def settle(self, trial: TuneTrial) -> Trial:
        """What became of a trial, from its files: also of one that ended before a kill."""
        name = str(trial)
        run = state_of(self.search.work.trial_folder(name)) or {"history": [], "epoch": 0, "finished": False}
        last, knobs = trial.last_result or {}, self.search.space.knobs(trial.config)
        history = [{"epoch": m["epoch"], **{c: m[f"{PREFIX}{c}"] for c in self.search.columns}} for m in run["history"]]
        scores = {c: history[-1][c] for c in self.search.columns} if history else {}
        status = "failed" if trial.status == TuneTrial.ERROR else "finished" if run["finished"] else "stopped"
        error = _reason(trial) if status == "failed" else ""
        if last.get(DIVERGED):
            status, scores = "diverged", dict.fromkeys(self.search.columns, 0.0)
        seconds = self.spent["seconds"].get(name, 0.0)
        lineage = tuple(run.get("lineage", ()))
        settled = Trial(name, status, knobs, run["epoch"], seconds, scores, tuple(history), lineage, error)  # type: ignore[arg-type]
        one = self.run_of(name, trial)
        one.tag("status", status)
        one.finish("FAILED" if status in ("failed", "diverged") else "FINISHED")
        return settled


def _is_ours(name: str) -> bool:
    """Whether an entry of a result is a training's, and not Tune's own."""
    return name.startswith((PREFIX, "train_", "val_", "objective_")) or name in ("epoch", "lr", "examples_per_second", DIVERGED)


def _reason(trial: TuneTrial) -> str:
    with contextlib.suppress(Exception):
        error = trial.get_pickled_error()
        if error is not None:
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            return lines[-1].strip()[:300]
    return "its process has died"


_WATCHER: _Watcher | None = None


class _BudgetUsedUpError(Exception):
    pass


class _Tell(ray.tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Tune pickles its callbacks, so this holds nothing."""

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.started(trial)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        if _WATCHER is not None:
            _WATCHER.reported(trial, result)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.failed(trial, again=True)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.failed(trial, again=False)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if _WATCHER is not None and _WATCHER.over():
            # Tune's own stoppers would mark the search as finished, and it could not be gone on with
            raise _BudgetUsedUpError

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.ended = trials


@dataclass(frozen=True)
class _Named:
    """Names a trial by its search and its number, which is what Tune's tag of it begins with."""

    search: str

    def __call__(self, trial: TuneTrial) -> str:
        return f"{self.search}_{int(trial.experiment_tag.split('_')[0]):03d}"


@contextlib.contextmanager
def _watched(watcher: _Watcher) -> Iterator[None]:
    global _WATCHER
    _WATCHER = watcher
    try:
        yield
    finally:
        _WATCHER = None


def _fit(search: _Search, watcher: _Watcher, *, resume: bool) -> list[Trial]:
    config, tune = search.config, search.config.tune
    at_once = searchers.trials_at_once(tune, config.cluster, alone=search.work.is_alone)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run, work=search.work),
        searchers.resources(search.work.is_alone, config.cluster, at_once),
    )
    path = search.folder / "ray_tune"
    if resume and ray.tune.Tuner.can_restore(str(path)):
        tuner = ray.tune.Tuner.restore(str(path), trainable=trainable)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=search.space.variables(tune),
            tune_config=ray.tune.TuneConfig(
                search_alg=searchers.searcher(tune, at_once),
                scheduler=searchers.scheduler(tune, search.space),
                num_samples=tune.samples,
                reuse_actors=search.work.is_alone,
                trial_name_creator=_Named(search.folder.name),
                trial_dirname_creator=str,
            ),
            run_config=ray.tune.RunConfig(
                name=path.name,
                storage_path=str(path.parent),
                verbose=0,
                callbacks=[_Tell()],
                failure_config=ray.tune.FailureConfig(max_failures=tune.retries),
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=search.work.keep),
            ),
        )
    watcher.say(f"{at_once} trial{'s' if at_once > 1 else ''} at a time")
    with _watched(watcher):
        try:
            tuner.fit()
        except Exception:
            if not watcher.ended_by:
                raise
    return [watcher.settle(trial) for trial in watcher.ended]


def search(config: Config, say: Callable[[str], None], *, resume: bool = False) -> champion.Found:
    """Run a search, or go on with it; returns its trials, and what the best of them are worth. Ray must be connected.

    Raises UserError for a space, an objective or machines that do not fit, and if no trial gives a result.
    """
    searched = _Search(config, say)
    config, folder = searched.config, searched.folder
    if searched.is_finished(resume=resume):
        say(f"the search in '{folder}' is finished and unchanged, nothing to do")
        return champion.read(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SEARCH, searched.identity)
    what = f"{config.tune.searcher}, {config.tune.scheduler}" if config.tune.scheduler != "none" else config.tune.searcher
    say(f"{folder.name}: {what}; raising {' and '.join(config.tune.objective)} of suite {', '.join(config.tune.suites)}")
    with (
        tracking.tracked(config, folder.name, "tune", key=f"tune/{folder.name}/{searched.digest}") as parent,
        LiveTable(config.tune.objective, folder.name) as live,
    ):
        watcher = _Watcher(searched, parent, say, live)
        found = _fit(searched, watcher, resume=resume)
        return champion.crown(searched, found, watcher.runs, parent, say, watcher.ended_by)
