"""Ray Tune's searchers and schedulers by the names that settings give them, and how many trials a cluster has room for."""

import os
import random
from typing import Any

import numpy as np
import optuna
import ray
import ray.tune
from ray.tune.experiment.trial import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical

from dmat_ray.cluster import environment, session
from dmat_ray.cluster.room import fits, of_nodes, takes_all
from dmat_ray.cluster.spaces import Space
from dmat_ray.cluster.trial import Work, state_of
from dmat_ray.config import ClusterConfig, TuneConfig
from dmat_ray.errors import UserError
from dmat_ray.reports.trials import metric, value
from dmat_ray.training.yardstick import PREFIX
from dmat_ray.wording import number_of

TIME = "epoch"
MOST_NESTED = 20  # trials of several workers at a time: the processes that start these all lie on the head node


def searcher(config: TuneConfig, at_once: int) -> Searcher | SearchAlgorithm:
    """What draws settings, for so many trials at a time."""
    if config.searcher in ("random", "grid"):
        # the whole population of pbt is alive, and takes turns
        return BasicVariantGenerator(random_state=config.seed, max_concurrent=0 if config.scheduler == "pbt" else at_once)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [metric(number) for number in range(len(config.objective))]
    # a few trials at random first, so that a short search learns, too
    first = max(4, min(10, config.samples // 3))
    sampler: Any = (
        optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=first, multivariate=True, constant_liar=True)
        if config.searcher == "tpe"
        else optuna.samplers.NSGAIISampler(seed=config.seed, population_size=first)
    )
    several = len(names) > 1
    found = OptunaSearch(metric=names if several else names[0], mode=["max"] * len(names) if several else "max", sampler=sampler)
    return ConcurrencyLimiter(found, at_once)


def past(work: Work, trial: Trial) -> list[tuple[float, float]]:
    """(epoch, objective) of what Tune had been told of a trial before a kill; Tune forgets its schedulers' memory."""
    told = float((trial.last_result or {}).get(TIME, 0))
    run = state_of(work.trial_folder(str(trial))) if told else None
    scores = [(m["epoch"], {k.removeprefix(PREFIX): v for k, v in m.items()}) for m in run["history"]] if run else []
    return [(epoch, value(work.objectives[0], found)) for epoch, found in scores if epoch <= told]


class _Recalling:
    """For schedulers: every trial that Tune adds after a kill is taken up with what it had reported."""

    def __init__(self, work: Work, **settings: Any) -> None:
        super().__init__(**settings)
        self._work = work

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """See Tune's schedulers."""
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]  # that of the scheduler it is mixed into
        if before := past(self._work, trial):
            self._recall(trial, before)

    def _recall(self, trial: Trial, before: list[tuple[float, float]]) -> None:
        raise NotImplementedError


class _Asha(_Recalling, ASHAScheduler):  # type: ignore[misc]  # ray is untyped
    def _recall(self, trial: Trial, before: list[tuple[float, float]]) -> None:
        for epoch, found in before:
            self._trial_info[trial.trial_id].on_result(trial, epoch, found)


class _Median(_Recalling, MedianStoppingRule):  # type: ignore[misc]
    def _recall(self, trial: Trial, before: list[tuple[float, float]]) -> None:
        self._results[trial] = [{TIME: epoch, metric(0): found} for epoch, found in before]


class _Population(_Recalling, PopulationBasedTraining):  # type: ignore[misc]
    def _recall(self, trial: Trial, before: list[tuple[float, float]]) -> None:
        state, (epoch, found) = self._trial_state[trial], before[-1]
        state.last_score, state.last_result = found, trial.last_result
        state.last_train_time = state.last_perturbation_time = epoch


def scheduler(config: TuneConfig, space: Space, work: Work) -> TrialScheduler:
    """What ends trials, or moves them; after a kill with what it knew."""
    one: dict[str, Any] = {"time_attr": TIME, "metric": metric(0), "mode": "max"}
    if config.scheduler == "asha":
        return _Asha(
            work,
            **one,
            max_t=config.epochs,
            grace_period=config.grace_epochs,
            reduction_factor=config.reduction,
            stop_last_trials=False,
        )
    if config.scheduler == "median":
        return _Median(work, **one, grace_period=config.grace_epochs)
    if config.scheduler == "pbt":
        random.seed(config.seed)  # Tune's changes come from there,
        np.random.seed(config.seed)  # and from there what it draws anew
        domains = space.variables(config)
        return _Population(
            work,
            **one,
            perturbation_interval=config.grace_epochs,
            hyperparam_mutations={k: list(d.categories) if isinstance(d, Categorical) else d for k, d in domains.items()},
            custom_explore_fn=space.within,
            log_config=False,
        )
    return FIFOScheduler()


def resources(alone: bool, cluster: ClusterConfig, at_once: int, *, turns: bool = False) -> dict[str, float]:
    """What Tune sets aside for a trial: its one worker's share, or for the process that starts its workers a place on the head
    node, which no spot market takes away. With `turns` it is what keeps all but `at_once` waiting; else the searcher does.
    """
    need = session.worker_resources(cluster)
    if not alone:
        # never all of it: Ray Train's own helpers, those of other jobs too, take thousandths, and a training waits for them
        return {"node:__internal_head__": (int(1e4 / (at_once + 1)) + 1) / 1e4 if turns else 0.001}
    if turns and environment.is_own(cluster):
        # of what is free now, or nobody would ever have room
        need["CPU"] = max(need["CPU"], int(1e4 * ray.available_resources().get("CPU", 0) / at_once) / 1e4)
    return need


def trials_at_once(config: TuneConfig, cluster: ClusterConfig, *, alone: bool, streamed: bool = False) -> int:
    """How many trials have room for all of their workers at the same time, so that none waits for what another holds; of those
    that are `streamed` fewer, if else none of the CPUs that are there is left for the tasks that read and shuffle.

    Raises UserError if not even one has. Ray must be connected.
    """
    need, workers = session.worker_resources(cluster), cluster.train_workers
    nodes = of_nodes()
    room = sum(fits(node, need) for node in nodes) // workers
    largest = ray._private.state.state.get_max_resources_from_cluster_config()  # of an autoscaler; None without
    if largest:
        room = max(room, fits(largest, need) // workers)
    if room == 0:
        wanted = " and ".join(f"{amount * workers:g} {name}" for name, amount in need.items())
        there = " and ".join(f"{max(sum(n.get(name, 0) for n in nodes), (largest or {}).get(name, 0)):g} {name}" for name in need)
        raise UserError(
            f"a trial needs {wanted} ({workers} worker{'s' if workers > 1 else ''}), the cluster has {there}; lower "
            "cluster.train_workers, cluster.gpus_per_worker or cluster.threads_per_worker"
        )
    cpus = max(sum(node.get("CPU", 0) for node in nodes), (largest or {}).get("CPU", 0))
    while streamed and room and takes_all([{"CPU": cpus}], room * workers, need):
        room -= 1
    if room == 0:
        raise UserError(
            f"{number_of(workers, 'worker')} of a trial take{'s' if workers == 1 else ''} all {cpus:g} CPUs, and training.loader "
            "stream needs another; lower cluster.threads_per_worker, or give training.loader memory"
        )
    if config.scheduler == "pbt" and config.max_concurrent is not None and not environment.is_own(cluster):
        raise UserError(
            "tune.scheduler pbt lets its population take turns on what the cluster has; leave tune.max_concurrent out"
        )
    if alone and config.max_concurrent is not None and not environment.is_own(cluster):
        return config.max_concurrent  # those that wait are what an autoscaler goes by
    if environment.is_own(cluster) and cluster.gpus_per_worker == 0:
        # a Ray of its own has more logical CPUs than there are cores, for its helpers
        room = min(room, max(1, (os.cpu_count() or 1) // (workers * cluster.threads_per_worker)))
    if not alone:
        room = min(room, MOST_NESTED)
    return min(room, config.max_concurrent or room)
