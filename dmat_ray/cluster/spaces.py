"""Search spaces: a Python file whose SPACE maps dotted settings to domains of ray.tune, or several of them to a simplex.

    from ray import tune
    from dmat_ray.cluster.spaces import simplex, times

    PRESET = "dmat"
    SPACE = {
        "objective.image.eps": tune.uniform(0.05, 0.15),
        "objective.latent.eps": times(0.5, 2),
        ("objective.image.weight", "objective.latent.weight"): simplex(),
        "objective.image.step_size": None,
    }

times() is relative to what the setting is without the search, so that one space serves digits and photographs. What is no domain
is a constant. Every bound is tried against the settings before anything starts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray.tune
from ray.tune.search.sample import Domain, Float, Integer

from dmat_ray import cli, presets
from dmat_ray.cluster import search_domains
from dmat_ray.cluster.search_domains import Simplex, Times, simplex, times
from dmat_ray.config import Config, TuneConfig
from dmat_ray.errors import UserError
from dmat_ray.validated import validate

__all__ = ["Space", "load", "simplex", "stretched", "times", "trial_config"]

SECTIONS = ("objective", "classifier", "training")
# what all trials must share to be compared, or what a trial is given
FIXED = {
    "training.epochs": "tune.epochs says how long a trial is",
    "training.val_examples": "all trials are judged by the same held-out images",
    "training.seed": "all trials are judged by the same held-out images",
    "training.loader": "it does not change what is trained",
    "training.keep": "a trial is what it is after its last epoch",
    "training.patience": "tune.scheduler says which trials end early",
    "training.checkpoint_every": "a trial may end after any epoch",
    "training.checkpoint_minutes": "a trial may end after any epoch",
}


@dataclass(frozen=True)
class Space:
    """What is drawn. A sample maps variables to values: settings themselves, or of a simplex all but one of its shares.

    `relative` are the settings whose domains are multiples of what they are without the search.
    """

    path: str
    presets: tuple[str, ...]
    domains: Mapping[str, Domain]
    simplexes: Mapping[tuple[str, ...], Simplex]
    constants: Mapping[str, Any]
    relative: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """The settings that are drawn."""
        return [*self.domains, *(key for keys in self.simplexes for key in keys)]

    def variables(self, config: TuneConfig) -> dict[str, Any]:
        """What Ray Tune draws from."""
        if config.searcher == "grid":
            values = {key: search_domains.grid(domain, config.grid_points) for key, domain in self.domains.items()}
            values |= {", ".join(keys): search_domains.lattice(keys, s, config.grid_points) for keys, s in self.simplexes.items()}
            return {name: ray.tune.grid_search(found) for name, found in values.items()}
        shares = {search_domains.share(key): ray.tune.uniform(0.0, 1.0) for keys in self.simplexes for key in keys[:-1]}
        return {**self.domains, **shares}

    def require_drawn_by(self, searcher: str) -> None:
        """Raise UserError for a domain that the searcher does not draw from as it is told: Optuna's ignore some steps."""
        odd = [key for key, domain in self.domains.items() if search_domains.is_stepped_log(domain)]
        if odd and searcher in ("tpe", "nsga2"):
            raise UserError(
                f"tune.space '{self.path}': tune.searcher {searcher} cannot draw {odd[0]}, multiples of a step on a logarithmic "
                "scale; give --tune.searcher random, or list the values by tune.choice"
            )

    def within(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A sample whose numbers have been changed (by population based training), back inside its domains."""
        found = dict(sample)
        for name, value in sample.items():
            domain = self.domains.get(name, ray.tune.uniform(0.0, 1.0) if name.startswith(search_domains.share("")) else None)
            if isinstance(domain, Float | Integer) and isinstance(value, int | float):
                low, high = search_domains.ends(name, domain)
                found[name] = type(low)(min(max(search_domains.on_step(domain, value), low), high))
        return found

    def knobs(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a sample stands for, by dotted name, without the constants."""
        found = {name: search_domains.python(value) for name, value in sample.items() if name in self.domains}
        for keys, domain in self.simplexes.items():
            whole = sample.get(", ".join(keys))
            weights = whole if whole is not None else search_domains.broken(keys, domain, sample)
            found |= dict(zip(keys, map(float, weights), strict=True))
        return found

    def settings(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a trial that differ from the base, by dotted name."""
        return {**self.constants, **self.knobs(sample)}

    def description(self) -> dict[str, Any]:
        """Plain JSON values that differ for spaces that differ."""
        drawn = {key: search_domains.described(domain) for key, domain in self.domains.items()}
        shared = {", ".join(keys): f"simplex {s.total:g} {s.least:g}" for keys, s in self.simplexes.items()}
        return {"presets": list(self.presets), **drawn, **shared, **{k: repr(v) for k, v in self.constants.items()}}

    def told(self) -> list[str]:
        """What is drawn and what is set, in words: a line a setting."""
        drawn = [f"{key}: {search_domains.told(domain)}" for key, domain in self.domains.items()]
        shared = [
            f"{', '.join(keys)}: shares that sum to {s.total:g}, each {f'{s.least:g} or more' if s.least else 'from 0'}"
            for keys, s in self.simplexes.items()
        ]
        presets = [f"presets: {', '.join(self.presets)}"] if self.presets else []
        return [*presets, *drawn, *shared, *(f"{key}: {value}, in all trials" for key, value in self.constants.items())]

    def corners(self, base: Mapping[str, Any], epochs: int) -> Iterator[Config]:
        """Trials at both ends of every domain, at every choice and at every corner of a simplex, the others at their first.

        Raises UserError for a domain that reaches beyond what its setting allows.
        """
        first = {name: search_domains.ends(name, domain)[0] for name, domain in self.domains.items()}
        middle = {search_domains.share(key): 0.5 for keys in self.simplexes for key in keys[:-1]}
        start = self.settings({**first, **middle})
        tried: list[dict[str, Any]] = [{}]
        tried += [{name: value} for name, domain in self.domains.items() for value in search_domains.ends(name, domain)]
        for keys, domain in self.simplexes.items():
            high = domain.total - (len(keys) - 1) * domain.least
            tried += [{key: high if key == chosen else domain.least for key in keys} for chosen in keys]
        for changed in tried:
            try:
                whole = {**start, **changed}
                # a multiple of the radius before the search is one in the norm and scale of then
                presets.require_own_eps(base, _nested({k: v for k, v in whole.items() if k not in self.relative}))
                yield trial_config(base, whole, "probe", epochs)
            except UserError as error:
                where = (
                    ", ".join(f"{key} = {search_domains.python(value)}" for key, value in changed.items())
                    or "all settings at their first"
                )
                raise UserError(f"tune.space '{self.path}' reaches where trials cannot go, with {where}: {error}") from None


COUNTED_IN_EPOCHS: dict[str, Callable[[Any, float], Any]] = {
    "lr_epochs": lambda value, share: [k * share for k in value],
    "lr_warmup": lambda value, share: value * share,
    "awp_warmup": lambda value, share: int(value * share),
}
"""Settings of training -> the same in a training of `share` times the epochs."""


def stretched(settings: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A trial's settings (by dotted name) for a training of `share` times its epochs: a schedule keeps its share of the whole."""
    how = {f"training.{key}": scale for key, scale in COUNTED_IN_EPOCHS.items()}
    return {key: how[key](value, share) if key in how else value for key, value in settings.items()}


def trial_config(base: Mapping[str, Any], settings: Mapping[str, Any], name: str, epochs: int) -> Config:
    """The base with a trial's settings (by dotted name); raises UserError for keys and values that do not fit."""
    old = base["training"]
    # the whole schedule in the trial's few epochs: a trial must not be judged in the middle of its highest rates
    share = epochs / old["epochs"]
    shorter = {
        **{key: scale(old[key], share) for key, scale in COUNTED_IN_EPOCHS.items()},
        # what is judged, passed on and published is what a trial is after an epoch, whichever is its last
        **{"keep": "last", "patience": None, "checkpoint_every": 1, "checkpoint_minutes": None},
    }
    layered = presets.merge(dict(base), {"name": name, "training": shorter})
    return validate(presets.merge(layered, _nested({**settings, "training.epochs": epochs})))


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name as a layer of them."""
    layer: dict[str, Any] = {}
    for key, value in settings.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layer = presets.merge(layer, nested)
    return layer


def load(path: str, config: Config) -> tuple[Space, dict[str, Any]]:
    """The space of a file, and the nested settings that its trials start from: the job's under the space's presets.

    Raises UserError for a file that is missing, fails, does not have the form above, or reaches beyond what a setting allows.
    """
    module = _imported(path)
    given = getattr(module, "SPACE", None)
    if not isinstance(given, dict) or not given:
        raise UserError(f"tune.space '{path}' does not define SPACE, a mapping from dotted settings to domains; see tune_spaces/")
    layers = getattr(module, "PRESET", ())
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    below = presets.load(list(layers))
    if odd := [name for name in below if name not in SECTIONS]:
        raise UserError(
            f"tune.space '{path}': preset {', '.join(layers)} sets {odd[0]}, which a space cannot; give it with --preset"
        )
    try:
        presets.require_own_eps(config.to_json(), below)
    except UserError as error:
        raise UserError(f"tune.space '{path}', preset {', '.join(layers)}: {error}") from None
    base = validate(presets.merge(config.to_json(), below)).to_json()
    domains, simplexes, constants, relative = {}, {}, {}, set()
    for key, domain in given.items():
        keys = key if isinstance(key, tuple) else (key,)
        for name in keys:
            _require_searchable(path, name)
        if isinstance(domain, Simplex) != isinstance(key, tuple):
            raise UserError(f"tune.space '{path}': {key!r}: a tuple of settings takes simplex(), a single one another domain")
        if isinstance(domain, Simplex):
            if len(keys) < 2 or domain.least < 0 or domain.total <= len(keys) * domain.least:
                raise UserError(f"tune.space '{path}': {key!r}: a simplex has two settings or more, and total above their least")
            simplexes[key] = domain
        elif isinstance(domain, dict) and set(domain) == {"grid_search"}:
            domains[key] = ray.tune.choice(list(domain["grid_search"]))
        elif isinstance(domain, Times):
            domains[key] = _relative(path, key, domain, base)
            relative.add(key)
        elif isinstance(domain, Domain):
            domains[key] = domain
            search_domains.ends(key, domain)
        elif isinstance(domain, dict) or callable(domain):
            raise UserError(f"tune.space '{path}': {key} is given {domain!r}, which is no domain of ray.tune and no constant")
        else:
            constants[key] = domain
    names = [name for key in given for name in (key if isinstance(key, tuple) else (key,))]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"tune.space '{path}' gives {twice[0]} twice")
    if not domains and not simplexes:
        lists = [f"; of the list for {key}, tune.choice() draws" for key, value in constants.items() if isinstance(value, list)]
        raise UserError(f"tune.space '{path}' has constants only: there is nothing to search{''.join(lists[:1])}")
    space = Space(path, layers, domains, simplexes, constants, frozenset(relative))
    corners = list(space.corners(base, config.tune.epochs))
    schedules = sorted({one.training.schedule for one in corners})
    for key, of in cli.OF_SCHEDULES.items():
        if key in domains and not set(of) & set(schedules):
            raise UserError(
                f"tune.space '{path}': {key} means nothing for training.schedule {' and '.join(schedules)}; "
                f'add "training.schedule": "{of[0]}" to the space'
            )
    return space, base


def _imported(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"tune.space '{path}' is no file; see tune_spaces/ for examples")
    module = ModuleType("tune_space")
    module.__file__ = path
    try:
        # not imported: byte code in a cache, which Python tells apart by whole seconds, could be that of what it held before
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except Exception as error:  # whatever a file of the user's may raise
        raise UserError(f"tune.space '{path}' cannot be read: {type(error).__name__}: {error}") from error
    return module


def _require_searchable(path: str, key: Any) -> None:
    if not isinstance(key, str) or key.split(".")[0] not in SECTIONS:
        raise UserError(
            f"tune.space '{path}': {key!r} cannot be searched; settings under {', '.join(SECTIONS)} can, since trials share "
            "the set, the generator and the machines"
        )
    if key in FIXED:
        raise UserError(f"tune.space '{path}': {key} cannot be searched: {FIXED[key]}")


def _relative(path: str, key: str, domain: Times, base: Mapping[str, Any]) -> Domain:
    value: Any = base
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(
                f"tune.space '{path}': there is no setting {key} before the search, to which times() is relative; correct the "
                "name, or give the setting in a preset"
            )
        value = value[part]
    if isinstance(value, int):
        raise UserError(f"tune.space '{path}': {key} is a whole number; times() is for others, tune.randint(low, high) for these")
    if not isinstance(value, float) or value <= 0 or not 0 < domain.low < domain.high:
        raise UserError(
            f"tune.space '{path}': {key} is {value!r} before the search; times(low, high) needs a number above 0 there"
        )
    return ray.tune.loguniform(value * domain.low, value * domain.high)
