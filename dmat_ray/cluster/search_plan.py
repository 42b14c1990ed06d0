"""What a search is, checked before anything starts: its space, its yardstick, its folder, and what tells it from others."""

import json
import math
import re
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.tune.search.sample import Categorical

from dmat_ray import cli, suites
from dmat_ray.cluster import spaces
from dmat_ray.cluster.trial import Work
from dmat_ray.config import ClassifierConfig, Config, EvaluationConfig
from dmat_ray.config.base import NAME
from dmat_ray.data import set_reader
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation
from dmat_ray.manifold import generators
from dmat_ray.models.trained_settings import relevant
from dmat_ray.networks import classifiers
from dmat_ray.reports import search_result, trials
from dmat_ray.reports.search_result import SearchResult
from dmat_ray.storage import local_output, set_folder
from dmat_ray.storage.files import read_json, write_json
from dmat_ray.training.trained_models import untrained
from dmat_ray.training.trainer import check_inputs
from dmat_ray.training.yardstick import columns
from dmat_ray.wording import PATTERNS, number_of

SEARCH = "search.json"
FORCED = ("training.patience",)  # what trials are given, whatever was recorded of a search begun before


def search_folder(config: Config) -> Path:
    """Where a search keeps everything but the models it publishes. Raises UserError if its space's file cannot name it."""
    name = config.tune.name or Path(config.tune.space).stem
    if not re.fullmatch(NAME, name):
        raise UserError(f"tune.space '{config.tune.space}' cannot name the search: a name has {PATTERNS[NAME]}; give --tune.name")
    return local_output(config, "jobs/tune.py") / "tune" / name


class Plan:
    """A search that can work. Raises UserError for a space, an objective or a set that do not fit."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config = config.model_copy(update={"output": str(local_output(config, "jobs/tune.py"))})
        self.folder = search_folder(config)
        self.space, self.base = spaces.load(config.tune.space, self.config)
        if not (self.folder / SEARCH).is_file():  # one that was begun before may draw as it did
            self.space.require_drawn_by(config.tune.searcher)
        probe = self._probe = spaces.trial_config(self.base, self.space.constants, "probe", config.tune.epochs)
        if not probe.training.val_examples:
            raise UserError(
                "a search judges trials by held-out images; training.val_examples is 0; give --training.val_examples, how many"
            )
        if config.tune.max_gpu_hours is not None and not config.cluster.gpus_per_worker:
            raise UserError("tune.max_gpu_hours counts GPUs, and cluster.gpus_per_worker is 0; give --max-wall-time")
        if config.tune.scheduler == "pbt" and (odd := [k for k in self.space.names if k.startswith("classifier.")]):
            raise UserError(f"tune.scheduler pbt passes weights on, so all trials need the same network; the space has {odd[0]}")
        how = {name: getattr(config.evaluation, name) for name in ("batch_size", "seed", "precision")}
        judged_by = EvaluationConfig(suites=config.tune.suites, sets=(probe.training.images,), check_examples=0, **how)
        self.judged_by = cli.with_absolute_weights(suites.resolved(judged_by))
        self.columns = columns(self.judged_by)
        trials.require_columns(config.tune.objective, self.columns, config.tune.suites)
        untrained([probe], say)
        manifest = set_reader.read_manifest(set_folder(self.config))
        self._require_corners(manifest)
        for suite in (self.judged_by, *([config.evaluation] if config.tune.evaluate else [])):
            evaluation.require_suite(suite, manifest)
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

    def _require_corners(self, manifest: dict[str, Any]) -> None:
        """Raise UserError for settings, or a network, of the space that cannot be trained on the set."""
        networks: dict[str, ClassifierConfig] = {}
        for corner in self.space.corners(self.base, self.config.tune.epochs):
            try:
                check_inputs(corner, manifest, manifest["generator_sha256"], corner.cluster.train_workers)
            except UserError as error:
                raise UserError(f"tune.space '{self.space.path}' reaches where trials cannot go: {error}") from None
            networks[corner.classifier.fingerprint()] = corner.classifier
        if "classifier.name" in self.space.domains:
            channels, resolution, _ = manifest["shapes"]["on_manifold"]
            classes, workers = len(manifest["class_names"]), self.config.cluster.train_workers
            for one in networks.values():
                classifiers.require_trainable(one, channels, resolution, classes, workers=workers)

    def told(self) -> str:
        """What is drawn, from where to where, and what trials are judged by: a few lines."""
        lines = [f"search: {number_of(self.trials, 'trial')} of {number_of(self.config.tune.epochs, 'epoch')}, each drawn from"]
        lines += [f"  {line}" for line in self.space.told()]
        lines.append(f"judged by {', '.join(self.columns)} of {', '.join(self.config.tune.suites)}")
        return "\n".join([*lines, f"raising {' and '.join(self.config.tune.objective)}"])

    @property
    def trials(self) -> int:
        """How many there will be, unless a budget ends them."""
        if self.config.tune.searcher != "grid":
            return self.config.tune.samples
        edges = [len(found["grid_search"]) for found in self.space.variables(self.config.tune).values()]
        return self.config.tune.samples * math.prod(edges)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the results depend on, by name. Budgets, machines and what is done afterwards may change on the way."""
        probe = self._probe
        names = ["searcher", "grid_points", "scheduler", "objective", "samples", "epochs", "grace_epochs", "reduction", "seed"]
        found = {f"tune.{name}": getattr(self.config.tune, name) for name in names}
        found |= {f"space: {key}": value for key, value in self.space.description().items()}
        found |= {f"yardstick: {row.name}": row.fingerprint() for row in (*self.judged_by.attacks, *self.judged_by.summaries)}
        found |= {**relevant(probe), "training.epochs": self.base["training"]["epochs"]}
        # only where it is not as it was before it counted
        how = {name: getattr(self.judged_by, name) for name in ("seed", "precision")}
        found |= {f"evaluation.{k}": v for k, v in how.items() if v != EvaluationConfig.model_fields[k].default}
        found["trials are of one worker in memory"] = self.work.is_alone
        found["the on-manifold set"] = set_reader.digest(set_reader.read_manifest(set_folder(self.config)))
        found["the generator"] = generators.fingerprint(self.config.generator.path)
        return dict(json.loads(json.dumps(found | self._counted_later)))

    @cached_property
    def _counted_later(self) -> dict[str, Any]:
        """The part of the identity that searches begun by older versions do not know of: those go on as they are now.

        Settings of terms that have a weight in trials alone, and networks of packages.
        """
        drawn, idle = self.space.names, relevant(self._probe)
        found = {k: v for k, v in relevant(self._probe, drawn).items() if k not in idle and k not in drawn}
        networks = self.space.domains.get("classifier.name")
        for name in networks.categories if isinstance(networks, Categorical) else [self._probe.classifier.name]:
            if own := classifiers.origin(name):
                found[f"the network {name}"] = f"{own['entry']} of {own['package']}, {own['sha256'][:12]}"
        return found

    @cached_property
    def id(self) -> str:
        """Names this search among all that were ever made, in this folder, too."""
        path = self.folder / SEARCH
        return str(read_json(path)["id"]) if path.is_file() else uuid.uuid4().hex

    @property
    def afterwards(self) -> dict[str, Any]:
        """What is done once all trials have ended, which may be asked for later."""
        found = {f"tune.{name}": getattr(self.config.tune, name) for name in ("evaluate", "confirm_seeds")}
        return found | ({"evaluation": self.config.evaluation.fingerprint()} if self.config.tune.evaluate else {})

    def is_finished(self, *, resume: bool) -> bool:
        """Whether the search is there and done. Raises UserError for another one that is there, or one that is not to go on."""
        if not (self.folder / SEARCH).is_file():
            return False
        told, now = read_json(self.folder / SEARCH)["identity"], self.identity
        # what it does not say came later, with what was done before as its default
        before = json.loads(json.dumps(relevant(Config()))) | told
        other = "give it another name by --tune.name"
        for name in [*now, *told]:
            if (name in self._counted_later and name not in told) or name in FORCED:
                continue
            if before.get(name, "absent") != now.get(name, "absent"):
                raise UserError(
                    f"the search in '{self.folder}' has {name} = {before.get(name, 'absent')}, now it is "
                    f"{now.get(name, 'absent')}; go on with the old value, or {other}"
                )
        result = search_result.read(self.folder)
        if result is not None and not (resume and self.left_of(result)):
            return True
        if not resume:
            raise UserError(f"there is an unfinished search in '{self.folder}'; --resume goes on with it, or {other}")
        return False

    def left_of(self, result: SearchResult) -> str:
        """What a search with this result has not done yet; empty if all is done."""
        if result.ended_by:
            return f"ended early, since {result.ended_by} was used up"
        new = [name for name, value in self.afterwards.items() if result.afterwards.get(name) != value]
        return f"did another {' and '.join(new)}" if new else ""

    def begin(self) -> None:
        """Say in the folder what it is for; what it gave before is no longer all that it gives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SEARCH, {"id": self.id, "identity": self.identity})
        (self.folder / search_result.FILE).unlink(missing_ok=True)
