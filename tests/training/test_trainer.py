"""The training loop on a tiny set: it is plain SGD, repeats, resumes and reports the truth."""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmat_ray.config import ClassifierConfig, Config, DataConfig
from dmat_ray.data.epochs import held_out_positions
from dmat_ray.data.manifold_set import ManifoldSet, epoch_batches, open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.training import trainer

MakeConfig = Callable[..., Config]
NATURAL = {"images": "natural"}
NO_LATENT = {"latent": {"weight": 0}}


@pytest.fixture(scope="module")
def data(set_folder: Path) -> ManifoldSet:
    return open_set(set_folder, "train")


@pytest.fixture
def train(data: ManifoldSet, generator: StyleGAN2, generator_folder: Path) -> Callable[..., dict[str, float]]:
    """train(config, folder, on_report) on the tiny set."""
    sha = generators.fingerprint(str(generator_folder))

    def run(config: Config, folder: Path, on_report: Any = None) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        return trainer.train(config, data, generator, sha, LocalContext(folder, on_report))

    return run


Train = Callable[..., dict[str, float]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    network, _ = checkpoint.load_classifier(folder / "checkpoint")
    return network.state_dict()


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "examples_per_second"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_training(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    one, two = train(make_config(), tmp_path / "one"), train(make_config(), tmp_path / "two")
    assert timeless(one) == timeless(two)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    other = train(make_config(training={"seed": 1}), tmp_path / "other")
    assert timeless(other) != timeless(one)
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_training_does_not_depend_on_the_global_random_state(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        train(make_config(), tmp_path / name)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize(("after", "told"), [(0.0, True), (600.0, False)])
def test_a_long_first_epoch_says_how_long_one_takes(
    train: Train,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: float,
    told: bool,
) -> None:
    """Once: every epoch after it is told of at its end."""
    monkeypatch.setattr(trainer, "TELL_AFTER_S", after)
    config = make_config(training={"epochs": 2, "batch_size": 4})
    train(config, tmp_path / "one")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" an epoch")]
    assert len(lines) == told
    assert not told or re.search(rf"{config.name}: epoch 1, step 4 of \d+; about \d+ s an epoch$", lines[0])


class PowerCutError(Exception):
    """The machine goes down."""


@pytest.mark.slow
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    """After the third epoch, of which there is no checkpoint."""
    config = make_config(training={"epochs": 4, "lr_epochs": [0, 4], "checkpoint_every": 2})
    whole = train(config, tmp_path / "whole")

    def interrupt(metrics: Mapping[str, float]) -> None:
        if metrics["epoch"] == 3:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(config, tmp_path / "parts", interrupt)
    epochs: list[float] = []
    resumed = train(config, tmp_path / "parts", lambda metrics: epochs.append(metrics["epoch"]))
    assert epochs == [3, 4]
    assert timeless(resumed) == timeless(whole)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    histories = [checkpoint.read_run(tmp_path / name / "checkpoint")["history"] for name in ("whole", "parts")]
    assert [timeless(m) for m in histories[0]] == [timeless(m) for m in histories[1]]
    assert [m["epoch"] for m in histories[1]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"training": {"seed": 5}}, "training.seed"),
        ({"training": {"lr_values": [0.05, 0.02]}}, "training.lr_values"),
        ({"objective": {"fog": {"weight": 0.1}}}, "objective.fog.weight"),
        ({"classifier": {"name": "digits_cnn", "mean": [0.4]}}, "classifier.mean"),
    ],
)
def test_resume_with_changed_settings_names_the_setting(
    train: Train, make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    train(make_config(), tmp_path)
    with pytest.raises(UserError, match=f"was trained with {name} = "):
        train(make_config(**changes), tmp_path)


def test_what_is_not_trained_may_change(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(training={"epochs": 2}), tmp_path)
    harmless = {"cluster": {"train_workers": 3}, "evaluation": {"batch_size": 7}, "tracking": {"experiment": "x"}}
    reports: list[Any] = []
    metrics = train(make_config(**harmless), tmp_path, reports.append)
    assert metrics["epoch"] == 2
    assert reports == [], "there is nothing left to train"


def test_reported_accuracy_is_that_of_the_saved_model(
    train: Train, make_config: MakeConfig, tmp_path: Path, data: ManifoldSet
) -> None:
    """Validation measures the network as it will be used, in eval mode, and does not change it."""
    held_out: dict[str, Any] = {"val_examples": 12, "epochs": 3, "lr_epochs": [0, 3]}
    metrics = train(make_config(training=held_out), tmp_path)
    network, _ = checkpoint.load_classifier(tmp_path / "checkpoint")
    train_index, val_index = held_out_positions(len(data), make_config(training=held_out).training)
    assert sorted([*train_index, *val_index]) == list(range(24))
    batch = data.batch(val_index, "on_manifold")
    with torch.no_grad():
        logits = network(batch.x_BCHW)
    assert metrics["val_clean"] == pytest.approx((logits.argmax(dim=1) == batch.y_B).float().mean().item())
    names = ("val_image", "val_latent")
    assert all(metrics["val_robust"] <= metrics[name] <= 1 for name in (*names, "val_clean"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{}, {"latent": {"weight": 0}, "image": {"weight": 0}, "clean": {"weight": 1}}])
def test_validation_does_not_touch_the_training(
    data: ManifoldSet, make_config: MakeConfig, generator: StyleGAN2, tmp_path: Path, objective: dict[str, Any]
) -> None:
    """The same training examples, once with and once without held-out ones measured after every epoch."""
    config = make_config(training={"epochs": 3, "lr_epochs": [0, 3]}, objective=objective)
    index, _ = held_out_positions(len(data), config.training)
    columns = {name: getattr(data, name)[index] for name in ("on_manifold", "natural", "label", "w")}
    only = ManifoldSet(id=[data.id[i] for i in index], class_names=data.class_names, manifest=data.manifest, **columns)
    sha = data.manifest["generator_sha256"]
    trainer.train(config, data, generator, sha, LocalContext(tmp_path / "with"))
    without = make_config(training={"epochs": 3, "lr_epochs": [0, 3], "val_examples": 0}, objective=objective)
    # the order of the smaller set is the same permutation of the same examples
    trainer.train(without, only, generator, sha, LocalContext(tmp_path / "without"))
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_metrics_and_run_say_what_was_trained(train: Train, make_config: MakeConfig, tmp_path: Path, data: ManifoldSet) -> None:
    config, reports = make_config(data={"source": "another", "resize": "pad"}), []
    train(config, tmp_path, reports.append)
    run = checkpoint.read_run(tmp_path / "checkpoint")
    assert run["epoch"] == 2
    assert [timeless(m) for m in run["history"]] == [timeless(m) for m in reports]
    made = DataConfig.model_validate(data.manifest["data"])
    assert made.resize == "crop"
    assert Config.model_validate(run["config"]) == config.model_copy(update={"data": made}), "images are those of the set"
    expected = {f"train_{term}_{what}" for term in ("image", "latent") for what in ("loss", "accuracy")}
    assert expected | {"train_loss", "val_clean", "val_robust", "epoch", "lr"} <= set(reports[-1])
    assert all(np.isfinite(value) for value in reports[-1].values())
    half = (reports[-1]["train_image_loss"] + reports[-1]["train_latent_loss"]) / 2
    assert reports[-1]["train_loss"] == pytest.approx(half, rel=1e-5)


def test_training_learns(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    """Brightness classes are easy: a dozen epochs of standard training know most of them."""
    objective = {"clean": {"weight": 1}, "image": {"weight": 0, "eps": 0.001}, **NO_LATENT}
    training = {"epochs": 12, "lr_epochs": [0, 12], "val_examples": 0}
    metrics = train(make_config(objective=objective, training=training), tmp_path)
    assert metrics["train_clean_accuracy"] > 0.7


def test_natural_images_train_image_space_methods(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    metrics = train(make_config(training=NATURAL, objective=NO_LATENT), tmp_path)
    assert "val_image" in metrics
    assert "val_latent" not in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": NATURAL}, r"objective\.latent needs training\.images on_manifold"),
        ({"training": {"crop_padding": 8}, "objective": NO_LATENT}, r"crop_padding 8 leaves nothing of 8 pixels .* less than 8$"),
        ({"training": {"val_examples": 24}}, r"training\.val_examples is 24, but the training split has 24"),
        ({"classifier": {"name": "nonsense"}}, r"classifier\.name 'nonsense' is not known; choose 'digits_cnn'.*resnet18"),
        ({"classifier": {"name": "digits_cnn", "std": [1, 1, 1]}}, r"classifier\.std has 3 values, images have 1"),
    ],
)
def test_what_cannot_be_trained(
    train: Train, make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_config(**changes), tmp_path)


def test_another_generator_is_refused(data: ManifoldSet, generator: StyleGAN2, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made with generator .*, but the one given is another \(0000"):
        trainer.train(make_config(), data, generator, "0" * 64, LocalContext(tmp_path))


@pytest.mark.parametrize("objective", [{}, {"clean": {"weight": 1}, "image": {"weight": 0}, **NO_LATENT}])
def test_divergence_is_explained(train: Train, make_config: MakeConfig, tmp_path: Path, objective: dict[str, Any]) -> None:
    config = make_config(training={"lr_values": [1e20, 1e20], "val_examples": 0}, objective=objective)
    with pytest.raises(UserError, match=r"lower training\.lr_values"):
        train(config, tmp_path)


def test_standard_training_is_plain_sgd(train: Train, make_config: MakeConfig, tmp_path: Path, data: ManifoldSet) -> None:
    """The loop written out: the rate of every iteration from the knots, momentum, weight decay, batches in order."""
    training = {"lr_epochs": [0, 1, 2], "lr_values": [0, 0.1, 0.01], "weight_decay": 0.01, "momentum": 0.8, "val_examples": 0}
    train(make_config(objective={"clean": {"weight": 1}, "image": {"weight": 0}, **NO_LATENT}, training=training), tmp_path)
    # a training of one step that does not move gives the weights to start from
    still = {"lr_values": [0, 0], "epochs": 1, "val_examples": 0, "batch_size": 24}
    train(make_config(training=still), tmp_path / "still")
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), 1, 3)
    learned = {key for key, _ in network.named_parameters()}
    start = weights(tmp_path / "still")
    network.load_state_dict({key: start[key] if key in learned else value for key, value in network.state_dict().items()})
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for epoch in range(2):
        dealt = epoch_batches(data, np.arange(24), images="on_manifold", batch_size=8, epoch=epoch, seed=0)
        for step, batch in enumerate(dealt):
            rate = float(np.interp(epoch + step / 3, [0, 1, 2], [0, 0.1, 0.01]))
            loss = torch.nn.functional.cross_entropy(network(batch.x_BCHW), batch.y_B)
            slopes = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for p, v, slope in zip(network.parameters(), velocity, slopes, strict=True):
                    v.mul_(0.8).add_(slope + 0.01 * p)
                    p.sub_(rate * v)
    torch.testing.assert_close(weights(tmp_path), network.state_dict(), atol=1e-5, rtol=1e-4)


def test_every_epoch_starts_its_attacks_elsewhere(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    """With a rate of 0 and a search that ends where it starts only that start moves an epoch's loss."""
    objective = {"clean": {"weight": 1}, "image": {"weight": 1, "eps": 0.2, "steps": 1, "method": "random"}, **NO_LATENT}
    training = {"epochs": 3, "lr_epochs": [0, 3], "lr_values": [0, 0], "batch_size": 24, "val_examples": 0}
    reports: list[Mapping[str, float]] = []
    train(make_config(objective=objective, training=training), tmp_path, reports.append)
    clean, attacked = ([r[f"train_{name}_loss"] for r in reports] for name in ("clean", "image"))
    assert clean == pytest.approx([clean[0]] * 3, abs=1e-5)
    assert min(abs(attacked[i] - attacked[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


def test_other_seeds_begin_with_other_weights(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    first = []
    for seed in (0, 1):
        still = {"seed": seed, "epochs": 1, "lr_values": [0, 0], "val_examples": 0, "batch_size": 24}
        train(make_config(training=still), tmp_path / str(seed))
        network, _ = checkpoint.load_classifier(tmp_path / str(seed) / "checkpoint")
        first.append(next(network.parameters()))
    assert not torch.equal(*first)


def test_what_is_reported_of_an_epoch_is_its_own_rate_and_time(train: Train, make_config: MakeConfig, tmp_path: Path) -> None:
    """The rate where it ends; and its images took no longer than all of the training."""
    knots = {"epochs": 3, "lr_epochs": [0, 1, 2, 3], "lr_values": [0, 0.04, 0.02, 0.01], "val_examples": 0}
    reports: list[Mapping[str, float]] = []
    began = time.monotonic()
    train(make_config(training=knots), tmp_path, reports.append)
    assert 0 < sum(24 / report["examples_per_second"] for report in reports) <= time.monotonic() - began
    assert [report["lr"] for report in reports] == pytest.approx([0.04, 0.02, 0.01])
