"""What a search is, checked before anything starts: its space, its yardstick, its folder, and what tells it from others."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from dmat_ray import suites, trials
from dmat_ray.checkpoint import relevant
from dmat_ray.cluster import spaces
from dmat_ray.cluster.trial import Work
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data import set_reader
from dmat_ray.errors import UserError
from dmat_ray.files import read_json, text_digest, write_json
from dmat_ray.manifold import generators
from dmat_ray.models import untrained
from dmat_ray.storage import set_folder
from dmat_ray.yardstick import columns

SEARCH, RESULT = "search.json", "result.json"


def search_folder(config: Config) -> Path:
    """Where a search keeps everything but the models it publishes."""
    return Path(config.output).resolve() / "tune" / (config.tune.name or Path(config.tune.space).stem)


class Plan:
    """A search that can work. Raises UserError for a space, an objective or a set that do not fit."""

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
        names = ["searcher", "grid_points", "scheduler", "objective", "samples", "epochs", "grace_epochs", "reduction", "seed"]
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
        result = self.folder / RESULT
        if result.is_file() and (not read_json(result)["ended_by"] or not resume):
            return True
        if not resume:
            raise UserError(f"there is an unfinished search in '{self.folder}'; --resume goes on with it, or {other}")
        return False

    def begin(self) -> None:
        """Say in the folder what it is for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SEARCH, self.identity)
