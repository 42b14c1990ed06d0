"""The search: equal to a peer's, optimal where the optimum is known, and without a trace in the network."""

import math
from collections.abc import Callable
from typing import Any

import foolbox
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import Attacked, attack, kl_to, step_size_of
from dmat_ray.config import AttackConfig, FogThreat, ImageThreat, LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.types import Batch

THREATS = {
    "image linf": ImageThreat(eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.0),
    "latent": LatentThreat(eps=0.3),
    "fog": FogThreat(eps=0.5),
}


def images(count: int = 16, *, seed: int = 0, spread: float = 1.6) -> Batch:
    """Random images, many of their pixels at 0 or 1 if `spread` is above 1."""
    rng = torch.Generator().manual_seed(seed)
    x = ((torch.rand(count, 1, 8, 8, generator=rng) - 0.5) * spread + 0.5).clamp(0, 1)
    return Batch([f"image-{i}" for i in range(count)], x, torch.randint(4, (count,), generator=rng))


def find(network: nn.Module, batch: Batch, settings: threats.ThreatSettings, **how: Any) -> Attacked:
    return attack(network, threats.build(settings, None), batch, AttackConfig(**how), seed=0, purpose="test")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("norm", "eps", "step", "peer"),
    [("linf", 0.1, 0.02, foolbox.attacks.LinfPGD), ("l2", 1.0, 0.2, foolbox.attacks.L2PGD)],
)
def test_pgd_is_that_of_foolbox(
    small_net: nn.Module, norm: Any, eps: float, step: float, peer: Any, dtype: torch.dtype, tolerance: float
) -> None:
    network, batch = small_net.eval().to(dtype), images()
    batch = Batch(batch.id, batch.x_BCHW.to(dtype), batch.y_B)
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    theirs, _, _ = peer(random_start=False, abs_stepsize=step, steps=20)(model, batch.x_BCHW, batch.y_B, epsilons=eps)
    ours = find(network, batch, ImageThreat(norm=norm, eps=eps), steps=20, step_size=step, random_start=False)
    torch.testing.assert_close(ours.x_BCHW, theirs, atol=tolerance, rtol=0)
    assert (theirs - batch.x_BCHW).abs().flatten(1).amax(dim=1).min() > 0.05


def test_fgsm_is_one_signed_step(small_net: nn.Module) -> None:
    batch = images()
    x = batch.x_BCHW.clone().requires_grad_(True)
    F.cross_entropy(small_net.eval()(x), batch.y_B, reduction="sum").backward()
    assert x.grad is not None
    expected = (batch.x_BCHW + 0.1 * x.grad.sign()).clamp(0, 1)
    found = find(small_net, batch, THREATS["image linf"], steps=1, step_size=0.1, random_start=False)
    torch.testing.assert_close(found.x_BCHW, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.loss_B, F.cross_entropy(small_net(expected), batch.y_B, reduction="none"))


class Linear(nn.Module):
    """Two classes: logits (0, w x + b)."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.w, self.b = torch.randn(64, generator=rng), 0.3

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_a_linear_classifier_is_attacked_to_its_optimum(norm: Any, random_start: bool) -> None:
    """Worst loss log(1 + exp(-(margin - eps |w|_dual))); on the way there more steps are never worse."""
    network, batch = Linear(), images(spread=0.4)
    batch = Batch(batch.id, batch.x_BCHW, batch.y_B % 2)
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    sign = (batch.y_B * 2 - 1).numpy()
    margin = sign * (batch.x_BCHW.flatten(1).numpy() @ network.w.numpy() + network.b)
    dual = np.linalg.norm(network.w.numpy(), ord=1 if norm == "linf" else 2)
    optimum = np.logaddexp(0, -(margin - eps * dual))
    losses = []
    for steps in (1, 2, 4, 8, 16, 64):
        how = {"steps": steps, "step_size": eps / 4, "random_start": random_start}
        losses.append(find(network, batch, ImageThreat(norm=norm, eps=eps), **how).loss_B.numpy())
        assert (losses[-1] <= optimum + 1e-4).all()
    assert (np.diff([loss.mean() for loss in losses]) >= -1e-6).all()
    np.testing.assert_allclose(losses[-1], optimum, rtol=1e-3, atol=1e-5)


def test_the_optimum_at_the_border_of_the_pixel_range() -> None:
    network, batch = Linear(), images()
    batch = Batch(batch.id, batch.x_BCHW, batch.y_B % 2)
    x, sign = batch.x_BCHW.flatten(1).numpy(), (batch.y_B * 2 - 1).numpy()
    best = np.clip(x - 0.1 * sign[:, None] * np.sign(network.w.numpy()), 0, 1)
    optimum = np.logaddexp(0, -sign * (best @ network.w.numpy() + network.b))
    found = find(network, batch, ImageThreat(eps=0.1), steps=8, step_size=0.05)
    np.testing.assert_allclose(found.loss_B.numpy(), optimum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", THREATS)
def test_restarts_never_lower_a_loss(small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str) -> None:
    batch, threat = make_batch(12), threats.build(THREATS[name], generator)
    losses = []
    for restarts in (1, 2, 4):
        config = AttackConfig(steps=2, restarts=restarts)
        found = attack(small_net, threat, batch, config, seed=0, purpose="test")
        losses.append(found.loss_B)
        again = F.cross_entropy(small_net.eval()(found.x_BCHW), batch.y_B, reduction="none")
        torch.testing.assert_close(found.loss_B, again)
        torch.testing.assert_close(threat.render(batch, found.theta), found.x_BCHW)
    assert (losses[1] >= losses[0]).all()
    assert (losses[2] >= losses[1]).all()
    assert (losses[2] > losses[0]).any()


@pytest.mark.parametrize("name", THREATS)
def test_an_example_is_attacked_alike_in_any_batch(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str
) -> None:
    batch, threat = make_batch(6), threats.build(THREATS[name], generator)
    config = AttackConfig(steps=3, restarts=2)
    whole = attack(small_net, threat, batch, config, seed=0, purpose="test")
    index = [4, 1]
    part = Batch([batch.id[i] for i in index], batch.x_BCHW[index], batch.y_B[index], batch.w_BLD[index])
    alone = attack(small_net, threat, part, config, seed=0, purpose="test")
    torch.testing.assert_close(alone.x_BCHW, whole.x_BCHW[index], atol=1e-5, rtol=0)
    other = attack(small_net, threat, part, config, seed=1, purpose="test")
    assert not torch.allclose(other.theta, alone.theta)


@pytest.mark.parametrize("name", THREATS)
def test_without_random_start_the_seed_does_not_matter(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str
) -> None:
    batch, threat = make_batch(), threats.build(THREATS[name], generator)
    config = AttackConfig(steps=4, random_start=False)
    one, two = (attack(small_net, threat, batch, config, seed=seed, purpose="test") for seed in (0, 1))
    assert torch.equal(one.x_BCHW, two.x_BCHW)
    start = threat.render(batch, threat.start(batch, None))
    assert one.loss_B.mean() > F.cross_entropy(small_net.eval()(start), batch.y_B)


class ForwardError(Exception):
    """What a network raises in the middle of an attack."""


def fail_at(call: int) -> Callable[..., None]:
    """A forward hook that raises at the given call."""
    calls = iter(range(call + 1))

    def hook(*_: object) -> None:
        if next(calls) == call:
            raise ForwardError

    return hook


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", THREATS)
def test_the_network_is_left_as_it_was(
    small_net: nn.Module, make_generator: Any, make_batch: Any, name: str, raises: bool
) -> None:
    generator = make_generator().requires_grad_(True)
    small_net.train()
    small_net.norm.eval()
    small_net.conv1.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in small_net.state_dict().items()}
    modes = {key: module.training for key, module in small_net.named_modules()}
    assert set(modes.values()) == {True, False}
    batch, threat, config = make_batch(), threats.build(THREATS[name], generator), AttackConfig(steps=3, restarts=2)
    if raises:
        small_net.conv2.register_forward_hook(fail_at(2))
        with pytest.raises(ForwardError):
            attack(small_net, threat, batch, config, seed=0, purpose="test")
    else:
        found = attack(small_net, threat, batch, config, seed=0, purpose="test")
        assert [t.requires_grad for t in (found.x_BCHW, found.theta, found.loss_B)] == [False] * 3
    assert {key: module.training for key, module in small_net.named_modules()} == modes
    assert {key for key, p in small_net.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    assert [p.grad for p in [*small_net.parameters(), *generator.parameters()] if p.grad is not None] == []
    assert all(torch.equal(value, state[key]) for key, value in small_net.state_dict().items()), "batch norm did not move"


def test_the_network_is_attacked_in_eval_mode(small_net: nn.Module) -> None:
    batch = images()
    in_training = find(small_net.train(), batch, THREATS["image linf"], steps=3)
    in_eval = find(small_net.eval(), batch, THREATS["image linf"], steps=3)
    assert torch.equal(in_training.x_BCHW, in_eval.x_BCHW)


def test_default_steps() -> None:
    """2.5 eps / steps; fog's sqrt(0.001 / steps), but never too short to cross its box 2.5 times."""
    ball, fog = threats.build(ImageThreat(eps=0.1), None), threats.build(FogThreat(eps=0.1), None)
    assert step_size_of(AttackConfig(steps=5), ball) == pytest.approx(0.05)
    assert step_size_of(AttackConfig(steps=5, step_size=0.3), ball) == 0.3
    assert step_size_of(AttackConfig(steps=200), fog) == pytest.approx(2.5 / 200)
    assert step_size_of(AttackConfig(steps=10_000), fog) == pytest.approx(math.sqrt(0.001 / 10_000))


def test_kl_is_the_relative_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, moved = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    expected = scipy.stats.entropy(clean.softmax(1).numpy(), moved.softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(kl_to(clean)(moved).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_to(clean)(clean).numpy(), 0, atol=1e-6)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan")])
def test_images_outside_the_unit_range_are_refused(small_net: nn.Module, value: float) -> None:
    batch = images()
    batch.x_BCHW[3, 0, 2, 2] = value
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]; these range from"):
        find(small_net, batch, THREATS["image linf"])


def test_a_network_that_has_diverged_is_named(small_net: nn.Module) -> None:
    with torch.no_grad():
        small_net.head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        find(small_net, images(), THREATS["image linf"])
