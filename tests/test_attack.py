"""The search: equal to a peer's, optimal where the optimum is known, and without a trace in the network."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import foolbox
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import Attacked, attack, cross_entropy, dlr, kl_to, targeted_dlr
from dmat_ray.config import AttackConfig, FogThreat, ImageRow, ImageThreat, JpegThreat, LatentThreat
from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.search import apgd_checkpoints, step_size_of
from dmat_ray.types import Batch

THREATS = {
    "image linf": ImageThreat(eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.0),
    "latent": LatentThreat(eps=0.3),
    "fog": FogThreat(eps=0.5),
    "jpeg": JpegThreat(eps=0.5),
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


def test_the_cross_entropy_that_is_raised_does_not_round_to_zero() -> None:
    """Against the library's in double precision; its own in single precision is zero from a margin of 17 on."""
    margins = torch.tensor([-30.0, 0.0, 10.0, 20.0, 40.0, 80.0])
    logits = torch.stack([margins, torch.zeros(6), torch.full((6,), -1.0)], dim=1).requires_grad_(True)
    loss = cross_entropy(torch.zeros(6, dtype=torch.int64))(logits)
    exact = logits.detach().double().requires_grad_(True)
    expected = F.softplus(exact[:, 1:].logsumexp(dim=1) - exact[:, 0])
    direct = F.cross_entropy(exact, torch.zeros(6, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(expected[:4], direct[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (slope,), (wanted,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-5, atol=0)
    assert (loss.diff() < 0).all()


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


def test_the_network_itself_says_what_is_broken(small_net: nn.Module) -> None:
    """A copy for attacks that takes every image for another class: searches that stop early must not believe it."""
    network, batch = small_net.eval(), images(30)

    class Confused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = network(x)
            return logits.scatter(1, batch.y_B[: len(x), None], -100.0) if len(x) == len(batch) else logits

    row = ImageRow(name="PGD", eps=0.02, steps=3, restarts=3, early_exit=True)
    how: dict[str, Any] = {"seed": 0, "purpose": "test"}
    threat = threats.build(row, None)
    believed, judged = attack(Confused(), threat, batch, row, **how), attack(Confused(), threat, batch, row, judge=network, **how)
    assert believed.broken_B.all(), "one search, and no example is left"
    with torch.no_grad():
        assert torch.equal(judged.broken_B, network(judged.x_BCHW).argmax(dim=1) != batch.y_B)
    standing = ~judged.broken_B
    assert standing.any()
    assert (judged.x_BCHW[standing] != believed.x_BCHW[standing]).any(), "those that stood were searched again"


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


def plain_momentum(network: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """MI-FGSM of one image, as its paper has it (the sign does not care for the scale of the gradient's norm)."""
    moved, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), y), moved)
        velocity = velocity + gradient / gradient.abs().sum()
        moved = (moved.detach() + step * velocity.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return moved


def test_momentum_is_the_published_loop(small_net: nn.Module) -> None:
    network, batch = small_net.eval().double(), images()
    batch = Batch(batch.id, batch.x_BCHW.double(), batch.y_B)
    how = {"steps": 10, "step_size": 0.02, "random_start": False}
    found = find(network, batch, ImageThreat(eps=0.1), method="momentum", **how)
    plain = [plain_momentum(network, batch.x_BCHW[i : i + 1], batch.y_B[i : i + 1], 0.1, 0.02, 10) for i in range(len(batch))]
    torch.testing.assert_close(found.x_BCHW, torch.cat(plain), atol=1e-9, rtol=0)
    assert not torch.equal(found.x_BCHW, find(network, batch, ImageThreat(eps=0.1), **how).x_BCHW)


def plain_apgd(network: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, loss: Any) -> Tensor:
    """Algorithm 1 of arXiv 2003.01690 for one image in an L-infinity ball, its lists and indices written out."""

    def project(z: Tensor) -> Tensor:
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    def value(z: Tensor) -> tuple[float, Tensor]:
        z = z.clone().requires_grad_(True)
        f = loss(network(z), y)
        (gradient,) = torch.autograd.grad(f.sum(), z)
        return f.item(), gradient

    p, points = [0.0, 0.22], []
    while p[-1] < 1:
        points.append(math.ceil(p[-1] * steps - 1e-9))
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    eta, iterates, values = 2 * eps, [x], [value(x)[0]]
    halved, best_then = [], [values[0]]
    current, previous = x, x
    for k in range(steps):
        if k in points:
            start = ([0, *points])[points.index(k)]
            rises = sum(values[i + 1] > values[i] for i in range(start, k))
            stuck = bool(halved) and not halved[-1] and max(values) == best_then[-1]
            halved.append(rises <= 0.75 * (k - start) or stuck)
            best_then.append(max(values))
            if halved[-1]:
                eta, current = eta / 2, iterates[int(np.argmax(values))]
        z = project(current + eta * value(current)[1].sign())
        alpha = 0.75 if k else 1.0
        following = project(current + alpha * (z - current) + (1 - alpha) * (current - previous))
        previous, current = current, following
        iterates.append(current)
        values.append(value(current)[0])
    return iterates[int(np.argmax(values))]


def plain_dlr(logits: Tensor, y: Tensor) -> Tensor:
    ranked = logits[0].sort(descending=True).values
    other = torch.cat([logits[0, : y.item()], logits[0, int(y.item()) + 1 :]]).max()
    return -(logits[0, y.item()] - other) / (ranked[0] - ranked[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss"), [("ce", lambda out, y: F.cross_entropy(out, y)), ("dlr", plain_dlr)], ids=["ce", "dlr"]
)
def test_apgd_is_the_papers_algorithm(small_net: nn.Module, name: Any, loss: Any) -> None:
    """With 100 steps its checkpoints are the published fractions exactly."""
    network, batch = small_net.eval().double(), images(8)
    batch = Batch(batch.id, batch.x_BCHW.double(), batch.y_B)
    row = ImageRow(name="APGD", eps=0.1, steps=100, method="apgd", loss=name, random_start=False)
    found = attack(network, threats.build(row, None), batch, row, seed=0, purpose="test")
    for i in range(len(batch)):
        x, y = batch.x_BCHW[i : i + 1], batch.y_B[i : i + 1]
        plain = plain_apgd(network, x, y, 0.1, 100, loss)
        torch.testing.assert_close(found.x_BCHW[i : i + 1], plain, atol=1e-7, rtol=0)


def test_apgd_reconsiders_at_the_published_steps() -> None:
    fractions = [0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99]  # p of arXiv 2003.01690
    assert apgd_checkpoints(100) == [round(100 * p) for p in fractions]
    assert apgd_checkpoints(1) == []
    for steps in range(2, 60):
        points = [0, *apgd_checkpoints(steps), steps]
        assert all(b > a for a, b in itertools.pairwise(points))


@pytest.mark.parametrize("name", THREATS)
def test_apgd_attacks_every_threat_and_never_ends_below_its_start(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str
) -> None:
    batch, threat, network = make_batch(8), threats.build(THREATS[name], generator), small_net.eval()
    found = attack(network, threat, batch, AttackConfig(steps=20, method="apgd"), seed=0, purpose="test")
    with torch.no_grad():
        begun = threat.start(batch, Draws(0, batch.id, "test/0"))
        start = F.cross_entropy(network(threat.render(batch, begun)), batch.y_B, reduction="none")
    assert (found.loss_B >= start - 1e-6).all()
    assert (found.loss_B > start).float().mean() > 0.5


def test_dlr_is_its_formula_and_knows_no_scale(small_net: nn.Module) -> None:
    logits = 3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, target = torch.arange(20) % 5, (torch.arange(20) + 1) % 5
    wanted = torch.stack([plain_dlr(logits[i : i + 1], y[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(dlr(y)(logits), wanted)
    torch.testing.assert_close(dlr(y)(1000 * logits), wanted)
    ranked = logits.sort(dim=1, descending=True).values
    margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, target[:, None])[:, 0]
    towards = -margin / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2)
    torch.testing.assert_close(targeted_dlr(y, target)(logits), towards)
    for make, classes in ((dlr(y), 2), (targeted_dlr(y, target), 3)):
        with pytest.raises(UserError, match=f"{classes + 1} classes or more, here are {classes}"):
            make(logits[:, :classes])


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_targets_are_the_likeliest_others(small_net: nn.Module, loss: Any) -> None:
    """One search towards each, and each example keeps one that breaks it."""
    network, batch = small_net.eval(), images(24)
    row = ImageRow(name="T", eps=0.06, steps=5, loss=loss, random_start=False)
    every = row.model_copy(update={"targets": 3})
    with torch.no_grad():
        order = network(batch.x_BCHW).scatter(1, batch.y_B[:, None], -torch.inf).argsort(dim=1, descending=True)
    broken = torch.zeros(24, dtype=torch.bool)
    for k in range(3):
        make = targeted_dlr(batch.y_B, order[:, k])
        towards = make if loss == "dlr" else lambda out, t=order[:, k]: -F.cross_entropy(out, t, reduction="none")
        broken |= attack(network, threats.build(row, None), batch, row, seed=0, purpose="test", loss=towards).broken_B
    found = attack(network, threats.build(row, None), batch, every, seed=0, purpose="test")
    assert torch.equal(found.broken_B, broken)
    assert 0 < broken.sum() < 24
    with torch.no_grad():
        assert torch.equal(network(found.x_BCHW).argmax(dim=1) != batch.y_B, broken)
    more = attack(network, threats.build(row, None), batch, row.model_copy(update={"targets": 9}), seed=0, purpose="test")
    assert torch.equal(more.x_BCHW, found.x_BCHW), "as many as there are others"


class Contrast(nn.Module):
    """Divides by the root of the variance of each patch, which has no slope where a patch is flat."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Any:
        variance = F.avg_pool2d(x_BCHW**2, 3, 1, 1) - F.avg_pool2d(x_BCHW, 3, 1, 1) ** 2
        return self.network(x_BCHW / (1 + variance.clamp_min(0).sqrt()))


@pytest.mark.parametrize("method", ["pgd", "momentum", "apgd", "lagrange"])
@pytest.mark.parametrize("measure", [True, False])
def test_gradients_that_are_not_finite_are_refused(small_net: nn.Module, method: Any, measure: bool) -> None:
    """The outputs are finite, and the sign of no number is no step: the images would stand for a wrong reason."""
    network, batch = Contrast(small_net.eval()), images(8)
    flat = replace(batch, x_BCHW=batch.x_BCHW.clone())
    flat.x_BCHW[:, :, :, :4] = 0
    row = ROWS["stadv"](name="a", eps=0.05, steps=3, method=method)
    assert network(flat.x_BCHW).isfinite().all()
    with pytest.raises(NotFiniteError, match="outputs are finite and their gradients are not"):
        attack(network, threats.build(row, None), flat, row, seed=0, purpose="test", measure=measure)


def test_early_exit_breaks_as_many_with_less_work(small_net: nn.Module) -> None:
    network, batch = small_net.eval(), images(40)
    seen: list[int] = []
    handle = network.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    row = ImageRow(name="R", eps=0.05, steps=4, restarts=5)
    threat = threats.build(row, None)
    whole = attack(network, threat, batch, row, seed=0, purpose="test")
    work = sum(seen)
    seen.clear()
    early = attack(network, threat, batch, row.model_copy(update={"early_exit": True}), seed=0, purpose="test")
    handle.remove()
    assert torch.equal(early.broken_B, whole.broken_B)
    assert 0 < whole.broken_B.sum() < 40
    assert sum(seen) < 0.9 * work
    kept = ~whole.broken_B
    torch.testing.assert_close(early.x_BCHW[kept], whole.x_BCHW[kept])
