"""Training on Ray Train: DDP workers, checkpoints that survive, one or several runs in one worker group."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dmat_ray.cluster import environment, gauges, session, tracking, workers
from dmat_ray.cluster.context import RayContext, StoppedError
from dmat_ray.cluster.events import heed_stop, is_stopping, listen, no_retry_of_user_errors
from dmat_ray.cluster.ingest import Streamed
from dmat_ray.cluster.leftovers import GROUP, Leftover, discard, left_by_others
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data import manifold_set
from dmat_ray.data.epochs import EpochSource
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.storage import Location, at, set_folder
from dmat_ray.storage.files import text_digest
from dmat_ray.storage.folders import remove_folder
from dmat_ray.storage.lease import Lease, all_sole
from dmat_ray.training.trained_models import is_trained, model_folder, publish, set_digest, tell_of_older
from dmat_ray.training.trainer import describe, train
from dmat_ray.wording import number_of


class _NamedContext(RayContext):
    """Goes on from what has come furthest: the group's checkpoints that belong to this run, or those `left` by other groups."""

    def __init__(self, name: str, mailbox: str, left: Sequence[str], *, wait: bool) -> None:
        super().__init__(name, mailbox, wait=wait)
        self._left = left

    def checkpoints(self) -> Sequence[str]:
        """See RunContext. Those of the group in their order, each of the others before the first that has not come so far."""
        found = list(self._of_group())
        reached = [_reached(folder) for folder in found] if self._left else []
        for folder in self._left:
            here = _reached(folder)
            place = next((i for i, other in enumerate(reached) if other < here), len(found))
            found.insert(place, folder)
            reached.insert(place, here)
        return found

    def _of_group(self) -> Sequence[str]:
        found = super().checkpoints()
        names = [_run_name(folder) for folder in found]
        if self._name not in names:
            # damaged ones may be of this run only if none is known to be another's
            return [] if any(names) else found
        last = len(names) - names[::-1].index(self._name)
        return [folder for folder, name in zip(found[:last], names[:last], strict=True) if name in (self._name, None)]


def _run(folder: str) -> dict[str, Any] | None:
    """run.json of a checkpoint; None of one that is damaged."""
    try:
        return checkpoint.read_run(folder)
    except UserError:
        return None


def _run_name(folder: str) -> str | None:
    """Whose a checkpoint is; None for one that is damaged."""
    run = _run(folder)
    return None if run is None else str(run["config"]["name"])


def _reached(folder: str) -> tuple[float, float]:
    """The epochs that a checkpoint has behind it, and the steps of the next; a damaged one, which is told, is before all."""
    run = _run(folder)
    return (math.inf, 0) if run is None else (run["epoch"], run["step"])


def worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs: the runs of `settings`, one after the other, from the latest checkpoint on."""
    with no_retry_of_user_errors(settings["mailbox"]) as go, contextlib.suppress(StoppedError):
        if go:
            _train(settings)


def _train(settings: dict[str, Any]) -> None:
    configs = [Config.model_validate(c) for c in settings["configs"]]
    names = [c.name for c in configs]
    context = RayContext("", settings["mailbox"])
    # a shared disk may be late in showing a worker the newest, and it would begin with another run than the others
    current = context.of_rank_zero(next(filter(None, map(_run_name, context.checkpoints())), None))
    if current in names:  # else it is finished in another group
        # the runs before it are finished: they come in order
        configs = configs[names.index(current) :]
    torch.set_num_threads(configs[0].cluster.threads_per_worker)
    loader = configs[0].training.loader
    # a suite that judges the held-out examples may look at both kinds of images
    kinds = {c.training.images for c in configs}
    images = next(iter(kinds)) if len(kinds) == 1 and "judged_by" not in settings else None
    data = manifold_set.open_set(settings["set"], "train", images=images) if loader == "memory" else None
    for config in configs:
        # a trial's epoch is told with its checkpoint, which another trial may go on from
        left = settings.get("left", {}).get(config.name, ())
        context = _NamedContext(config.name, settings["mailbox"], left, wait="judged_by" in settings)
        generator = generators.load_configured(config.generator, context.device)
        source: manifold_set.ManifoldSet | EpochSource | None = data
        if source is None:
            stopping = functools.partial(is_stopping, settings["mailbox"])
            source = Streamed(settings["set"], config.training, config.cluster, context.say, stopping)
        judged_by, branch_from = settings.get("judged_by"), settings.get("branch_from")
        train(
            config,
            source,
            generator,
            generators.fingerprint(config.generator.path),
            context,
            judged_by=None if judged_by is None else EvaluationConfig.model_validate(judged_by),
            branch_from=branch_from,
        )


def train_models(todo: list[Config], say: Callable[[str], None], parent: tracking.Run | None = None) -> None:
    """Train models that `untrained` returned. Ray must be connected.

    All runs share one worker group, one after the other: its start-up is paid once. A rerun after a crash goes on from the
    furthest checkpoint, whichever models are or were trained beside it; what a training that fails has finished is published.
    Asked to stop (SIGTERM, Ctrl-C) it has a checkpoint written, and raises SystemExit. Raises UserError if another job trains one
    of them.
    """
    folder = training_folder(todo)
    # the same job may have been submitted twice, and another may train one of these models, alone or beside others
    with all_sole(folder.parent, [folder.name, *(f"{config.name}-{_key(config)}" for config in todo)]) as leases:
        rest = [config for config in todo if not is_trained(config)]
        if len(rest) == len(todo):
            return _train_models(todo, folder, leases, say, parent)
        trained = [config.name for config in todo if config not in rest] if rest else ["this"]
        say(f"another job has meanwhile trained {', '.join(trained)}")
        if not rest:
            remove_folder(folder)  # as it would have, had it not been killed when it had published this
            return None
    return train_models(rest, say, parent)


def _train_models(
    todo: list[Config], folder: Location, leases: list[Lease], say: Callable[[str], None], parent: tracking.Run | None
) -> None:
    """Under the `leases` of the group's folder and of its models."""
    for config in todo:
        tell_of_older(config, say)
    set_path, first, epochs = set_folder(todo[0]), todo[0], {c.name: c.training.epochs for c in todo}
    with contextlib.ExitStack() as stack:
        leftovers = list(left_by_others(todo, folder))
        final = {c.name: _first(found.final(c) for found in leftovers) for c in todo}
        configs = [c for c in todo if final[c.name] is None]
        manifest = read_manifest(set_path)
        runs = {}
        for config in todo:
            recorded = trained_settings.of_set(config, manifest)
            runs[config.name] = stack.enter_context(tracking.tracked(recorded, config.name, "train", parent, of=_key(config)))

        told: dict[str, int] = {}  # the last epoch that MLflow was told, by a model's name

        def require_held() -> None:
            for lease in leases:
                lease.check()

        def handle(event: dict[str, Any]) -> None:
            if "text" in event:
                say(event["text"])
                return
            metrics, name = event["metrics"], event["run"]
            if metrics["epoch"] > told.get(name, 0):  # else workers that were started anew have trained it again
                told[name] = int(metrics["epoch"])
                runs[name].metrics({**metrics, **event["machine"]}, step=told[name])
            gauges.training(name, metrics, event["machine"])
            say(describe(name, metrics, epochs[name]))

        def publish_finished() -> None:
            require_held()
            trained = Leftover(folder)
            for config in todo:
                final[config.name] = final[config.name] or trained.final(config)
                if (found := final[config.name]) is not None:
                    publish(found, model_folder(config))
                    runs[config.name].done = True
                    runs[config.name].artifact(model_folder(config), "checkpoint")

        asked = stack.enter_context(heed_stop())
        for lease in leases:
            lease.when_lost(asked.set)  # the other goes on with this
        mailbox = stack.enter_context(listen(handle, asked))
        if configs:
            count = environment.worker_count(first.cluster)
            least, most = (count, count) if isinstance(count, int) else count
            streamed = most if first.training.loader == "stream" else 0
            session.await_machines(first.cluster, say, least, streamed=streamed)
            say(f"starting {number_of(most, 'worker', least)} to train {', '.join(c.name for c in configs)}")
            for c in configs:  # what a killed driver could not send any more; what the server has is not sent again
                for metrics in max((found.history(c) for found in (Leftover(folder), *leftovers)), key=len):
                    told[c.name] = int(metrics["epoch"])
                    runs[c.name].metrics(metrics, step=told[c.name])
            left = {c.name: [str(place) for found in leftovers for place in found.of(c)] for c in configs}
            settings = {"configs": [c.to_json() for c in configs], "set": str(set_path), "mailbox": mailbox, "left": left}
            keep = 2 if len(todo) == 1 else None
            try:
                workers.fit(worker, settings, first.cluster, folder, say, keep=keep, elastic=True)
            except Exception:
                publish_finished()
                raise
        require_held()
        if asked.is_set() and any(Leftover(folder).final(c) is None for c in configs):
            publish_finished()  # of several models some may be done
            if done := [name for name, place in final.items() if place is not None]:
                say(f"finished and stored: {', '.join(done)}")
            say("stopped; the same command goes on from the checkpoint")
            return  # which is where the signal takes effect
        publish_finished()
        if missing := [name for name, found in final.items() if found is None]:
            raise RuntimeError(f"Ray Train finished, but '{folder}' holds no final checkpoint of {', '.join(missing)}")
        remove_folder(folder)
        for found in leftovers:
            discard(found.folder, first.output)


def training_folder(todo: list[Config]) -> Location:
    """Where Ray Train keeps what these models' training has come to, until it is finished."""
    label = todo[0].name if len(todo) == 1 else f"{len(todo)}_{GROUP}"
    key = text_digest(" ".join(_key(config) for config in todo))[:12]
    return at(todo[0].output) / "train" / f"{label}-{key}"


def _key(config: Config) -> str:
    """Changes with whatever changes the trained weights."""
    text = json.dumps([trained_settings.relevant(config), config.name, set_digest(config)], sort_keys=True)
    return text_digest(text)[:8]


def _first(found: Iterable[Location | None]) -> Location | None:
    return next((place for place in found if place is not None), None)
