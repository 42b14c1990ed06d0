"""The presets of the paper's experiments: every number that arXiv 2009.02470 and its code give, in the resolved settings."""

import re
import runpy
from pathlib import Path

import pytest

from dmat_ray import cli, presets, suites
from dmat_ray.config import Config, EvaluationConfig, StyleGAN1Config
from dmat_ray.errors import UserError
from dmat_ray.training.schedules import learning_rate

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "jobs" / "pipeline.py"


def resolved(*layers: str) -> Config:
    return cli.parse("A job.", ["--preset", *layers, "--data.source", "imagenet"])[0]


@pytest.fixture(scope="module")
def methods() -> dict[str, Config]:
    """What pipeline.py trains, by name."""
    method = runpy.run_path(str(PIPELINE))["_method"]
    found = [method(name, ["--preset", "mixed10", "--data.source", "imagenet"]) for name in resolved("mixed10").methods]
    return {one.name: one for one in found}


def test_data_and_generator() -> None:
    config = resolved("mixed10")
    data = config.data
    assert (data.resolution, data.channels, data.resize, len(data.classes)) == (256, 3, "stretch", 10)
    assert (data.train_limit, data.test_limit, data.balanced, data.official_split) == (69_480, 7_200, True, False)
    assert data.test_share == pytest.approx(7_200 / (69_480 + 7_200), abs=5e-5)
    assert StyleGAN1Config(resolution=data.resolution).num_ws == 14
    assert (config.classifier.name, config.classifier.mean, config.classifier.std) == (
        *("resnet50", (0.485, 0.456, 0.406)),
        (0.229, 0.224, 0.225),
    )


def test_projection_is_that_of_preset_paper() -> None:
    config = resolved("mixed10")
    assert config.projection == resolved("paper").projection
    p = config.projection
    assert (p.start, p.steps, p.lr, p.batch_size, p.lr_rampup, p.lr_rampdown) == ("mean", 1000, 0.1, 10, 0.05, 0.25)
    assert (p.noise, p.noise_ramp) == (0.05, 0.75)
    # 100 times the mean of differences in [-1, 1], which are twice as large
    assert (p.lpips, p.l1, p.l2) == (1, 200, 0)


def test_budgets_of_training(methods: dict[str, Config]) -> None:
    for name, config in methods.items():
        image, latent = config.objective.image, config.objective.latent
        assert (image.norm, image.eps, image.step_size, image.random_start) == ("linf", 4 / 255, 1 / 255, True), name
        assert image.steps == (10 if name == "trades" else 5)
        assert (latent.norm, latent.eps, latent.scale, latent.random_start) == ("linf", 0.02, "raw", True)
        assert (latent.steps, latent.step_size) == ((1, 0.024) if name == "om_fgsm" else (5, 0.005)), name
        assert config.objective.batch_norm == "separate"


def test_weights_of_the_methods(methods: dict[str, Config]) -> None:
    found = {n: (c.objective.clean.weight, c.objective.image.weight, c.objective.latent.weight) for n, c in methods.items()}
    assert found == {
        "standard": (1, 0, 0),
        "at": (0, 1, 0),
        "om_fgsm": (0, 0, 1),
        "om_at": (0, 0, 1),
        "dmat": (0, 0.5, 0.5),
        "trades": (1, 1, 0),
    }
    assert methods["trades"].objective.image.divergence == "kl"


def test_optimiser_epochs_and_rates(methods: dict[str, Config]) -> None:
    epochs = {name: config.training.epochs for name, config in methods.items()}
    assert epochs == {"standard": 40, "at": 20, "om_fgsm": 30, "om_at": 30, "dmat": 20, "trades": 20}
    for config in methods.values():
        t = config.training
        assert (t.momentum, t.weight_decay, t.batch_size, t.schedule, t.images) == (0.9, 1e-4, 64, "piecewise", "on_manifold")
        rates = [learning_rate(t, epoch) for epoch in (0, 1, 6, 12, 15, 20)]
        assert rates == pytest.approx([0, 0.4, 0.04, 0.004, 0.0004, 0.0001])
        assert learning_rate(t, 0.5) == pytest.approx(0.2)
        assert learning_rate(t, 30) == pytest.approx(0.0001)
    assert learning_rate(methods["standard"].training, 40) == pytest.approx(0.00001)


def test_one_training_has_the_settings_of_the_pipelines(methods: dict[str, Config]) -> None:
    for preset, name in (("mixed10_standard", "standard"), ("mixed10_om_at", "om_at"), ("mixed10_om_fgsm", "om_fgsm")):
        assert resolved("mixed10", preset) == methods[name]
    assert resolved("mixed10", "dmat").model_copy(update={"name": "dmat"}) == methods["dmat"]


def test_the_evaluation_has_the_papers_attacks() -> None:
    named = {row.name for row in resolved("mixed10").evaluation.attacks}
    assert named >= {"clean", "FGSM", "PGD-50", "MIA-50", "OM-FGSM", "OM-PGD-50", "fog", "snow", "elastic", "gabor", "jpeg L1"}
    assert set(resolved("mixed10").evaluation.sets) == {"on_manifold", "natural"}


def test_a_generator_of_ones_own_changes_the_unit_of_w_and_nothing_else() -> None:
    """In every method and suite: no radius of the published W is left, and steps are the same share of theirs."""
    published = [resolved("mixed10", *names) for names in ([], ["mixed10_om_fgsm"], ["mixed10_om_at"], ["dmat"])]
    own = [resolved("mixed10", "mixed10_own", *names) for names in ([], ["mixed10_own_om_fgsm"], ["mixed10_om_at"], ["dmat"])]
    for before, now in zip(published, own, strict=True):
        was, latent = before.objective.latent, now.objective.latent
        assert (latent.scale, latent.eps, latent.steps) == ("std", 0.1, was.steps)
        assert latent.step_size / latent.eps == pytest.approx(was.step_size / was.eps)
        rows, then = ([(row.name, row.threat) for row in config.evaluation.attacks] for config in (now, before))
        assert sorted(rows) == sorted(then)
        trials = suites.resolved(EvaluationConfig.model_validate({"suites": now.tune.suites})).attacks
        found = [row for row in (*now.evaluation.attacks, *trials) if row.threat == "latent"]
        assert [(row.scale, row.eps) for row in found] == [("std", 0.1)] * 3
        changed = {"evaluation", "methods", "objective", "tune", "name"}
        assert now.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert resolved("mixed10", "mixed10_own").methods[2] == "mixed10_own_om_fgsm"
    both, of_own = (resolved(*names, "joint").objective.more["joint"] for names in (["mixed10"], ["mixed10", "mixed10_own"]))
    assert (both.eps, both.latent_eps, both.scale) == (4 / 255, 0.02, "raw")
    assert of_own == both.model_copy(update={"latent_eps": 0.1, "scale": "std"})


def test_includes_come_first_and_files_beside_the_one_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "below.yaml").write_text("{include: [at], training: {epochs: 3, batch_size: 7}}")
    (tmp_path / "own" / "above.yaml").write_text("{include: [below.yaml], training: {epochs: 4}}")
    found = presets.load([str(tmp_path / "own" / "above.yaml")])
    assert found == presets.merge(presets.load(["at"]), {"training": {"epochs": 4, "batch_size": 7}})
    assert presets.load(["dmat", str(tmp_path / "own" / "above.yaml")])["objective"]["image"]["weight"] == 1


def test_includes_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: [b.yaml]")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]")
    with pytest.raises(UserError, match=r"a\.yaml' includes itself \(.*a\.yaml > .*b\.yaml > .*a\.yaml\)"):
        presets.load([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("include: at")
    with pytest.raises(UserError, match=r"a\.yaml': include is 'at'; give a list of presets"):
        presets.load([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_text("include: [nonsense]")
    with pytest.raises(UserError, match=r"preset 'nonsense' does not exist; choose from at, "):
        presets.load([str(tmp_path / "a.yaml")])


def test_documented_presets_are_the_methods_of_the_experiment() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| .+ \| (\d+) \|$", text, re.MULTILINE)
    assert [name for name, _ in table] == list(resolved("mixed10").methods)
    for name, epochs in table:
        assert resolved("mixed10", name).training.epochs == int(epochs)


def test_two_methods_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline.py", "--methods", "standard,mixed10_standard", "--dry-run"])
    with pytest.raises(UserError, match="two of methods = standard, mixed10_standard are models of the name 'standard'"):
        runpy.run_path(str(PIPELINE))["main"]()


def test_the_command_line_comes_last_in_a_pipeline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = runpy.run_path(str(PIPELINE))
    assert own["_method"]("mixed10_standard", ["--preset", "mixed10"]).training.epochs == 40
    given = ["--preset", "mixed10", "--training.epochs", "30"]
    methods = [own["_method"](name, given) for name in ("mixed10_standard", "mixed10_om_fgsm", "dmat")]
    assert [(m.name, m.training.epochs) for m in methods] == [("standard", 30), ("om_fgsm", 30), ("dmat", 30)]
    assert [m.objective.latent.weight for m in methods] == [0, 1, 0.5]
    monkeypatch.setattr("sys.argv", ["pipeline.py", "--objective.image.weight", "6", "--dry-run"])
    with pytest.raises(UserError, match=r"objective\.image\.weight is what tells methods apart"):
        own["main"]()
