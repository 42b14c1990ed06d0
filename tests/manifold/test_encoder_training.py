"""The encoder's training: against a plain loop, on samples of every layer, and what it refuses."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import SHA, settings
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer
from dmat_ray.manifold.encoder import Encoder, untrained
from dmat_ray.manifold.encoder_trainer import fresh_errors, result_of, sample_w, train_encoder
from dmat_ray.manifold.gan import StepDraws
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(generator: StyleGAN2, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, list[dict[str, float]], Path]:
    """An encoder of `generator` after a second of training, its reports, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    reports: list[dict[str, float]] = []
    context = LocalContext(folder, lambda m: reports.append(dict(m)))
    return train_encoder(settings(kimg=8, report_kimg=0.8), generator, SHA, context), reports, folder / "checkpoint"


def test_a_step_is_the_plain_one(make_generator: Any, tmp_path: Path) -> None:
    """Twenty steps of Adam by torch's own, with the loss and the samples written out."""
    generator = make_generator()
    for layer in generator.synth.images:
        layer.conv.weight *= 5  # many pixels outside [0, 1], where samples are clamped and what is compared is not
    config = settings(batch_size=6, kimg=0.12, w_weight=0.3, l1_weight=2.0, l2_weight=5.0, spread=0.4, style_mixing=0.6)
    torch.manual_seed(derive(config.seed, "encoder weights") % 2**31)
    plain = untrained(config, generator)
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.lr)
    expected = []
    for i in range(1, 21):  # the rate grows over the first tenth of them
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * (i - 1) / 20)) / 2 * (0.5 if i == 1 else 1)
        draws = StepDraws(derive(config.seed, "encoder"), i, 6)
        one, two = generator.map(draws.normal(8)), generator.map(draws.normal(8))
        cut, coin = draws.integers(1, generator.num_ws).tolist(), draws.uniform().tolist()
        noise = draws.normal(generator.num_ws, 8)
        rows = []
        for k in range(6):
            layers = [two[k] if coin[k] < 0.6 and layer >= cut[k] else one[k] for layer in range(generator.num_ws)]
            rows.append(torch.stack(layers) + 0.4 * generator.w_std * noise[k])
        w = torch.stack(rows)
        x = ((generator.synth(w) + 1) / 2).clamp(0, 1)
        code = plain(x)
        y = (generator.synth(code) + 1) / 2
        parts = F.mse_loss((code - generator.w_mean) / generator.w_std, (w - generator.w_mean) / generator.w_std), F.l1_loss(y, x)
        loss = 0.3 * parts[0] + 2.0 * parts[1] + 5.0 * F.mse_loss(y, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    reports: list[dict[str, float]] = []
    context = LocalContext(tmp_path, lambda m: reports.append(dict(m)))
    encoder = train_encoder(config.model_copy(update={"report_kimg": 0.006}), generator, SHA, context)
    assert [r["loss"] for r in reports] == pytest.approx(expected, rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_samples_keep_their_class_and_cover_every_layer(make_generator: Any) -> None:
    generator = make_generator()
    w = sample_w(generator, settings(spread=0, style_mixing=0), StepDraws(1, 1, 500))
    assert torch.equal(w, w[:, :1].expand_as(w)), "one z, all layers"
    mixed = sample_w(generator, settings(spread=0, style_mixing=1), StepDraws(1, 1, 500))
    assert torch.equal(mixed[:, 0], w[:, 0])
    assert not (mixed[:, -1] == w[:, 0]).all(dim=1).any()
    spread = sample_w(generator, settings(spread=0.5, style_mixing=0), StepDraws(1, 1, 500))
    noise = (spread - w) / generator.w_std
    assert noise.std(dim=(0, 2)).tolist() == pytest.approx([0.5] * generator.num_ws, rel=0.05)
    assert (noise[:, 0] * noise[:, 1]).mean().item() == pytest.approx(0, abs=0.02), "every layer's is its own"


def test_a_generator_of_one_layer_has_nothing_to_mix(make_generator: Any) -> None:
    generator = make_generator()
    generator.num_ws = 1
    w = sample_w(generator, settings(spread=0, style_mixing=1), StepDraws(1, 1, 5))
    assert torch.equal(w, generator.mapping(StepDraws(1, 1, 5).normal(8)))


def test_a_conditional_generator_mixes_within_a_class(make_generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    generator.num_classes = 3
    seen: list[Tensor] = []
    monkeypatch.setattr(generator, "mapping", lambda z: (seen.append(z), StyleGAN2.mapping(generator, z))[1])
    sample_w(generator, settings(), StepDraws(1, 1, 100))
    assert torch.equal(generator.class_of(seen[0]), generator.class_of(seen[1]))
    assert not (seen[0] == seen[1]).any()


def test_a_short_training_learns(generator: StyleGAN2, trained: Any) -> None:
    encoder, reports, checkpoint = trained
    assert [r["kimg"] for r in reports] == pytest.approx([0.8 * k for k in range(1, 11)])
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"]
    errors = fresh_errors(encoder, generator, settings(), samples=256)
    assert errors["l1"] < 0.6 * errors["l1_of_mean"]
    assert errors["l1_of_w"] < 0.6 * errors["l1_of_mean"]
    assert errors["samples"] == 256
    # against numbers computed here, on samples drawn here
    w = generator.mapping(torch.randn(400, 8, generator=torch.Generator().manual_seed(9)))
    x = generator.synthesis(w)
    l1 = (generator.synthesis(encoder(x)) - x).abs().mean().item()
    assert l1 == pytest.approx(errors["l1_of_w"], rel=0.2)
    result = result_of(checkpoint, settings(kimg=8, report_kimg=0.8), generator, SHA)
    half = encoder.head.weight.half().float()
    assert torch.equal(result.head.weight, half)


def test_bf16_learns_about_the_same(generator: StyleGAN2, tmp_path: Path) -> None:
    reports: dict[str, list[dict[str, float]]] = {"float32": [], "bf16": []}
    for precision, found in reports.items():
        context = LocalContext(tmp_path / precision, lambda m, found=found: found.append(dict(m)))
        train_encoder(settings(precision=precision), generator, SHA, context)
    full, lowered = reports["float32"][-1], reports["bf16"][-1]
    assert lowered["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert lowered["loss"] != full["loss"]


def test_a_finished_training_is_not_trained_again(generator: StyleGAN2, trained: Any) -> None:
    encoder, _, checkpoint = trained
    reports: list[Any] = []
    config = settings(kimg=8, report_kimg=0.8)
    again = train_encoder(config, generator, SHA, LocalContext(checkpoint.parent, reports.append))
    assert reports == []
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(generator: StyleGAN2, trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[2], tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"trained with other settings under encoder\.\*"):
        train_encoder(settings(), generator, SHA, LocalContext(tmp_path))
    config = settings(kimg=8, report_kimg=0.8)
    with pytest.raises(UserError, match="trained for another generator"):
        train_encoder(config, generator, "cd" * 32, LocalContext(tmp_path))
    (tmp_path / "checkpoint" / "encoder_progress.json").unlink()
    with pytest.raises(UserError, match=r"has no encoder_progress\.json, and there is none before it"):
        train_encoder(config, generator, SHA, LocalContext(tmp_path))


def test_a_training_that_diverges_says_so(generator: StyleGAN2, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged.*lower encoder\.lr \(now 1e\+20\)"):
        train_encoder(settings(lr=1e20), generator, SHA, LocalContext(tmp_path))
    assert not (tmp_path / "checkpoint").exists()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.batch_size 9 must be a multiple of 2.*cluster\.train_workers"):
        encoder_trainer.check_workers(settings(batch_size=9), 2)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="all 0: there is nothing to minimise"):
        settings(w_weight=0, l1_weight=0, l2_weight=0)
