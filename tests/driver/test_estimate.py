"""Estimates of --dry-run against the operations that PyTorch counts while the thing itself runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmat_ray import dry_run, estimate, threats
from dmat_ray.attack import attack
from dmat_ray.config import Config, ImageRow, LatentRow, PerceptualRow
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.evaluation import probes
from dmat_ray.evaluation.evaluation import Evaluator, evaluate_here
from dmat_ray.evaluation.units import chosen
from dmat_ray.exchange import model_import
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer, gan_step
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.training import trained_models
from dmat_ray.training.step import TrainingStep
from dmat_ray.types import Batch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLASSES = ("a", "b", "c")
MakeConfig = Callable[..., Config]


class _Untracked(SimpleNamespace):
    """In place of the counter's tracker of modules, which gradients of leaves are too much for."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@contextmanager
def counting() -> Iterator[Any]:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked(parents={"Global"})  # type: ignore[assignment]
    with counter:
        yield counter


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"clean": {"weight": 1}, "image": {"weight": 0}, "latent": {"weight": 0}},
        {"image": {"weight": 6, "eps": 0.1, "steps": 3, "divergence": "kl"}, "latent": {"weight": 0}},
        {"more": {"both": {"threat": "joint", "weight": 1, "steps": 4, "restarts": 2}}},
        # two of equal work, of which a step has one
        {"terms": "sample", "latent": {"weight": 0}, "more": {"again": {"threat": "image", "weight": 1, "eps": 0.1, "steps": 2}}},
    ],
    ids=["dmat", "standard", "trades", "joint", "sampled"],
)
def test_a_training_step_is_counted(
    make_config: MakeConfig, generator: StyleGAN2, make_batch: Callable[..., Batch], tmp_path: Path, objective: dict[str, Any]
) -> None:
    config = make_config(objective=objective, training={"val_examples": 0, "epochs": 3})
    network = classifiers.build(config.classifier, channels=1, num_classes=4)
    step = TrainingStep(config, network, generator, LocalContext(tmp_path, print))
    batch = make_batch(8)
    step(batch, 0, 0, 0.1)  # the first looks at the network, once
    with counting() as counter:
        step(batch, 0, 0, 0.1)
    found = estimate.train(config, estimate.passes(config, generator, 4), generator, images=8)
    truth = 3 * counter.get_total_flops()
    # the gradient to the images, which training does not need, and the output of an attack, which it does not look at
    assert truth <= found.flops <= 1.25 * truth


def test_a_projection_is_counted(make_config: MakeConfig, generator: StyleGAN2) -> None:
    config = make_config(projection={"steps": 30, "lpips": 0, "start": "mean", "batch_size": 4})
    x = generator.synthesis(generator.w_mean.expand(4, generator.num_ws, -1)).clamp(0, 1)
    with counting() as counter:
        Projector(generator, config.projection, torch.device("cpu")).project(x, list("abcd"))
    found = estimate.project(config, estimate.passes(config, generator, 4), images=4)
    assert counter.get_total_flops() == pytest.approx(found.flops, rel=0.1)


@pytest.mark.parametrize(
    "penalties", [{"r1_gamma": 0}, {"r1_interval": 1, "path_length": 2, "path_interval": 1}], ids=["none", "all"]
)
def test_a_step_of_a_generator_is_counted(make_config: MakeConfig, tmp_path: Path, penalties: dict[str, Any]) -> None:
    architecture = {"resolution": 16, "channels": 1, "num_classes": 4, "z_dim": 16, "w_dim": 16, "channel_max": 32}
    config = make_config(gan={"architecture": architecture, "batch_size": 8, "kimg": 0.016, "mode_seeking": 0, **penalties})
    training = gan_step.GanTraining(config.gan, LocalContext(tmp_path, print))
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8) % 4
    with counting() as counter:
        training.step(1, images, labels)
    truth = 2 * counter.get_total_flops()
    # tensors of a penalty's second pass whose gradient is zero, and the mapping, which is not counted
    assert 0.95 * truth <= estimate.train_generator(config, images=8).flops <= 1.25 * truth


def test_a_step_of_an_encoder_is_counted(make_config: MakeConfig, generator: StyleGAN2, tmp_path: Path) -> None:
    config = make_config(encoder={"batch_size": 4, "kimg": 0.012, "width": 8, "width_max": 16})
    training = encoder_trainer._Training(config.encoder, generator, LocalContext(tmp_path, print))
    with counting() as counter:
        training.step(1)
    assert estimate.train_encoder(config, generator).flops == pytest.approx(3 * counter.get_total_flops(), rel=0.1)


def test_lpips_is_counted(make_config: MakeConfig) -> None:
    from dmat_ray.networks.perceptual import Perceptual

    config = make_config(projection={"lpips": 1, "lpips_net": "vgg", "lpips_weights": "random"})
    perceptual, x = Perceptual("vgg", "random", 0), torch.rand(1, 1, 32, 32)
    features = perceptual.features(x)
    with counting() as counter:
        x.requires_grad_()
        torch.autograd.grad(perceptual.distance(x, features).sum(), x)
    assert estimate._lpips(config.projection, (1, 1, 32, 32)) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    "row",
    [
        ImageRow(name="PGD", eps=0.1, steps=5, restarts=2),
        ImageRow(name="T", eps=0.1, steps=5, method="apgd", loss="dlr", targets=3),
        ImageRow(name="S", eps=0.1, steps=30, method="square"),
        LatentRow(name="OM", eps=0.1, steps=5),
    ],
    ids=lambda row: row.name,
)
def test_an_attack_is_counted(
    make_config: MakeConfig, generator: StyleGAN2, make_batch: Callable[..., Batch], row: ImageRow | LatentRow
) -> None:
    config = make_config()
    network: nn.Module = classifiers.build(config.classifier, channels=1, num_classes=4).eval()
    batch = make_batch(4)
    with counting() as counter:
        attack(network, threats.build(row, generator), batch, row, seed=0, purpose="test")
    one = estimate.passes(config, generator, 4)
    assert counter.get_total_flops() == pytest.approx(4 * estimate.attack(one, row), rel=0.15)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["pgd", "lagrange", "momentum", "apgd", "lpa", "random"])
def test_a_perceptual_attack_is_counted(
    make_config: MakeConfig, generator: StyleGAN2, make_batch: Callable[..., Batch], method: Any
) -> None:
    """Its network by far outweighs the classifier, also where projection does without LPIPS."""
    config = make_config(projection={"lpips": 0, "l1": 1})
    network: nn.Module = classifiers.build(config.classifier, channels=1, num_classes=4).eval()
    row = PerceptualRow(name="P", eps=0.5, steps=5, method=method, weights="random")
    with counting() as counter:
        attack(network, threats.build(row, generator), make_batch(2), row, seed=0, purpose="test")
    one = estimate.passes(config, generator, 4)
    assert counter.get_total_flops() == pytest.approx(2 * estimate.attack(one, row), rel=0.15)


def test_every_training_is_counted_with_its_own_network(make_config: MakeConfig, set_folder: Path) -> None:
    small = make_config(manifold_set=str(set_folder))
    large = make_config(manifold_set=str(set_folder), classifier={"name": "resnet18"})
    one, two, judged = dry_run.stages(small, train=[small, large], models=2)
    assert two.flops > 3 * one.flops
    (alone,) = dry_run.stages(small, models=2)
    assert judged.flops > 3 * alone.flops, "as if all were the dearest"


def test_a_split_without_usable_images_is_one_of_none(make_config: MakeConfig, set_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(set_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["usable"].pop("test")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = make_config(manifold_set=str(folder))
    assert [stage.images for stage in dry_run.stages(config, train=[config], models=1)] == [manifest["usable"]["train"], 0]


PIXEL_ROWS: list[dict[str, Any]] = [
    {"threat": "clean"},
    {"threat": "image", "name": "FGSM", "eps": 0.1, "steps": 1},
    {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 5, "restarts": 2, "curve": [0.2, 0.1, 0.3]},
    {"threat": "image", "name": "T", "eps": 0.1, "steps": 4, "method": "apgd", "targets": 2},
    {"threat": "latent", "name": "OM", "eps": 0.1, "steps": 5},
    {"threat": "fog", "name": "fog", "eps": 0.1, "steps": 3},
]
SEEN_ROWS = [
    {"threat": "perceptual", "name": method, "eps": 0.5, "steps": 2, "method": method, "weights": "random"}
    for method in ("pgd", "lagrange")
]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (PIXEL_ROWS, {"check_examples": 3}),
        (PIXEL_ROWS[:3], {"check_examples": 0, "transfer": ["clean", "FGSM"], "sets": ["natural"]}),
        (SEEN_ROWS, {"check_examples": 1, "limit": 2, "sets": ["natural"]}),
    ],
    ids=["pixels and w", "transferred", "perceptual"],
)
def test_an_evaluation_is_counted(
    make_config: MakeConfig, generator: StyleGAN2, set_folder: Path, rows: list[dict[str, Any]], changes: dict[str, Any]
) -> None:
    """With what is measured for the checks, and what each model says of the other's images."""
    suite = {"attacks": rows, "batch_size": 4, "limit": 4, **changes}
    config = make_config(projection={"lpips": 0, "l1": 1}, evaluation=suite)
    data = open_set(set_folder, "test")
    networks = {name: classifiers.build(config.classifier, channels=1, num_classes=3).eval() for name in ("one", "other")}
    evaluator = Evaluator(config.evaluation, data, generator, networks.__getitem__, list(networks), torch.device("cpu"))
    where = chosen(data.id, config.evaluation)
    with counting() as counter:
        evaluate_here(evaluator)
        for unit in probes.units(list(networks), config.evaluation, where):
            probes.probe(evaluator, unit)
    one = estimate.passes(config, generator, 3)
    found = estimate.evaluate(config, [one] * 2, len(data))
    # the rest is the look at two images that a copy for attacks is made with, once a model
    assert counter.get_total_flops() == pytest.approx(found.flops, rel=0.05)


def test_an_evaluation_adds_up(make_config: MakeConfig, generator: StyleGAN2) -> None:
    rows = [
        {"threat": "clean"},
        {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 5, "curve": [0.2, 0.3]},
        {"threat": "latent", "name": "OM", "eps": 0.1, "steps": 5},
        {"threat": "corruption", "name": "fog", "kind": "fog", "severity": 1},
    ]
    config = make_config(evaluation={"attacks": rows, "limit": 7, "check_examples": 0})
    one = estimate.passes(config, generator, 4)
    image, latent = (estimate.attack(one, row) for row in config.evaluation.attacks[1:3])  # type: ignore[arg-type]
    assert image == 5 * one.classifier_back + one.classifier
    # two sets, natural images have no w; three budgets; what the model says of each row's image, and of the clean one
    looks = 2 * (2 * 5 + 1) * one.classifier
    assert estimate.evaluate(config, [one, one], 100).flops == 7 * 2 * (2 * 3 * image + latent + looks)


def test_models_that_are_there_are_counted_with_their_own_networks(
    make_config: MakeConfig, generator: StyleGAN2, set_folder: Path, tmp_path: Path
) -> None:
    rows = [{"threat": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 5}]
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), evaluation={"attacks": rows})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config.to_json()))
    networks = {"small": "digits_cnn", "large": "resnet18"}
    costs = {}
    for name, network in networks.items():
        of = make_config(classifier={"name": network})
        built, about = classifiers.build(of.classifier, 1, 3).eval(), checkpoint.describe_run(of, CLASSES, 1, 8, None, None)
        checkpoint.save(tmp_path / "models" / name, built, {**about, "finished": True, "history": []})
        costs[name] = estimate.evaluate(config, [estimate.passes(of, generator, 3)], 12).flops
    torch.jit.trace(built, torch.zeros(2, 1, 8, 8)).save(str(tmp_path / "large.pt"))
    program = model_import.read_model(tmp_path / "large.pt", config.classifier, None, 1, 8, 3)
    model_import.save_model(program, tmp_path / "large.pt", config, CLASSES, 1, 8, tmp_path / "models" / "program")
    costs["program"] = costs["large"]
    assert costs["large"] > 3 * costs["small"]
    for names in (["small"], ["large"], ["program"], ["small", "large", "program"]):
        found = dry_run.evaluation_stage(config, trained_models.named_folders(config, names))
        assert found.flops == sum(costs[name] for name in names)
        assert (found.images, found.work) == (12, f"2 rows, {len(names)} model{'s' if len(names) > 1 else ''}")

    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--preset", str(tmp_path / "settings.yaml"), "--dry-run"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    (row,) = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    assert row[2].strip() == "2 rows, 3 models"
    assert float(row[5]) == pytest.approx(sum(costs.values()) / 1e12, rel=0.01)
    with pytest.raises(UserError, match="models/lagre'; those of this output are large, program, small"):
        trained_models.named_folders(config, ["small", "lagre"])
    checkpoint.save(tmp_path / "models" / "colour", classifiers.build(of.classifier, 3, 3), {**about, "channels": 3})
    with pytest.raises(UserError, match=r"model 'colour' takes 3x8x8 images, the set has \[1, 8, 8\]"):
        dry_run.evaluation_stage(config, {"colour": tmp_path / "models" / "colour"})


def test_hours_are_those_of_all_workers() -> None:
    assert estimate.Stage("s", 1, "", 3600 * 2e12, 4).hours(2.0) == 1.0


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "--preset", "demo", "--output", str(tmp_path / "out")]
    command += ["--dry-run", "--training.epochs", "4", "--cluster.tflops", "0.5", "--cluster.price", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "\n  epochs: 4\n" in done.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [
        *("project", "train standard", "train at", "train om_at", "train dmat"), "evaluate", "all"
    ]  # fmt: skip
    assert [row[1] for row in rows[:2]] == ["2,300", "2,000"]
    every, hours, _, cost = (float(value) for value in rows[-1][-4:])
    assert every == pytest.approx(sum(float(row[-4]) for row in rows[:-1]), rel=0.02)
    assert hours == pytest.approx(every / 0.5 / 3600, rel=0.02)
    assert cost == pytest.approx(1000 * hours, rel=0.02)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_generator_reads_no_image(make_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(b"no image")
    data = {"source": str(tmp_path), "resolution": 16, "channels": 1, "test_share": 0.34}
    architecture = {"resolution": 16, "channels": 1, "num_classes": 2}
    (stage,) = dry_run.generator_stages(make_config(data=data, gan={"kimg": 7, "architecture": architecture}))
    assert (stage.name, stage.images, stage.work) == ("generator", 4, "7 thousand shown")
    assert stage.flops > 7000 * 1e6
    with pytest.raises(UserError, match="num_classes is 10, but the images have 2 class"):
        dry_run.generator_stages(make_config(data=data, gan={"architecture": {**architecture, "num_classes": 10}}))
    with pytest.raises(UserError, match=r"gan\.architecture makes"):
        dry_run.generator_stages(make_config(data=data, gan={"architecture": {**architecture, "resolution": 32}}))
