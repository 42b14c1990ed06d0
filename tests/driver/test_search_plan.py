"""Searches without a Ray: what is drawn, what is refused before one starts, what trials of one that goes on are given."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray import presets, settings
from dmat_ray.cluster import abandoned, champion, holding, search_domains, searchers, spaces, trial_runs, trial_watch
from dmat_ray.cluster.search_plan import Plan
from dmat_ray.config import Config, TuneConfig
from dmat_ray.errors import UserError
from dmat_ray.reports.trials import Trial
from dmat_ray.reports.trials_table import LiveTable
from dmat_ray.validated import validate

pytestmark = pytest.mark.slow
KEY = "training.weight_decay"
DOMAINS = {
    "uniform": tune.uniform(0.5, 2),
    "quniform": tune.quniform(0.5, 2, 0.25),
    "loguniform": tune.loguniform(1e-4, 1e-2),
    "qloguniform": tune.qloguniform(1e-4, 1e-2, 1e-4),
    "randint": tune.randint(1, 5),
    "qrandint": tune.qrandint(32, 256, 32),
    "lograndint": tune.lograndint(1, 9),
    "qlograndint": tune.qlograndint(32, 256, 32),
    "choice": tune.choice([1, 3, 10]),
}


def drawn(domain: tune.search.sample.Domain, searcher: str, count: int) -> list[float]:
    """As Ray Tune's searcher suggests them."""
    config = TuneConfig(searcher=searcher, scheduler="none", num_samples=count)
    if searcher == "random":
        return [domain.sample() for _ in range(count)]
    optuna = searchers.searcher(config, count).searcher
    assert optuna.set_search_properties("objective_0", "max", {KEY: domain})
    return [optuna.suggest(str(number))[KEY] for number in range(count)]


@pytest.mark.parametrize("searcher", ["random", "tpe", "nsga2"])
@pytest.mark.parametrize("kind", DOMAINS)
def test_what_is_drawn_is_what_is_told_or_refused(kind, searcher):
    domain = DOMAINS[kind]
    space = spaces.Space("space.py", (), {KEY: domain}, {}, {})
    if kind.startswith("qlog") and searcher != "random":
        with pytest.raises(UserError, match=f"tune.searcher {searcher} cannot draw {KEY}, multiples of a step on a logarithmic"):
            space.require_drawn_by(searcher)
        return
    space.require_drawn_by(searcher)
    found, ends = drawn(domain, searcher, 30), search_domains.ends(KEY, domain)
    if kind == "choice":
        assert set(found) <= set(ends)
        return
    assert ends[0] <= min(found) <= max(found) <= ends[1]
    assert found == pytest.approx([search_domains.on_step(domain, value) for value in found])
    assert len(set(found)) > 1


def searching(folder: Path, name: str, space: str) -> Config:
    path = folder / name
    path.write_text(f"from ray import tune\nSPACE = {{{space}}}\n")
    return settings("demo", "dmat", output=str(folder), tune={"space": str(path)})


def test_a_space_that_the_searcher_cannot_draw_is_refused_first(tmp_path):
    config = searching(tmp_path, "steps.py", f'"{KEY}": tune.qloguniform(1e-4, 1e-2, 1e-4)')
    with pytest.raises(UserError, match=r"steps\.py': tune\.searcher tpe cannot draw .*; give --tune\.searcher random, or list"):
        Plan(config, print)
    (tmp_path / "tune" / "steps").mkdir(parents=True)
    (tmp_path / "tune" / "steps" / "search.json").write_text("{}")
    with pytest.raises(UserError, match="there is no on-manifold set"):  # one that was begun before goes on as it drew
        Plan(config, print)


@pytest.mark.parametrize("name", ["my space (1).py", "_draft.py", ".py", "Bäume.py"])
def test_a_file_whose_name_no_search_can_have_needs_another(tmp_path, name):
    config = searching(tmp_path, name, f'"{KEY}": tune.uniform(0, 1e-3)')
    with pytest.raises(
        UserError, match=rf"/{re.escape(name)}' cannot name the search: a name has letters, .*; give --tune\.name$"
    ):
        Plan(config, print)
    named = config.model_copy(update={"tune": config.tune.model_copy(update={"name": "mine"})})
    with pytest.raises(UserError, match="there is no on-manifold set"):
        Plan(named, print)


@pytest.mark.parametrize("retries", [0, 5])
def test_trials_that_tune_restores_are_tried_as_often_as_is_said_now(tmp_path, retries):
    began = TuneTrial("stub", stub=True, trial_id="one", max_failures=2)
    began.placement_group_factory = tune.PlacementGroupFactory([{"CPU": 1}])
    restored = TuneTrial.from_json_state(began.get_json_state()[0], stub=True)
    config = settings("demo", output=str(tmp_path), tune={"retries": retries})
    plan = SimpleNamespace(folder=tmp_path, config=config)
    with trial_watch.watched(trial_watch.Watcher(plan, None, print, LiveTable((), "search"))):
        trial_watch.Tell().on_step_begin(1, [restored])
    for failures in range(1, 8):
        restored.run_metadata.num_failures = failures
        assert restored.should_recover() == (failures <= retries)


@pytest.mark.parametrize(("seed", "expected"), [(0, [1, 2, 3]), (2, [1, 3, 4]), (3, [1, 2, 4]), (7, [1, 2, 3])])
def test_what_confirms_a_search_has_other_seeds_than_it(tmp_path, seed, expected):
    config = searching(tmp_path, "decay.py", f'"{KEY}": tune.uniform(0, 1e-3)')
    config = validate(presets.merge(config.to_json(), {"training": {"seed": seed}, "tune": {"confirm_seeds": 3}}))
    space, base = spaces.load(config.tune.space, config)
    plan = SimpleNamespace(config=config, base=base, space=space, folder=tmp_path / "decay")
    best = Trial("decay_000", "finished", {KEY: 1e-4}, 1, 0.0, {})
    made = champion.anew(plan, best)
    assert {kind: [one.training.seed for one in configs.values()] for kind, configs in made.items()} == {
        "best": expected, "start": expected
    }  # fmt: skip
    assert list(made["best"]) == [f"decay_best_seed{one}" for one in expected]
    assert spaces.trial_config(base, best.knobs, "trial", 1).training.seed == seed


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("goes_on", [True, False])
def test_what_trials_of_several_workers_held_is_given_back_when_all_have_ended(tmp_path, monkeypatch, alone, goes_on):
    """By a search and by what confirms it: the controller that dies last does so after Tune's last step."""
    told: list[str] = []

    class Tuner:
        restore = classmethod(lambda cls, path, trainable: cls(trainable))

        def __init__(self, trainable: object, *, run_config: tune.RunConfig | None = None, **_: object) -> None:
            if run_config is not None:
                kinds = [type(callback) for callback in run_config.callbacks]
                assert (abandoned.TakesBack in kinds) is not alone

        def fit(self) -> None:
            assert holding._LEASE is lease
            told.append("fit")
            raise RuntimeError

    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr(tune, "with_parameters", lambda run, work: run)
    monkeypatch.setattr(tune, "with_resources", lambda run, share: run)
    monkeypatch.setattr(abandoned, "free", lambda: told.append("freed"))
    lease, work = SimpleNamespace(check=lambda: None), SimpleNamespace(is_alone=alone, keep=2)
    with pytest.raises(RuntimeError):
        trial_runs.fit(work, tmp_path / "ray_tune", {"CPU": 1}, lease, 0, {}, goes_on=goes_on)
    assert told == ["fit"] + ["freed"] * (not alone)
    assert holding._LEASE is None

    config = settings("demo", output=str(tmp_path))
    plan = SimpleNamespace(config=config, base=config.to_json(), folder=tmp_path, work=SimpleNamespace(of_models=lambda _: work))
    monkeypatch.setattr(champion, "anew", lambda *_: {})
    monkeypatch.setattr(searchers, "trials_at_once", lambda *_, **__: 1)
    with pytest.raises(RuntimeError):
        champion._retrain(plan, None, print, lease)
    assert told == (["fit"] + ["freed"] * (not alone)) * 2
