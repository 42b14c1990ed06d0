"""What a search's driver does as its trials go: it tracks, says, draws and counts, and ends them with the budget."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ray.tune
from pydantic import ValidationError
from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray.cluster import gauges, spaces, tracking, tune_state
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.cluster.trial import DIVERGED, state_of
from dmat_ray.errors import UserError
from dmat_ray.reports import trials
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import LiveTable, shown
from dmat_ray.storage.files import read_json, write_json
from dmat_ray.training.yardstick import PREFIX

SPENT = "spent.json"
TICK_S = 15.0


class Watcher:
    """What the driver does as trials go: it tracks, says, draws and counts. Tune reaches it through `Tell`."""

    def __init__(self, search: Plan, parent: tracking.Run, say: Callable[[str], None], live: LiveTable) -> None:
        self.search, self.parent, self.say, self.live = search, parent, say, live
        self.found: dict[str, Trial] = {}
        self.runs: dict[str, tracking.Run] = {}
        self.began, self.ended_by = time.monotonic(), ""
        self.ended: list[TuneTrial] = []
        spent = search.folder / SPENT
        self.spent: dict[str, Any] = dict(read_json(spent)) if spent.is_file() else {"seconds": {}}
        cluster = search.config.cluster
        self.gpus = float(cluster.gpus_per_worker * cluster.train_workers)  # of a trial: in the next session it may have others
        self.spent.setdefault("gpu_seconds", self.gpus * sum(self.spent["seconds"].values()))
        self.since: dict[str, float] = {}  # when what a trial is doing now began, or was last booked
        self.ticked = 0.0
        self.closed: set[str] = set()  # trials whose runs have been ended
        self.copies = tune_state.Copies(search.folder)

    def started(self, trial: TuneTrial) -> None:
        """A trial starts, goes on, or goes on from another's weights with other settings."""
        name, knobs = str(trial), self.search.space.knobs(trial.config)
        before = self.found.get(name)
        first = before is None and not _told(trial)
        verb = "starts" if first else "goes on" if before is None or before.knobs == knobs else "takes another's weights"
        if verb != "goes on" or self.search.config.tune.scheduler != "pbt":  # whose trials take turns
            self.say(f"{name} {verb}: " + ", ".join(f"{key} = {shown(value)}" for key, value in knobs.items()))
        epochs, scores = (before.epochs, before.scores) if before else (0, {})
        self._put(Trial(name, "running", knobs, epochs, self.spent["seconds"].get(name, 0.0), scores))
        self.run_of(name, trial)
        self.since[name] = time.monotonic()
        for key, value in knobs.items():
            self.runs[name].tag(f"knob.{key}", str(value))

    def run_of(self, name: str, trial: TuneTrial) -> tracking.Run:
        """A trial's run in MLflow: the one that it had before a kill, too."""
        if name not in self.runs:
            try:
                config = self.search.work.config(trial.config, name)
            except (UserError, ValidationError):  # settings that do not go together: the trial itself says so, and it alone ends
                config = spaces.trial_config(self.search.base, self.search.space.constants, name, self.search.config.tune.epochs)
            key = f"trial/{name}/{self.search.id}"
            self.runs[name] = tracking.open_run(config, name, "trial", self.parent, key=key)
        return self.runs[name]

    def reported(self, trial: TuneTrial, result: dict[str, Any]) -> None:
        """An epoch of a trial."""
        name, work, objectives = str(trial), self.search.work, self.search.config.tune.objective
        scores = {column: float(result[f"{PREFIX}{column}"]) for column in self.search.columns}
        if (self.found[name].epochs, self.found[name].scores) == (int(result["epoch"]), scores):
            return  # told again, by a process that took over from one that had died
        knobs = self.found[name].knobs  # the trial's may already be those of what it will become
        self._put(Trial(name, "running", knobs, int(result["epoch"]), self.count(name), scores))
        numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and _is_ours(k)}
        if self.search.config.tune.scheduler == "pbt":
            numbers |= {f"knob.{k}": v for k, v in knobs.items() if isinstance(v, int | float)}
        self.run_of(name, trial).metrics(numbers, step=int(result["epoch"]))
        reached = {o: trials.value(o, scores) for o in objectives}
        gauges.trial(self.search.folder.name, name, reached)
        values = ", ".join(f"{o} {100 * value:.1f} %" for o, value in reached.items())
        diverged = "; it has diverged" if result.get(DIVERGED) else ""
        self.say(f"{name}: epoch {result['epoch']:.0f}/{work.base['tune']['epochs']}, {values}{diverged}")

    def failed(self, trial: TuneTrial, *, again: bool) -> None:
        """A trial has failed, and will be tried `again` or not."""
        name = str(trial)
        self.count(name)
        what = "is tried again from its last checkpoint" if again else "is given up, the others go on"
        self.say(f"warning: {name} has failed ({_reason(trial)}) and {what}")

    def ended_one(self, trial: TuneTrial) -> None:
        """A trial has come to its end, whichever."""
        name = str(trial)
        self.closed.add(name)
        diverged, failed = bool((trial.last_result or {}).get(DIVERGED)), trial.status == TuneTrial.ERROR
        if before := self.found.get(name):
            whole = before.epochs >= self.search.work.base["tune"]["epochs"]
            status: Any = "failed" if failed else "diverged" if diverged else "finished" if whole else "stopped"
            self._put(replace(before, status=status))
        self.run_of(name, trial).finish("FAILED" if diverged or failed else "FINISHED")

    def count(self, name: str) -> float:
        """Book the time since a trial began what it was doing; returns its seconds in all."""
        now, seconds = time.monotonic(), self.spent["seconds"]
        new = now - self.since.get(name, now)
        seconds[name] = seconds.get(name, 0.0) + new
        self.spent["gpu_seconds"] += self.gpus * new
        self.since[name] = now
        write_json(self.search.folder / SPENT, self.spent)
        return float(seconds[name])

    def tick(self, running: Iterable[str]) -> None:
        """Book what these trials have used of the epochs that they are in, now and then: a budget may end within one."""
        if time.monotonic() - self.ticked > TICK_S:
            self.ticked = time.monotonic()
            for name in running:
                self.count(name)

    def gpu_hours(self) -> float:
        """What all trials have used, before a kill, too."""
        return float(self.spent["gpu_seconds"]) / 3600

    def over(self) -> bool:
        """Whether a budget is used up."""
        if not self.ended_by:
            minutes = (time.monotonic() - self.began) / 60
            self.ended_by = self.search.config.tune.used_up(gpu_hours=self.gpu_hours(), minutes=minutes)
            if self.ended_by:
                self.say(f"{self.ended_by} is used up: ending with what there is")
        return bool(self.ended_by)

    def _put(self, trial: Trial) -> None:
        self.found[trial.name] = trial
        self.live.update(self.found.values())

    def settled(self) -> list[Trial]:
        """What became of all trials that had begun."""
        return [self._settled(trial) for trial in self.ended if trial.status != TuneTrial.PENDING or _told(trial)]

    def _settled(self, trial: TuneTrial) -> Trial:
        """What became of a trial, from its files: also of one that ended before a kill."""
        name = str(trial)
        run = state_of(self.search.work.trial_folder(name)) or {"history": [], "epoch": 0, "finished": False}
        last, knobs = trial.last_result or {}, self.search.space.knobs(trial.config)
        if "config" in run:  # what has been trained; the trial's own may be what it was to become
            knobs = {key: _setting(run["config"], key) for key in knobs}
        knobs = dict(json.loads(json.dumps(knobs)))  # of a tuple a list, as a result that is read has it
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
        if name not in self.closed:
            one.finish("FAILED" if status in ("failed", "diverged") else "FINISHED", if_open=True)
        return settled


def _setting(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _told(trial: TuneTrial) -> int:
    """The last epoch that Tune knows of, 0 for a trial that has not begun."""
    return int((trial.last_result or {}).get("epoch", 0))


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


_WATCHER: Watcher | None = None


class BudgetUsedUpError(Exception):
    """Ends Tune's loop, and can be gone on from."""


class Tell(ray.tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Hands Tune's calls to the watcher that is `watched`. Tune pickles its callbacks, so this holds nothing."""

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if _WATCHER is not None:
            for trial in trials:  # those of a search that goes on have the number that it began with
                trial.max_failures = _WATCHER.search.config.tune.retries

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
            _WATCHER.ended_one(trial)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.ended_one(trial)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if _WATCHER is None:
            return
        _WATCHER.copies.renew(trials)
        _WATCHER.tick(str(trial) for trial in trials if trial.status == TuneTrial.RUNNING)
        if _WATCHER.over():
            # Tune's own stoppers would mark the search as finished, and it could not be gone on with
            raise BudgetUsedUpError

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        if _WATCHER is not None:
            _WATCHER.ended = trials


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, Tune's calls reach this watcher: one at a time in a process."""
    global _WATCHER
    _WATCHER = watcher
    try:
        yield
    finally:
        _WATCHER = None
