"""After a search: its best models published, judged on test images, trained anew with other seeds, registered and shown."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.search import BasicVariantGenerator

from dmat_ray.cluster import evaluate, searchers, spaces, tracking, trial_runs
from dmat_ray.cluster.outbox import FRONT
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.cluster.trial import Work, keep_newest, state_of
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation.metrics import Results
from dmat_ray.reports import search_result, terminal, trials, trials_page
from dmat_ray.reports.search_result import Scores, SearchResult
from dmat_ray.reports.trials import Trial
from dmat_ray.storage import Location, at, set_folder
from dmat_ray.storage.lease import Lease
from dmat_ray.training import trained_models
from dmat_ray.wording import number_of

PAGE = "report.html"
CHAMPION = "champion"  # alias of the best model in MLflow's registry
MOST = 8  # models that a search publishes


def crown(
    search: Plan,
    found: Sequence[Trial],
    runs: Mapping[str, tracking.Run],
    parent: tracking.Run,
    say: Callable[[str], None],
    ended_by: str,
    lease: Lease,
) -> SearchResult:
    """Find the best trial and its neighbours on the Pareto front, and do for them what is done once.

    Raises UserError if no trial gave a result, and if another run has taken over the search's folder, whose `lease` this is.
    """
    config, objectives = search.config, search.config.tune.objective
    best = next(iter(trials.ranked(found, objectives)), None)
    if best is None:
        errors = [trial.error or "divergence" for trial in found if trial.error or trial.status == "diverged"]
        why = f"; the first failed of: {errors[0]}" if errors else ""
        if ended_by:
            why += f"; {ended_by} was used up before: --resume with a larger one goes on"
        raise UserError(f"none of {number_of(len(found), 'trial')} gave a result{why}")
    front = trials.front(found, search.axes)
    chosen = [best, *trials.spread([trial for trial in front if trial.name != best.name], MOST - 1, search.axes[0])]
    values = ", ".join(f"{o} {100 * trials.value(o, best.scores):.1f} %" for o in objectives)
    say(f"best is {best.name}: {values} on held-out images; {len(front)} on the front of {' and '.join(search.axes)}")
    if left := len({best.name, *(trial.name for trial in front)}) - len(chosen):
        say(f"publishing {len(chosen)} of these, spread along the front; {left} more stay trials")
    lease.check()
    folders = {trial.name: _publish(search.work, trial.name, config) for trial in chosen}
    seeds: dict[str, dict[str, Config]] = {}
    if config.tune.confirm_seeds and ended_by:
        say(f"not training anew with other seeds (tune.confirm_seeds): {ended_by} is used up")
    elif config.tune.confirm_seeds:
        seeds = _retrain(search, best, say, lease)
    folders |= {name: trained_models.model_folder(one) for kind in seeds.values() for name, one in kind.items()}
    tested = _judge(config, search.judged_by, folders, search.folder / "yardstick", say, lease)
    evaluated = {}
    if config.tune.evaluate:
        evaluated = _judge(config, config.evaluation, folders, search.folder / "evaluation", say, lease, warn=True)
    result = SearchResult(
        search.folder.name,
        list(objectives),
        list(search.axes),
        list(search.columns),
        config.tune.epochs,
        list(found),
        best.name,
        [trial.name for trial in front],
        {model: {c.split("/", 1)[1]: v for c, v in scores.items()} for model, scores in tested.items()},
        evaluated,
        {kind: list(named) for kind, named in seeds.items()},
        ended_by,
        search.afterwards,
    )
    lease.check()
    page = trials_page.write(search.folder / PAGE, result, config)
    _track(search, result, folders, runs, parent, page)
    search_result.write(search.folder, result)
    if not ended_by:
        for trial in found:
            keep_newest(search.work.trial_folder(trial.name))
    return result


def _publish(work: Work, name: str, config: Config) -> Location:
    state = state_of(work.trial_folder(name))
    assert state is not None, f"{name} has scores, so it had a checkpoint"
    folder = trained_models.model_folder(config.model_copy(update={"name": name}))
    trained_models.publish(state["folder"], folder)
    return folder


def _judge(
    config: Config,
    suite: EvaluationConfig,
    folders: Mapping[str, Location],
    where: Path,
    say: Callable[[str], None],
    lease: Lease,
    *,
    warn: bool = False,
) -> Scores:
    """Model -> "set/column" -> accuracy on test images; to `warn` is to say what the checks warn of."""
    whole = config.model_copy(update={"evaluation": suite})
    evaluate.check(whole, set_folder(config), folders)
    rows, findings = evaluate.evaluate(evaluate.Work(whole, set_folder(config), folders, at(where)), say, lease)
    for line in terminal.warnings(findings) if warn else ():
        say(line)
    found: Scores = {}
    for (model, set_name, column), accuracy in Results(rows, suite).accuracies().items():
        found.setdefault(model, {})[f"{set_name}/{column}"] = accuracy.value
    return found


def anew(search: Plan, best: Trial) -> dict[str, dict[str, Config]]:
    """The best settings and those the search began from, each by name with several seeds other than theirs, for all of
    training.epochs.
    """
    config, epochs = search.config, search.base["training"]["epochs"]
    found = spaces.stretched({**search.space.constants, **best.knobs}, epochs / config.tune.epochs)
    settings = {"best": found, "start": {}}
    made: dict[str, dict[str, Config]] = {}
    # by the search's own seed the best of its trials were found
    others = (seed for seed in itertools.count(1) if seed != search.base["training"]["seed"])
    seeds = list(itertools.islice(others, config.tune.confirm_seeds))
    for kind, given in settings.items():
        for seed in seeds:
            name = f"{search.folder.name}_{kind}_seed{seed}"
            one = spaces.trial_config(search.base, {**given, "training.seed": seed}, name, epochs)
            made.setdefault(kind, {})[name] = one
    return made


def _retrain(search: Plan, best: Trial, say: Callable[[str], None], lease: Lease) -> dict[str, dict[str, Config]]:
    """Train `anew`, and publish."""
    config, epochs, made = search.config, search.base["training"]["epochs"], anew(search, best)
    every = {name: one for kind in made.values() for name, one in kind.items()}
    size = f"{number_of(config.tune.confirm_seeds, 'seed')}, {number_of(epochs, 'epoch')} each"
    say(f"training the best settings and those of the start anew: {size}")
    work = search.work.of_models({name: one.to_json() for name, one in every.items()})
    streamed = config.training.loader == "stream"
    at_once = searchers.trials_at_once(config.tune, config.cluster, alone=work.is_alone, streamed=streamed)
    results = trial_runs.fit(
        work,
        search.folder / "ray_confirm",
        searchers.resources(work.is_alone, config.cluster, at_once),
        lease,
        config.tune.retries,
        {"model": ray.tune.grid_search(list(every))},
        search_alg=BasicVariantGenerator(max_concurrent=at_once),
        trial_name_creator=_named_by_model,
    )
    for error in results.errors:
        say(f"warning: a training with another seed failed: {str(error).strip().splitlines()[-1]}")
    whole = [name for name in every if (state_of(work.trial_folder(name)) or {}).get("finished")]
    # seed by seed: one that failed, or diverged, in one of the two is left out of both
    pairs = [pair for pair in zip(*made.values(), strict=True) if all(name in whole for name in pair)]
    if len(pairs) < config.tune.confirm_seeds:
        say(f"warning: of {config.tune.confirm_seeds} seeds {len(pairs)} could be trained to their end with both settings")
    lease.check()
    for name in (name for pair in pairs for name in pair):
        _publish(work, name, config)
    return {kind: {pair[k]: every[pair[k]] for pair in pairs} for k, kind in enumerate(made)} if pairs else {}


def _named_by_model(trial: Any) -> str:
    return str(trial.config["model"])


def _track(
    search: Plan,
    found: SearchResult,
    folders: Mapping[str, Location],
    runs: Mapping[str, tracking.Run],
    parent: tracking.Run,
    page: Path,
) -> None:
    """Final numbers to the trials' runs, models into the registry, the page to the search's run."""
    registered = "".join(c if c.isalnum() or c in "-_. " else "_" for c in f"{search.config.tracking.experiment} {found.name}")
    for trial in found.trials:
        runs[trial.name].tag(FRONT, str(trial.name in found.front).lower())
        runs[trial.name].tag("champion", str(trial.name == found.best).lower())
    chosen = [found.best, *(n for n in found.front if n in folders and n != found.best)]
    for name in chosen:
        trial, one = found.trial(name), runs[name]
        numbers = {f"test/yardstick/{k}": v for k, v in found.tested[name].items()}
        numbers |= {f"test/{k}": v for k, v in found.evaluated.get(name, {}).items()}
        one.metrics(numbers, step=trial.epochs)
        one.artifact(folders[name], "checkpoint")
        tags = {f"objective {o}": f"{trials.value(o, trial.scores):.4f}" for o in found.objective}
        tags |= {FRONT: str(name in found.front).lower(), "axes": json.dumps(found.axes), "trial": name}
        is_best = name == found.best
        among = [runs[n] for n in chosen] if is_best else []
        one.register(registered, "checkpoint", [CHAMPION] if is_best else [], tags, among)
    parent.tag("best_trial", found.best)
    best = found.trial(found.best)
    parent.metrics({f"best/{o}": trials.value(o, best.scores) for o in found.objective}, step=0)
    parent.metrics({f"best/test/{o}": trials.value(o, found.tested[found.best]) for o in found.objective}, step=0)
    parent.artifact(page)
