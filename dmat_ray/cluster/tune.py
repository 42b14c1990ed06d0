"""Search: trials on Ray Tune, each a training, under one MLflow run; killed, it goes on with what it knew."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray.cluster import champion, environment, searchers, session, tracking, trial_runs, tune_state
from dmat_ray.cluster.search_plan import SEARCH, Plan
from dmat_ray.cluster.trial_watch import Tell, Watcher, watched
from dmat_ray.reports import search_result
from dmat_ray.reports.search_result import SearchResult
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import LiveTable
from dmat_ray.storage.lease import Lease, sole


@dataclass(frozen=True)
class _Named:
    """Names a trial by its search and its number, which is what Tune's tag of it begins with."""

    search: str

    def __call__(self, trial: TuneTrial) -> str:
        return f"{self.search}_{int(trial.experiment_tag.split('_')[0]):03d}"


def _fit(search: Plan, watcher: Watcher, lease: Lease, at_once: int, *, goes_on: bool) -> list[Trial]:
    config, tune, path = search.config, search.config.tune, search.folder / tune_state.STATE
    share = searchers.resources(search.work.is_alone, config.cluster, at_once, turns=tune.scheduler == "pbt")
    how: dict[str, Any] = {}
    if goes_on:
        watcher.say("going on, with as many trials at a time as before")
    else:
        (search.folder / tune_state.COPY).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        watcher.say(f"{at_once} trial{'s' if at_once > 1 else ''} at a time")
        how = {
            "search_alg": searchers.searcher(tune, at_once),
            "scheduler": searchers.scheduler(tune, search.space, search.work),
            "num_samples": tune.samples,
            "trial_name_creator": _Named(search.folder.name),
        }
    variables = search.space.variables(tune)
    with watched(watcher):
        try:
            trial_runs.fit(search.work, path, share, lease, tune.retries, variables, callbacks=[Tell()], goes_on=goes_on, **how)
        except Exception:
            if not watcher.ended_by:
                raise
    if not lease.is_lost:
        watcher.copies.renew(watcher.ended, last=True)
    return watcher.settled()


def search(plan: Plan, say: Callable[[str], None], *, resume: bool = False) -> SearchResult:
    """Run a search, or go on with it; returns its trials, and what the best of them are worth. Ray must be connected.

    Raises UserError for machines that do not fit, if no trial gives a result, and if another run has taken over the search's
    folder.
    """
    with sole(plan.folder) as lease:
        return already(plan, say, resume=resume) or _search(plan, lease, say, resume=resume)


def already(plan: Plan, say: Callable[[str], None], *, resume: bool) -> SearchResult | None:
    """What a search gave that is there and done, which is said; None for one that is to be run. Needs no Ray.

    Raises UserError for another one that is there, or one that is not to go on.
    """
    if not plan.is_finished(resume=resume):
        return None
    found = search_result.read(plan.folder)
    assert found is not None, "it is finished, so it has a result"
    left = plan.left_of(found)
    what = f"{left}; --resume goes on with it" if left else "is finished and unchanged, nothing to do"
    say(f"the search in '{plan.folder}' {what}")
    return found


def _search(plan: Plan, lease: Lease, say: Callable[[str], None], *, resume: bool) -> SearchResult:
    config, tune = plan.config, plan.config.tune
    if resume and not (plan.folder / SEARCH).is_file():
        say(f"there is no search in '{plan.folder}' yet: beginning one")
    goes_on = resume and tune_state.goes_on(plan.folder, say)
    if not environment.is_own(config.cluster):
        session.await_machines(config.cluster, say)
    streamed = config.training.loader == "stream"
    at_once = searchers.trials_at_once(tune, config.cluster, alone=plan.work.is_alone, streamed=streamed)
    name = plan.folder.name
    with (
        tracking.tracked(config, name, "tune", key=f"tune/{name}/{plan.id}") as parent,
        LiveTable(tune.objective, name) as live,
    ):
        plan.begin()
        how = f"{tune.searcher}, {tune.scheduler}" if tune.scheduler != "none" else tune.searcher
        say(f"{name}: {how}; raising {' and '.join(tune.objective)} of suite {', '.join(tune.suites)}")
        watcher = Watcher(plan, parent, say, live)
        try:
            found = _fit(plan, watcher, lease, at_once, goes_on=goes_on)
        except BaseException:
            for trial, one in watcher.runs.items():
                if trial not in watcher.closed and not lease.is_lost:  # or they are another's by now
                    one.finish("FAILED")
            raise
        return champion.crown(plan, found, watcher.runs, parent, say, watcher.ended_by, lease)
