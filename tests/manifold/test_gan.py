"""Training of a generator: losses against their formulas, and a training that must learn something."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from dmat_ray.config import GanConfig, StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import gan, gan_trainer
from dmat_ray.manifold.discriminator import Discriminator
from dmat_ray.manifold.stylegan2 import StyleGAN2

SHAPE = StyleGAN2Config(
    resolution=8, channels=1, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8, num_classes=3
)


def settings(**values: Any) -> GanConfig:
    short = {"batch_size": 8, "kimg": 0.08, "report_kimg": 0.04, "snapshot_kimg": 0.04}
    quality = {"network": "none", "samples": 60, **values.pop("quality", {})}
    return GanConfig.model_validate({"architecture": SHAPE, **short, "quality": quality, **values})


def train(config: GanConfig, images: Tensor, labels: Tensor, folder: Path, reports: list[Mapping[str, float]]) -> StyleGAN2:
    return gan_trainer.train_generator(config, images, labels, LocalContext(folder, reports.append))


def test_losses_are_those_of_goodfellow() -> None:
    real, fake = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, -3.0, 1.0], dtype=torch.float64)

    def sigmoid(x: Tensor) -> np.ndarray:
        return 1 / (1 + np.exp(-x.numpy()))

    assert gan.generator_loss(fake).item() == pytest.approx(-np.log(sigmoid(fake)).mean())
    expected = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()
    assert gan.discriminator_loss(real, fake).item() == pytest.approx(expected)


@pytest.fixture
def discriminator() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    return Discriminator(SHAPE).double()


def test_r1_is_the_squared_norm_of_a_measured_gradient(discriminator: Callable[[Tensor], Tensor]) -> None:
    x, h = torch.rand(4, 1, 8, 8, dtype=torch.float64), 1e-6
    penalty = gan.r1_penalty(discriminator, x)
    slopes = torch.zeros_like(x)
    with torch.no_grad():
        for k in range(x.numel()):
            up, down = x.clone(), x.clone()
            up.view(-1)[k] += h
            down.view(-1)[k] -= h
            slopes.view(-1)[k] = (discriminator(up).sum() - discriminator(down).sum()) / (2 * h)
    assert penalty.item() == pytest.approx((slopes**2).sum().item() / 4, rel=1e-5)


def test_r1_has_a_gradient_itself(discriminator: Discriminator) -> None:
    x, h = torch.rand(4, 1, 8, 8, dtype=torch.float64), 1e-6
    gan.r1_penalty(discriminator, x).backward()
    weight = discriminator.stem.weight
    assert weight.grad is not None
    slope = weight.grad.view(-1)[0].item()
    with torch.no_grad():
        weight.view(-1)[0] += h
    up = gan.r1_penalty(discriminator, x).item()
    with torch.no_grad():
        weight.view(-1)[0] -= 2 * h
    down = gan.r1_penalty(discriminator, x).item()
    assert slope == pytest.approx((up - down) / (2 * h), rel=1e-4)


def test_style_mixing_joins_two_codes() -> None:
    torch.manual_seed(0)
    generator = StyleGAN2(SHAPE)
    plain, labels = gan.mixed_w(generator, 0.0, gan.StepDraws(0, 1, 32))
    assert labels is not None
    assert labels.shape == (32,)
    assert torch.equal(plain, plain[:, :1].expand_as(plain))
    mixed, labels = gan.mixed_w(generator, 1.0, gan.StepDraws(0, 1, 32), pairs=True)
    changes = (mixed[:, 1:] != mixed[:, :-1]).any(dim=2).sum(dim=1)
    assert changes.tolist() == [1] * 32, "one crossover each"
    assert labels is not None
    assert torch.equal(labels[0::2], labels[1::2])


def test_classes_of_samples_are_drawn_from_the_labels() -> None:
    """Of 10 labels, by Pearson's test; of as many workers as there may be; and equally often without labels."""
    torch.manual_seed(0)
    generator, labels = StyleGAN2(SHAPE), torch.tensor([0, 2, 0, 1, 0, 0, 1, 0, 1, 0])
    for given, share in ((labels, [0.6, 0.3, 0.1]), (None, [1 / 3] * 3)):
        for pairs in (False, True):
            drawn = gan.mixed_w(generator, 0.5, gan.StepDraws(0, 1, 4000), labels=given, pairs=pairs)[1]
            assert drawn is not None
            free = drawn[0::2] if pairs else drawn
            assert chisquare(np.bincount(free), np.array(share) * len(free)).pvalue > 0.01
            assert not pairs or torch.equal(free, drawn[1::2])
            parts = [gan.mixed_w(generator, 0.5, gan.StepDraws(0, 1, 4000, r, 2), labels=given, pairs=pairs)[1] for r in (0, 1)]
            assert torch.equal(torch.cat(parts), drawn)


def test_draws_of_a_step_do_not_depend_on_the_number_of_workers() -> None:
    whole = gan.StepDraws(3, 7, 8)
    parts = [gan.StepDraws(3, 7, 8, rank, 2) for rank in range(2)]
    for draw in (lambda d: d.normal(2, 3), lambda d: d.uniform(), lambda d: d.integers(1, 5), lambda d: d.normal(4)):
        torch.testing.assert_close(draw(whole), torch.cat([draw(part) for part in parts]), rtol=0, atol=0)
    other_step, other_seed = gan.StepDraws(3, 8, 8).uniform(), gan.StepDraws(4, 7, 8).uniform()
    first = gan.StepDraws(3, 7, 8).uniform()
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_seed)
    blank = torch.empty(4, 3, 8, 8, dtype=torch.float64)
    own = [gan.StepDraws(3, step, 8, rank, 2).own_normal(blank) for step, rank in ((7, 0), (7, 1), (8, 0))]
    assert own[0].dtype == torch.float64
    assert torch.equal(own[0], gan.StepDraws(3, 7, 8, 0, 2).own_normal(blank))
    assert torch.corrcoef(torch.stack(own).flatten(1)).numpy() == pytest.approx(np.eye(3), abs=0.15)
    assert kstest(torch.stack(own).flatten(), "norm").pvalue > 0.01
    assert int(gan.StepDraws(0, 0, 500).integers(1, 5).min()) >= 1
    assert int(gan.StepDraws(0, 0, 500).integers(1, 5).max()) == 4


def test_path_lengths_are_norms_of_a_measured_jacobian() -> None:
    """J_w^T y of each layer by central differences, its norm over D, and the quadratic mean of the layers."""
    torch.manual_seed(0)
    generator = StyleGAN2(SHAPE).double()
    w = torch.randn(2, generator.num_ws, 8, dtype=torch.float64, requires_grad=True)
    y, h = torch.randn(2, 1, 8, 8, dtype=torch.float64), 1e-6
    slopes = torch.zeros(2, generator.num_ws, 8, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(generator.num_ws):
            for d in range(8):
                moved = torch.zeros_like(w)
                moved[:, layer, d] = h
                change = generator.synth(w + moved) - generator.synth(w - moved)
                slopes[:, layer, d] = (change * y / 8).sum(dim=(1, 2, 3)) / (2 * h)
    expected = (slopes**2).sum(dim=2).mean(dim=1).sqrt()
    lengths = gan.path_lengths(generator.synth, w, y)
    torch.testing.assert_close(lengths, expected, atol=1e-7, rtol=1e-5)
    lengths.sum().backward()
    assert generator.synth.const.grad is not None, "the penalty has a gradient itself"


def test_mode_seeking_is_the_inverse_distance_of_pairs() -> None:
    x = torch.rand(6, 1, 4, 4) * 2 - 1
    distances = [np.abs((x[i] - x[i + 1]).numpy()).mean() for i in (0, 2, 4)]
    assert gan.mode_seeking(x).item() == pytest.approx(1 / np.mean(distances), rel=0.02)


@pytest.mark.slow
def test_training_learns_the_brightness_of_its_classes(tmp_path: Path) -> None:
    """Three classes of one grey level each, on noise: the samples of a class come to have its level."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    images = torch.tensor([0.1, 0.5, 0.9])[labels].view(-1, 1, 1, 1) + 0.02 * torch.randn(60, 1, 8, 8, generator=rng)
    reports: list[Mapping[str, float]] = []
    config = settings(
        kimg=1.6, report_kimg=0.8, snapshot_kimg=1.6, ema_kimg=0.1, augment=0, lr_generator=0.02, lr_discriminator=0.02
    )
    generator = train(config, images, labels, tmp_path, reports)
    z = torch.randn(300, 8, generator=rng)
    made = generator.class_of(z)
    level = generator.synthesis(generator.mapping(z)).mean(dim=(1, 2, 3))
    means = [level[made == c].mean().item() for c in range(3)]
    assert means == pytest.approx([0.1, 0.5, 0.9], abs=0.2)
    assert [r["kimg"] for r in reports] == [0.8, 1.6]
    assert all(np.isfinite(v) for r in reports for v in r.values())
    w = generator.mapping(z)[:, 0]
    torch.testing.assert_close(generator.w_mean, w.mean(dim=0), atol=0.3, rtol=0)
    assert not generator.training


def test_training_repeats_by_seed_and_reads_bytes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    one = train(settings(), images, labels, tmp_path / "one", []).state_dict()
    same = train(settings(), images.float() / 255, labels, tmp_path / "same", []).state_dict()
    other = train(settings(seed=1), images, labels, tmp_path / "other", []).state_dict()
    assert all(torch.allclose(one[key], same[key]) for key in one)
    assert not torch.allclose(one["synth.const"], other["synth.const"])


def test_what_does_not_fit_the_architecture_is_refused(tmp_path: Path) -> None:
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    with pytest.raises(UserError, match=r"images are \(3, 8, 8\).*gan\.architecture makes \(1, 8, 8\)"):
        train(settings(), images.expand(-1, 3, -1, -1), labels, tmp_path, [])
    with pytest.raises(UserError, match=r"num_classes is 3, but the images have 3 class\(es\), labels up to 5"):
        train(settings(), images, labels + 3, tmp_path, [])
    with pytest.raises(UserError, match=r"num_classes is 3, but the images have 2 class\(es\).*or to 0"):
        train(settings(), images, labels % 2, tmp_path, [])


def test_an_image_is_judged_beside_its_own_group() -> None:
    """Of eight images every other one: one group of four equal ones, and one of others."""
    torch.manual_seed(0)
    judge, x = Discriminator(StyleGAN2Config(resolution=8, channel_base=64)), torch.rand(8, 1, 8, 8)
    x[0::2] = x[:1]
    logits = judge(x)
    for group in (0, 1):
        torch.testing.assert_close(logits[group::2], judge(x[group::2]))
