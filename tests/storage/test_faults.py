"""What interrupts a training, and how it goes on: power cuts within an epoch, damaged files, full disks, divergence, SIGTERM."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ViewingNet

from dmat_ray import pace
from dmat_ray.config import Config
from dmat_ray.data.epochs import Done, InMemory
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.training import trainer, validation

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]
OFF = {"weight": 0}
CLEAN = {"clean": {"weight": 1}, "image": OFF, "latent": OFF}
# three steps an epoch over 18 examples
TRAINING = {"epochs": 3, "lr_epochs": [0, 3], "val_examples": 6, "batch_size": 8}


class PowerCutError(Exception):
    """The machine goes down."""


class Context(LocalContext):
    """Loses power when a checkpoint within an epoch, or of an epoch, has been written; keeps what is said."""

    def __init__(self, folder: Path, cut_after: int | None = None, on_report: Any = None) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, on_report)
        self.left, self.said = cut_after, list[str]()

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, *, wait: bool = False) -> None:
        super().report(metrics, checkpoint, wait=wait)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise PowerCutError

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def data(set_folder: Path) -> ManifoldSet:
    return open_set(set_folder, "train")


@pytest.fixture
def train(data: ManifoldSet, generator: StyleGAN2, generator_folder: Path) -> Callable[[Config, Context], dict[str, float]]:
    sha = generators.fingerprint(str(generator_folder))
    return lambda config, context: trainer.train(config, data, generator, sha, context)


Train = Callable[[Config, Context], dict[str, float]]


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look up after every step."""
    monkeypatch.setattr(pace, "LOOK_S", 0.0)


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "examples_per_second"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    network, _ = checkpoint.load_classifier(folder / "checkpoint")
    return network.state_dict()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"training": {"ema_decay": 0.9, "awp_gamma": 0.01, "keep": "best"}},
    "per term, sampled": {"objective": {"batch_norm": "per_term", "terms": "sample", "clean": {"weight": 0.5}}},
}


# of the first epoch's two places, which differ in nothing that a variant keeps, the others have one each
CUTS = [
    (cut, variant)
    for cut in (1, 2, 5, 8)
    for variant in VARIANTS
    if (cut, variant) not in ((2, "averaged"), (1, "per term, sampled"))
]


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize(("cut_after", "variant"), CUTS)
def test_a_cut_within_an_epoch_leaves_no_trace(
    train: Train, make_config: MakeConfig, tmp_path: Path, variant: str, cut_after: int
) -> None:
    """Every metric and every weight is bit for bit that of a training without checkpoints within its epochs."""
    sections = VARIANTS[variant]
    training = {**TRAINING, **sections.get("training", {})}
    objective = sections.get("objective", {})
    whole = train(make_config(training=training, objective=objective), Context(tmp_path / "whole"))
    often = make_config(training={**training, "checkpoint_minutes": 1e-9}, objective=objective)
    with pytest.raises(PowerCutError):
        train(often, Context(tmp_path / "parts", cut_after))
    run = checkpoint.read_run(tmp_path / "parts" / "checkpoint")
    # each of three steps is followed by a checkpoint, and then comes the epoch's
    assert (run["epoch"], run["step"]) == (cut_after // 4, cut_after % 4)
    resumed = train(often, Context(tmp_path / "parts"))
    assert timeless(resumed) == timeless(whole)
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=0, rtol=0)
    histories = [checkpoint.read_run(tmp_path / name / "checkpoint")["history"] for name in ("whole", "parts")]
    assert [timeless(m) for m in histories[0]] == [timeless(m) for m in histories[1]]


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_a_cut_after_an_epochs_last_step_leaves_a_network_that_flattens_by_view_as_it_was(
    train: Train, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float
) -> None:
    """It does not take channels last, and is validated before any step has shown that."""
    monkeypatch.setattr(classifiers, "network", lambda name, channels, num_classes: ViewingNet(channels, num_classes))
    config = make_config(training={**TRAINING, "ema_decay": ema_decay, "checkpoint_minutes": 1e-9})
    whole = train(config, Context(tmp_path / "whole"))
    with pytest.raises(PowerCutError):
        train(config, Context(tmp_path / "parts", 3))
    assert checkpoint.read_run(tmp_path / "parts" / "checkpoint")["step"] == 3
    assert timeless(train(config, Context(tmp_path / "parts"))) == timeless(whole)


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_another_number_of_workers_takes_up_the_rest_of_an_epoch(
    data: ManifoldSet, make_config: MakeConfig, steps: int, then: int
) -> None:
    source = InMemory(data, make_config(training=TRAINING).training)
    whole = [list(batch.id) for batch in source.batches(5, 0, 1)]
    rest = [list(source.batches(5, rank, then, Done(steps, 2))) for rank in range(then)]
    dealt = [sorted({id for part in parts for id in part.id}) for parts in zip(*rest, strict=True)]
    assert dealt == [sorted(ids) for ids in whole[steps:]]


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "run.json"])
def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(
    train: Train, make_config: MakeConfig, tmp_path: Path, file: str
) -> None:
    config = make_config(training={**TRAINING, "checkpoint_minutes": 1e-9})
    whole = train(config, Context(tmp_path / "whole"))
    with pytest.raises(PowerCutError):
        train(config, Context(tmp_path / "parts", 6))
    path = tmp_path / "parts" / "checkpoint" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    context = Context(tmp_path / "parts")
    assert timeless(train(config, context)) == timeless(whole)
    assert len(context.said) == 2
    assert "going on with epoch" in context.said[1]
    assert file in context.said[0]
    assert context.said[0].endswith("going back to the one before")


@pytest.mark.usefixtures("every_step")
def test_only_damaged_checkpoints_are_an_error(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(training={**TRAINING, "checkpoint_minutes": 1e-9})
    with pytest.raises(PowerCutError):
        train(config, Context(tmp_path, 3))
    for name in ("checkpoint", "checkpoint.before"):
        (tmp_path / name / "state.pt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"checkpoint\.before' is damaged: its state\.pt .*none before it; remove it to train anew"
    ):
        train(config, Context(tmp_path))


def test_a_checkpoint_within_an_epoch_waits_for_its_time(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    reports: list[Mapping[str, float]] = []
    context = Context(tmp_path, on_report=reports.append)
    train(make_config(training={**TRAINING, "checkpoint_minutes": 60}), context)
    assert [r["epoch"] for r in reports] == [1, 2, 3]
    assert checkpoint.read_run(context.checkpoints()[1])["step"] == 0


@pytest.mark.parametrize(
    ("objective", "term"),
    [(CLEAN, "clean"), ({"clean": OFF, "image": OFF, "latent": {"weight": 1}}, "latent"), ({}, "image")],
)
def test_divergence_names_step_term_and_the_last_good_checkpoint(
    train: Train, make_config: MakeConfig, tmp_path: Path, objective: dict[str, Any], term: str
) -> None:
    training = {**TRAINING, "lr_epochs": [0, 1, 1.01, 3], "lr_values": [0.01, 0.01, 1e25, 1e25], "val_examples": 0}
    with pytest.raises(NotFiniteError) as raised:
        train(make_config(training=training, objective=objective), Context(tmp_path))
    said = str(raised.value)
    assert f"term {term}: " in said
    assert "in epoch 2, step 3 of 3" in said, "the second step makes the weights what the third finds"
    assert f"last good checkpoint is '{tmp_path / 'checkpoint'}'" in said
    assert "lower training.lr_values" in said
    assert checkpoint.read_run(tmp_path / "checkpoint")["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path).values())


@pytest.mark.parametrize("val_examples", [0, 6])
def test_weights_that_diverge_in_an_epochs_last_step_are_not_saved(
    train: Train, make_config: MakeConfig, tmp_path: Path, val_examples: int
) -> None:
    """The losses of the epoch are all finite: what the last of them makes of the weights is not."""
    rates = {"lr_epochs": [0, 1.6, 1.6667, 2], "lr_values": [1e-5, 1e-5, 1e38, 1e38], "weight_decay": 1e3}
    training = {**TRAINING, "epochs": 2, "val_examples": val_examples, **rates}
    with pytest.raises(NotFiniteError, match="in epoch 2, step 3 of 3, the weights that come of it are not finite"):
        train(make_config(training=training, objective=CLEAN), Context(tmp_path))
    assert checkpoint.read_run(tmp_path / "checkpoint")["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path).values())


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Robust accuracies that validation finds, one an epoch."""
    found = iter(values)
    monkeypatch.setattr(validation.Validator, "__call__", lambda *_: {"val_robust": next(found), "val_clean": 0.5})


def test_the_best_epoch_is_kept(train: Train, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie goes to the earlier epoch; a resume knows what was best before it."""
    values = [0.3, 0.6, 0.6, 0.4]
    training = {**TRAINING, "epochs": 4, "lr_epochs": [0, 4]}
    scripted(monkeypatch, values)
    kept: list[dict[str, torch.Tensor]] = []
    train(make_config(training=training), Context(tmp_path / "last", on_report=lambda m: kept.append(weights(tmp_path / "last"))))
    scripted(monkeypatch, values[:3])
    config = make_config(training={**training, "keep": "best"})
    with pytest.raises(PowerCutError):
        train(config, Context(tmp_path / "best", 3))
    scripted(monkeypatch, values[3:])
    train(config, Context(tmp_path / "best"))
    run = checkpoint.read_run(tmp_path / "best" / "checkpoint")
    assert (run["epoch"], run["finished"], run["metrics"]["epoch"], run["metrics"]["val_robust"]) == (4, True, 2, 0.6)
    torch.testing.assert_close(weights(tmp_path / "best"), kept[1], atol=0, rtol=0)
    assert checkpoint.read_run(tmp_path / "last" / "checkpoint")["metrics"]["epoch"] == 4


@pytest.mark.parametrize(("values", "epochs"), [([0.5, 0.4, 0.4, 0.9], 3), ([0.1, 0.2, 0.1, 0.3], 4), ([0.5, 0.4, 0.6, 0.5], 4)])
def test_patience_ends_a_training(
    train: Train, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], epochs: int
) -> None:
    scripted(monkeypatch, values)
    config = make_config(training={**TRAINING, "epochs": 4, "lr_epochs": [0, 4], "patience": 2})
    assert train(config, Context(tmp_path))["epoch"] == epochs
    assert checkpoint.read_run(tmp_path / "checkpoint")["finished"]
    reports: list[Any] = []
    train(config, Context(tmp_path, on_report=reports.append))
    assert reports == [], "a training that was stopped early is finished"


def local_job(set_folder: Path, generator_folder: Path, output: Path, *options: str) -> list[str]:
    """jobs/train_local.py on the tiny set."""
    settings = {
        "data": {"resolution": 8},
        "generator": {"path": str(generator_folder)},
        "objective": {"image": {"weight": 1, "steps": 1}, "clean": OFF, "latent": OFF},
        "training": {**TRAINING, "lr_values": [0.05, 0.01], "val_examples": 0},
        "classifier": {"name": "digits_cnn"},
        "name": "tiny",
    }
    path = output / "settings.yaml"
    path.write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "jobs" / "train_local.py"), "--preset", str(path), "--output", str(output)]
    return [*command, "--manifold_set", str(set_folder), *options]


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(set_folder: Path, generator_folder: Path, tmp_path: Path) -> None:
    """The kernel refuses what goes beyond a file's largest size, as it does when the disk is full."""
    command = local_job(set_folder, generator_folder, tmp_path)
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    failed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, preexec_fn=limited)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "a checkpoint cannot be written to " in failed.stderr
    assert "is the disk full? There is none before it" in failed.stderr
    assert not (tmp_path / "local" / "tiny" / "checkpoint").exists()
    assert not (tmp_path / "models").exists()


def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    context = Context(tmp_path, on_report=lambda m: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard)))
    config = make_config(training=TRAINING)
    try:
        with pytest.raises(UserError, match=r"The last good one is '.*/checkpoint'; free space and run again"):
            train(config, context)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.read_run(tmp_path / "checkpoint")["epoch"] == 1
    assert train(config, Context(tmp_path))["epoch"] == 3


def test_sigterm_writes_a_checkpoint_and_a_rerun_goes_on_from_it(
    train: Train, set_folder: Path, generator_folder: Path, tmp_path: Path
) -> None:
    # steps that take a part of a second
    slow = ("--objective.image.steps", "60", "--training.epochs", "40", "--training.lr_epochs", "0,40")
    command = local_job(set_folder, generator_folder, tmp_path, *slow)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "images to train on" in process.stderr.readline()
    seen = process.stderr.readline()
    assert "epoch 1/40" in seen
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "asked to stop: the same command goes on from the checkpoint in '" in said
    run = checkpoint.read_run(tmp_path / "local" / "tiny" / "checkpoint")
    assert 1 <= run["epoch"] < 40
    epochs: list[float] = []
    again = Context(tmp_path / "local" / "tiny", 1, lambda metrics: epochs.append(metrics["epoch"]))
    with pytest.raises(PowerCutError):
        train(Config.model_validate(run["config"]), again)
    assert f"going on with epoch {run['epoch'] + 1}" in again.said[0]
    assert epochs == [run["epoch"] + 1]
