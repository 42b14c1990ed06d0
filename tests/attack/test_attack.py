"""The search: examples alike in any batch, restarts that never lower a loss, and no trace in the network."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attacks import THREATS, find, images
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, ImageRow, ImageThreat
from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import NotFiniteError, UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.threats.image import ImageBall
from dmat_ray.types import Batch


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


class Wide(ImageBall):
    """Projects into a ball of twice its radius."""

    def project(self, batch: Batch, theta: Tensor) -> Tensor:
        return theta.clamp(-2 * self.eps, 2 * self.eps)


class Bright(ImageBall):
    """Renders what is brighter than white."""

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        return batch.x_BCHW + theta + 0.9


@pytest.mark.parametrize(("kind", "words"), [(Wide, "left its budget: "), (Bright, r"left \[0, 1\]: ")])
def test_a_threat_that_leaves_what_it_may_do_is_caught(
    small_net: nn.Module, make_batch: Any, kind: type[ImageBall], words: str
) -> None:
    with pytest.raises(AssertionError, match=words):
        attack(small_net.eval(), kind(ImageThreat(eps=0.1)), make_batch(), AttackConfig(steps=3), seed=0, purpose="test")


class Dilemma(nn.Module):
    """Brighter images have another label and a lower loss: three probabilities, linear in the mean of x."""

    def forward(self, x: Tensor) -> Tensor:
        share = x.mean(dim=(1, 2, 3))
        return torch.stack([0.4 + 0.05 * share, 0.3 + 0.25 * share, 0.3 - 0.3 * share], dim=1).log()


def test_of_several_searches_one_that_broke_an_example_is_kept() -> None:
    x = torch.linspace(0.2, 0.6, 60)[:, None, None, None].expand(60, 1, 5, 5)
    batch, network, asked = Batch([str(i) for i in range(60)], x, torch.zeros(60, dtype=torch.int64)), Dilemma(), list[Tensor]()
    network.register_forward_hook(lambda *told: asked.append(told[2].detach()))
    config = AttackConfig(method="random", steps=1, restarts=4)
    found = attack(network, ImageBall(ImageThreat(eps=0.3)), batch, config, seed=0, purpose="test")
    logits = torch.stack(asked)
    losses, broke = -logits[:, :, 0], logits.argmax(dim=2) != 0
    torch.testing.assert_close(found.broken_B, broke.any(dim=0))
    torch.testing.assert_close(found.loss_B, torch.where(broke | ~broke.any(dim=0), losses, -torch.inf).amax(dim=0))
    assert (found.broken_B & (losses.amax(dim=0) > found.loss_B)).sum() > 5, "the highest loss alone would have missed these"


class FirstWithout(nn.Module):
    """A network whose first gradient is no number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x + (x - x.detach()).abs().sqrt() if self.calls == 1 else x)  # type: ignore[no-any-return]


def test_a_gradient_that_is_no_number_is_told_in_any_of_several_searches(small_net: nn.Module, make_batch: Any) -> None:
    config, threat = AttackConfig(steps=2, restarts=2), ImageBall(ImageThreat(eps=0.1))
    with pytest.raises(NotFiniteError, match="gradients are not"):
        attack(FirstWithout(small_net.eval()), threat, make_batch(), config, seed=0, purpose="test")


def test_every_target_of_a_search_has_a_start_of_its_own(
    small_net: nn.Module, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes, init = list[str](), Draws.__init__

    def noted(self: Draws, seed: int, ids: Any, purpose: str) -> None:
        purposes.append(purpose)
        init(self, seed, ids, purpose)

    monkeypatch.setattr(Draws, "__init__", noted)
    row = ImageRow(name="T", eps=0.1, steps=2, method="apgd", loss="dlr", targets=3, restarts=2)
    attack(small_net.eval(), ImageBall(ImageThreat(eps=0.1)), make_batch(), row, seed=0, purpose="test")
    assert len(set(purposes)) == 3 * 2


def test_without_a_measure_several_searches_are_compared_by_where_they_end(small_net: nn.Module, make_batch: Any) -> None:
    network, batch = small_net.eval(), make_batch(12)
    config, threat = AttackConfig(steps=2, restarts=3), ImageBall(ImageThreat(eps=0.2))
    plain, quick = (attack(network, threat, batch, config, seed=0, purpose="test", measure=measure) for measure in (True, False))
    torch.testing.assert_close(quick.x_BCHW, plain.x_BCHW, atol=0, rtol=0)
    torch.testing.assert_close(quick.loss_B, F.cross_entropy(network(quick.x_BCHW), batch.y_B, reduction="none"))
