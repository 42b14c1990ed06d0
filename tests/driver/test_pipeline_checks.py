"""What a pipeline refuses before Ray starts: its later stages would find it out after hours of projection and training."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmat_ray import suites
from dmat_ray.config import EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation

pytestmark = pytest.mark.slow
PIPELINE = Path(__file__).parents[2] / "jobs" / "pipeline.py"


class StartedError(Exception):
    """Ray would have been started."""


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs the demo's pipeline with options up to where Ray starts."""
    from dmat_ray.cluster import session

    def connected(*_: Any) -> None:
        raise StartedError

    monkeypatch.setattr(session, "connected", connected)
    monkeypatch.setattr(session, "prepare_environment", lambda config: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def run(*options: str) -> None:
        monkeypatch.setattr("sys.argv", ["pipeline.py", "--output", str(tmp_path / "out"), *options])
        runpy.run_path(str(PIPELINE))["main"]()

    return run


SUITE = "attacks: [{threat: snow, name: mine, method: square}]"
WEIGHTS = "objective: {fog: {weight: 0.2}, image: {weight: 0.3}}"
MORE = "objective: {fog: {weight: 0}, more: {l2: {threat: image, norm: l2, eps: 1, weight: 0.3}}}"
BUDGETS = "include: [dmat]\nobjective: {fog: {weight: 0, eps: 64/255}, more: {l2: {threat: image, norm: l2, eps: 1}}}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classifier.name", "resnet81"], r"classifier\.name 'resnet81' is not known"),
        (["--classifier.name", "alexnet"], r"classifier\.name 'alexnet' cannot take 32x32 images"),
        (["--classifier.name", "resnet18", "--training.batch_size", "3"], "cannot take 32x32 images one at a time"),
        (["--training.batch_size", "1"], "batch_size 1 is smaller than the 2 workers"),
        (["--training.val_examples", "2000"], "val_examples is 2000, but the training split has 2000"),
        (["--training.images", "natural"], "latent needs training.images on_manifold"),
        (["--objective.latent.method", "square"], "term latent on 1 x 32 x 32 images: method square needs threat image"),
        (
            ["--objective.image.norm", "l1", "--objective.image.eps", "8", "--objective.image.method", "square"],
            "term image on 1 x 32 x 32 images: .*square",
        ),
        (["--methods", "standard,OTHER"], "was made with generator 'mnist32' "),
        (["--evaluation.suites", "perceptual"], r"attack 'PPGD' on 1 x 32 x 32 images of 10 classes: .*alexnet.* is needed"),
        (["--evaluation.suites", "SUITE"], "attack 'mine' on 1 x 32 x 32 images of 10 classes: method square searches"),
        (["--evaluation.lpips", "vgg"], "vgg16 is needed"),
        (["--preset", "demo", "WEIGHTS"], r"^objective\.fog\.weight is what tells .*'standard' .* another's 0\.2\)$"),
        (["--preset", "demo", "MORE"], r"^objective\.more\.l2\.weight is what tells .*'standard' .* another's 0\.3\)$"),
        (["--methods", "dmat", "--name", "mine"], r"^--name is of one model, .*another --output"),
    ],
)
def test_what_later_stages_would_refuse(
    pipeline: Callable[..., None], tmp_path: Path, generator_folder: Path, options: list[str], words: str
) -> None:
    other = f"include: [dmat]\ngenerator: {{path: {generator_folder}}}\n"
    for name, text in {"suite": SUITE, "other": other, "weights": WEIGHTS, "more": MORE}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    named = {name.upper(): str(tmp_path / f"{name}.yaml") for name in ("suite", "weights", "more")}
    named["standard,OTHER"] = f"standard,{tmp_path / 'other.yaml'}"
    with pytest.raises(UserError, match=words):
        pipeline(*(named.get(option, option) for option in options))
    assert not (tmp_path / "out" / "on_manifold_set").exists()


@pytest.mark.parametrize("options", [(), ("--methods", "best,joint"), ("--preset", "demo", "BUDGETS", "--methods", "at,best")])
def test_what_fits_goes_on(pipeline: Callable[..., None], tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "budgets.yaml").write_text(BUDGETS)
    with pytest.raises(StartedError):
        pipeline(*(str(tmp_path / "budgets.yaml") if option == "BUDGETS" else option for option in options))


def test_every_suite_can_be_tried_on_a_blank_image() -> None:
    """For every suite here, but for weights that cannot be had."""
    for name in suites.names():
        rows = [row | ({"weights": "random"} if row["threat"] == "perceptual" else {}) for row in suites.load(name)["attacks"]]
        config = EvaluationConfig.model_validate({"attacks": rows})
        for channels in (1, 3):
            evaluation.require_suite(config, {"shapes": {"on_manifold": [channels, 32, 32]}, "class_names": list("abcdefghij")})


def test_a_second_of_the_same_settings_is_refused(pipeline: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on in the first one's MLflow run, and end it as failed."""
    from dmat_ray.cluster import session

    began: list[int] = []

    def connected(*_: Any) -> None:
        began.append(1)
        if len(began) > 1:
            raise StartedError
        with pytest.raises(UserError, match=r"is being written by process .*; wait until it ends"):
            pipeline()
        raise StartedError

    monkeypatch.setattr(session, "connected", connected)
    for _ in range(2):  # once it has ended another may begin
        with pytest.raises(StartedError):
            pipeline()
    assert len(began) == 2
