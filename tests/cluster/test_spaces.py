"""Search spaces: what a file may say, what is drawn from it, and what is refused before anything starts."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers.pbt import _explore
from scipy import stats
from small import ROOT, settings

from dmat_ray.cluster import searchers, spaces
from dmat_ray.config import ClusterConfig, Config, TuneConfig
from dmat_ray.errors import UserError

IMPORTS = "from ray import tune\nfrom dmat_ray.cluster.spaces import simplex, times\n"
SHIPPED = sorted((ROOT / "tune_spaces").glob("*.py"))
WEIGHTS = ("objective.clean.weight", "objective.image.weight", "objective.latent.weight")
RATES = '"training.lr_values": tune.choice([[0.1, 0.1], [0.2, 0.1]])'


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return settings(tmp_path_factory.mktemp("spaces"), preset=("demo", "dmat"))


def load(tmp_path: Path, config: Config, content: str) -> spaces.Space:
    path = tmp_path / "space.py"
    path.write_text(IMPORTS + content)
    return spaces.load(str(path), config)[0]


def draw(space: spaces.Space, searcher: str = "random", seed: int = 0) -> dict[str, object]:
    """A sample, as Ray Tune draws it."""
    rng = np.random.RandomState(seed)
    return {n: d.sample(random_state=rng) for n, d in space.variables(TuneConfig(searcher=searcher)).items()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", [("demo", "dmat"), ("paper", "dmat")], ids=lambda names: names[0])
def test_every_shipped_space_gives_settings_that_can_be_trained(tmp_path, path, preset):
    from dmat_ray import cli

    config, _ = cli.parse("test", ["--preset", *preset, "--output", str(tmp_path)])
    space, base = spaces.load(str(path), config)
    for seed in range(5):
        sample = draw(space, seed=seed)
        knobs = space.knobs(sample)
        trial = spaces.trial_config(base, space.settings(sample), "trial", 3).to_json()
        for name, value in {**space.constants, **knobs}.items():
            found = trial
            for part in name.split("."):
                found = found[part]
            assert found == (list(value) if isinstance(value, tuple) else value)
        assert trial["training"]["epochs"] == 3


def test_the_shipped_ones_are_those_of_the_docs():
    table = (ROOT / "docs" / "search.md").read_text().split("| space | searches |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == [path.stem for path in SHIPPED]
    assert {path.stem for path in SHIPPED} >= {"attack_budget", "mixing_ratio", "optimizer", "dmat_full"}


def test_the_space_of_the_docs_works(tmp_path, config):
    (example,) = re.findall(
        r"```python\n(from ray import tune\n.+?)```", (ROOT / "docs" / "search.md").read_text(), flags=re.DOTALL
    )
    path = tmp_path / "space.py"
    path.write_text(example)
    space, base = spaces.load(str(path), config)
    trial = spaces.trial_config(base, space.settings(draw(space)), "trial", 1)
    assert sum(
        term.weight for term in (trial.objective.image, trial.objective.latent, trial.objective.more["snow"])
    ) == pytest.approx(1)


def test_a_trials_schedule_is_the_whole_one_squeezed(config):
    base = config.to_json()
    trial = spaces.trial_config(base, {}, "trial", 1)
    old = base["training"]
    assert trial.training.lr_epochs == pytest.approx([k / old["epochs"] for k in old["lr_epochs"]])
    assert list(trial.training.lr_values) == old["lr_values"]


def test_what_a_trial_found_in_epochs_keeps_its_share_of_a_longer_training():
    """A warm-up of one of eight epochs is that of two and a half of twenty."""
    found = {"training.lr_warmup": 1.0, "training.awp_warmup": 2, "training.lr_epochs": [0, 2, 8], "objective.image.eps": 0.1}
    longer = spaces.stretched(found, 20 / 8)
    assert longer == {
        "training.lr_warmup": 2.5, "training.awp_warmup": 5, "training.lr_epochs": [0, 5, 20], "objective.image.eps": 0.1
    }  # fmt: skip
    assert isinstance(longer["training.awp_warmup"], int)


def test_a_trial_is_what_it_is_after_its_last_epoch(config):
    base = config.to_json()
    base["training"] |= {"keep": "best", "patience": 1, "checkpoint_every": 5, "checkpoint_minutes": 1.0}
    trial = spaces.trial_config(base, {}, "trial", 1).training
    assert (trial.keep, trial.patience, trial.checkpoint_every, trial.checkpoint_minutes) == ("last", None, 1, None)


def test_times_is_relative_to_the_settings_without_it(tmp_path, config):
    space = load(tmp_path, config, 'SPACE = {"objective.image.eps": times(0.5, 2), "objective.image.step_size": None}')
    eps = config.objective.image.eps
    drawn = [draw(space, seed=s)["objective.image.eps"] for s in range(300)]
    assert min(drawn) >= 0.5 * eps
    assert max(drawn) <= 2 * eps
    # on a logarithmic scale as often below as above
    assert np.mean(np.array(drawn) < eps) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_shares_are_uniform_on_the_simplex(tmp_path, config, count):
    """Each weight of a uniform point is Beta(1, count - 1) (the marginal of a flat Dirichlet)."""
    space = load(tmp_path, config, f"SPACE = {{{WEIGHTS[:count]!r}: simplex()}}")
    drawn = np.array([list(space.knobs(draw(space, seed=s)).values()) for s in range(1500)])
    assert drawn.min() >= 0
    assert drawn.sum(axis=1) == pytest.approx(1)
    for column in drawn.T:
        assert stats.kstest(column, stats.beta(1, count - 1).cdf).pvalue > 1e-3


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_any_shares_give_weights_of_the_simplex(shares):
    domain = spaces.simplex(total=2.0, least=0.25)
    space = spaces.Space("", (), {}, {WEIGHTS: domain}, {})
    weights = list(space.knobs({f"share of {k}": s for k, s in zip(WEIGHTS, shares, strict=False)}).values())
    assert sum(weights) == pytest.approx(2.0)
    assert min(weights) >= 0.25 - 1e-12


def test_a_grid_goes_from_end_to_end(tmp_path, config):
    space = load(
        tmp_path,
        config,
        """SPACE = {
    "training.lr": tune.loguniform(0.01, 1.0),
    "objective.image.eps": tune.uniform(0.1, 0.4),
    "objective.image.steps": tune.randint(1, 4),
    "objective.image.step_size": None,
    "training.schedule": tune.choice(["cosine", "one_cycle"]),
    ("objective.image.weight", "objective.latent.weight"): simplex(),
}""",
    )
    grid = {n: v["grid_search"] for n, v in space.variables(TuneConfig(searcher="grid", grid_points=3)).items()}
    assert grid["training.lr"] == pytest.approx([0.01, 0.1, 1.0])
    assert grid["objective.image.eps"] == pytest.approx([0.1, 0.25, 0.4])
    assert grid["objective.image.steps"] == [1, 2, 3]
    assert grid["training.schedule"] == ["cosine", "one_cycle"]
    (name,) = set(grid) - {"training.lr", "objective.image.eps", "objective.image.steps", "training.schedule"}
    assert sorted(map(tuple, grid[name])) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert space.told() == [
        "training.lr: from 0.01 to 1, evenly on a logarithmic scale",
        "objective.image.eps: from 0.1 to 0.4",
        "objective.image.steps: whole numbers from 1 to 3",
        "training.schedule: one of cosine, one_cycle",
        "objective.image.weight, objective.latent.weight: shares that sum to 1, each from 0",
        "objective.image.step_size: None, in all trials",
    ]
    knobs = space.knobs({**{n: v[0] for n, v in grid.items()}, name: [0.5, 0.5]})
    assert (knobs["objective.image.weight"], knobs["objective.latent.weight"]) == (0.5, 0.5)


def test_a_change_stays_inside_the_space(tmp_path, config):
    """Population based training multiplies without looking."""
    space = load(
        tmp_path,
        config,
        'SPACE = {"objective.image.eps": tune.uniform(0.1, 0.4), "objective.image.steps": tune.randint(1, 4), '
        '"training.batch_size": tune.qrandint(32, 128, 32), "training.lr_warmup": tune.quniform(0, 2, 0.5), '
        '"training.schedule": "cosine", "objective.image.step_size": None, '
        '("objective.image.weight", "objective.latent.weight"): simplex()}',
    )
    told = "\n".join(space.told())
    assert "training.batch_size: whole numbers from 32 to 128, multiples of 32\n" in told
    assert "training.lr_warmup: from 0 to 2, multiples of 0.5\n" in told
    share = "share of objective.image.weight"
    changed = space.within({"objective.image.eps": 0.48, "objective.image.steps": 4, share: 1.2})
    assert changed == {"objective.image.eps": 0.4, "objective.image.steps": 3, share: 1.0}
    assert space.within({"objective.image.eps": 0.01, "objective.image.steps": 0, share: 0.5})["objective.image.steps"] == 1
    # of a domain of steps only these are drawn, and go on
    sizes = [space.within({"training.batch_size": size})["training.batch_size"] for size in (25, 38, 76, 115, 153)]
    assert sizes == [32, 32, 64, 128, 128]
    assert space.within({"training.lr_warmup": 1.8}) == {"training.lr_warmup": 2.0}


def test_a_populations_changes_are_those_of_its_seed(tmp_path, config):
    """A quarter of them are drawn anew, which Tune does by numpy's generator, the others by Python's."""
    space = load(tmp_path, config, 'SPACE = {"training.weight_decay": tune.uniform(0, 1)}')

    def changes(seed: int) -> list[float]:
        found = searchers.scheduler(TuneConfig(scheduler="pbt", searcher="random", num_samples=4, seed=seed), space, None)
        how = (found._hyperparam_mutations, found._resample_probability, found._perturbation_factors, found._custom_explore_fn)
        return [_explore({"training.weight_decay": 0.5}, *how)[0]["training.weight_decay"] for _ in range(20)]

    first = changes(0)
    assert len({round(value, 6) for value in first} - {0.4, 0.6}) > 1, "some are drawn anew"
    np.random.rand()
    assert changes(0) == first
    assert changes(1) != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "does not define SPACE"),
        ("SPACE = {}", "does not define SPACE"),
        ("SPACE = {1/0: 2}", "ZeroDivisionError"),
        ("import nonsense_module", "ModuleNotFoundError"),
        ('SPACE = {"objective.image.wait": tune.uniform(0, 1)}', "objective.image.wait: there is no such setting"),
        ('SPACE = {"objective.image.eps": tune.uniform(-1, 0.1)}', r"objective.image.eps: .*found -1"),
        ('SPACE = {"objective.label_smoothing": tune.uniform(0, 1)}', r"objective.label_smoothing: .*found 1"),
        ('SPACE = {"objective.image.steps": tune.randint(0, 4)}', r"objective.image.steps: .*found 0"),
        ('SPACE = {"training.schedule": tune.choice(["cosine", "cosinus"])}', r"training.schedule: .*found 'cosinus'"),
        ('SPACE = {"objective.image.norm": tune.choice(["linf", "l2"])}', r"norm = l2: objective.image: eps .* radius in linf"),
        ('SPACE = {"objective.latent.scale": tune.choice(["raw", "std"])}', r"scale = std: objective.latent: eps .* in raw W"),
        (
            'SPACE = {"objective.latent.scale": "std", "objective.latent.eps": times(1, 2), "objective.latent.step_size": None}',
            r"objective.latent: eps 0.06 is a radius in raw W; give one .* beside the scale",
        ),
        (
            'SPACE = {"objective.image.norm": "l2", "objective.image.eps": times(0.5, 2), "objective.image.step_size": None}',
            r"objective.image: eps 0.1 is a radius in linf; give one in l2 beside the norm",
        ),
        ('SPACE = {"objective.image.eps": tune.randn(0, 1)}', "a domain needs two ends"),
        ('SPACE = {"objective.image.eps": tune.sample_from(lambda spec: 1)}', "a domain needs two ends"),
        ('SPACE = {"objective.image.eps": lambda: 1}', "no domain of ray.tune"),
        ('SPACE = {"objective.image.eps": {"uniform": 1}}', "no domain of ray.tune"),
        ('SPACE = {"objective.image.eps": 0.1}', "nothing to search"),
        ('SPACE = {"objective.image.eps": times(2, 0.5)}', "times.low, high. needs"),
        ('SPACE = {"training.lr_warmup": times(0.5, 2)}', "is 0.0 before the search"),
        ('SPACE = {"objective.image.epss": times(0.5, 2)}', "there is no setting objective.image.epss before the search"),
        ('SPACE = {"objective.image.steps": times(0.5, 2)}', "is a whole number; .* tune.randint"),
        ('SPACE = {"objective.image.eps": [0.1, 0.2]}', "of the list for objective.image.eps, tune.choice"),
        ('SPACE = {"training.lr": times(0.5, 2)}', "training.lr means nothing for training.schedule piecewise"),
        (f'SPACE = {{"training.schedule": "cosine", {RATES}}}', "training.lr_values means nothing for training.schedule cosine"),
        ('SPACE = {"generator.path": tune.choice(["a", "b"])}', "'generator.path' cannot be searched"),
        ('SPACE = {"training.epochs": tune.randint(1, 4)}', "training.epochs cannot be searched: tune.epochs"),
        ('SPACE = {"training.seed": tune.randint(1, 4)}', "training.seed cannot be searched"),
        (f"SPACE = {{{WEIGHTS[:1]!r}: simplex()}}", "two settings or more"),
        (f"SPACE = {{{WEIGHTS!r}: tune.uniform(0, 1)}}", "a tuple of settings takes simplex"),
        (f"SPACE = {{{WEIGHTS[0]!r}: simplex()}}", "a tuple of settings takes simplex"),
        (f"SPACE = {{{WEIGHTS!r}: simplex(), {WEIGHTS[0]!r}: tune.uniform(0, 1)}}", "gives objective.clean.weight twice"),
        ('PRESET = "demo"\nSPACE = {"training.lr": tune.uniform(0.1, 1)}', "preset demo sets output"),
        ('SPACE = {"training.keep": tune.choice(["best", "last"])}', "training.keep cannot be searched"),
        ('SPACE = {"training.patience": tune.randint(1, 4)}', "training.patience cannot be searched: tune.scheduler"),
        ('PRESET = "nonsense"\nSPACE = {"training.lr": tune.uniform(0.1, 1)}', "preset 'nonsense' does not exist"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(tmp_path, config, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, config, content)


def test_a_scale_is_searched_with_a_radius_beside_it(tmp_path, config):
    for eps in ("tune.uniform(0.02, 0.2)", "0.1"):
        space = load(
            tmp_path,
            config,
            'SPACE = {"objective.latent.scale": tune.choice(["raw", "std"]), "objective.latent.step_size": None, '
            f'"objective.latent.eps": {eps}}}',
        )
        assert "objective.latent.scale" in space.domains


def test_rates_of_the_schedule_that_there_is_are_searched(tmp_path, config):
    space = load(tmp_path, config, f"SPACE = {{{RATES}}}")
    assert list(space.domains) == ["training.lr_values"]


def test_a_missing_file_is_named(config):
    with pytest.raises(UserError, match=r"'nowhere\.py' is no file"):
        spaces.load("nowhere.py", config)


def test_descriptions_tell_spaces_apart(tmp_path, config):
    texts = [
        'SPACE = {"training.weight_decay": tune.uniform(0.1, 1)}',
        'SPACE = {"training.weight_decay": tune.uniform(0.1, 2)}',
        'SPACE = {"training.weight_decay": tune.loguniform(0.1, 1)}',
        'SPACE = {"training.weight_decay": tune.quniform(0.1, 1, 0.1)}',
        'SPACE = {"training.weight_decay": tune.choice([0.1, 1.0])}',
        'SPACE = {"training.weight_decay": tune.uniform(0.1, 1), "training.schedule": "cosine"}',
    ]
    found = [str(load(tmp_path, config, text).description()) for text in texts]
    assert len(set(found)) == len(texts)
    assert found[0] == str(load(tmp_path, config, texts[0]).description())


@pytest.mark.parametrize("at_once", range(1, searchers.MOST_NESTED + 1))
def test_so_many_trials_of_several_workers_fit_on_the_head_and_no_more(at_once):
    """Ray counts in ten thousandths, and has one head node; its helpers for as many trainings must find room beside them."""
    (share,) = searchers.resources(False, ClusterConfig(), at_once, turns=True).values()
    units = round(10_000 * share)
    assert units == pytest.approx(10_000 * share)
    assert at_once * units + 10 * at_once <= 10_000 < (at_once + 1) * units
