"""Searches without gradients: inside their budgets, as strong as their peer, and able to do what gradients cannot."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classifiers.make import digits
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.attack.black_box import pattern, side_at
from dmat_ray.config import AttackConfig, ClassifierConfig, FogThreat, ImageRow, ImageThreat, JpegThreat, LatentThreat
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.rng import Draws
from dmat_ray.types import Batch

THREATS = {
    "image linf": ImageThreat(eps=0.1),
    "image l2": ImageThreat(norm="l2", eps=1.0),
    "image l1": ImageThreat(norm="l1", eps=4.0),
    "latent": LatentThreat(eps=0.3),
    "fog": FogThreat(eps=0.5),
    "jpeg": JpegThreat(eps=0.5),
}
CASES = [*(("random", name) for name in THREATS), ("square", "image linf"), ("square", "image l2")]


def search(network: nn.Module, batch: Batch, settings: Any, generator: Any = None, seed: int = 0, **how: Any) -> Any:
    return attack(network, threats.build(settings, generator), batch, AttackConfig(**how), seed=seed, purpose="test")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), CASES)
def test_an_example_is_searched_alike_in_any_batch(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, method: Any, name: str
) -> None:
    batch = make_batch(7)
    how = {"method": method, "steps": 25, "restarts": 2}
    whole = search(small_net, batch, THREATS[name], generator, **how)
    for index in ([3], [6, 0, 2]):
        part = batch.take(torch.tensor(index))
        alone = search(small_net, part, THREATS[name], generator, **how)
        torch.testing.assert_close(alone.x_BCHW, whole.x_BCHW[index], atol=1e-6, rtol=0)
        other = search(small_net, part, THREATS[name], generator, seed=1, **how)
        assert not torch.allclose(other.theta, alone.theta)


@pytest.mark.parametrize("name", THREATS)
def test_random_keeps_the_worst_of_independent_starts(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Any, name: str
) -> None:
    """Against the loop written out; what stays inside its budget is what the threat starts at."""
    batch, network = make_batch(8), small_net.eval()
    found = search(network, batch, THREATS[name], generator, method="random", steps=9)
    threat, draws = threats.build(THREATS[name], generator), Draws(0, batch.id, "test/0")
    with torch.no_grad():
        points = torch.stack([threat.render(batch, threat.start(batch, draws)) for _ in range(10)])
        losses = torch.stack([F.cross_entropy(network(x), batch.y_B, reduction="none") for x in points])
    worst = losses.argmax(dim=0)
    torch.testing.assert_close(found.loss_B, losses.max(dim=0).values)
    torch.testing.assert_close(found.x_BCHW, points[worst, torch.arange(8)])
    assert len(set(worst.tolist())) > 2


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    channels=st.sampled_from([1, 3]),
    norm=st.sampled_from(["linf", "l2"]),
    steps=st.integers(1, 40),
)
def test_squares_stay_in_budget(seed: int, size: tuple[int, int], channels: int, norm: Any, steps: int) -> None:
    """And use it: an image in the middle of the range has moved by eps (L-infinity) or by a vector of length eps."""
    rng = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 3))
    edge = (torch.rand(2, channels, *size, generator=rng) * 2 - 0.5).clamp(0, 1)
    middle = torch.full((1, channels, *size), 0.5)
    batch = Batch(["a", "b", "c"], torch.cat([edge, middle]), torch.zeros(3, dtype=torch.int64))
    eps = {"linf": 0.1, "l2": 0.3}[norm]
    found = search(network, batch, ImageThreat(norm=norm, eps=eps), method="square", steps=steps)
    assert found.x_BCHW.min() >= 0
    assert found.x_BCHW.max() <= 1
    moved = (found.x_BCHW - batch.x_BCHW).flatten(1)
    lengths = moved.abs().amax(dim=1) if norm == "linf" else moved.norm(dim=1)
    assert (lengths <= eps * (1 + 1e-5) + 1e-6).all()
    assert lengths[2].item() == pytest.approx(eps, rel=1e-4)
    if norm == "linf":
        torch.testing.assert_close(moved[2].abs(), torch.full_like(moved[2], eps))


def test_sizes_and_patterns_are_the_published_ones() -> None:
    peer = SquareAttack(None, norm="L2", eps=1.0, n_queries=777, device="cpu")
    for side in (1, 2, 3, 5, 6, 9):
        theirs, ours = peer.eta(side), pattern(side, torch.empty(0))
        assert min((theirs - ours).abs().max(), (theirs - ours.T).abs().max()) < 1e-6
    for step in range(777):
        side = (peer.p_selection(step) * 28 * 28) ** 0.5
        assert side_at(step, 777, "linf", 28, 28) == max(round(side), 1)
        assert side_at(step, 777, "l2", 28, 28) == max(round(side), 3) // 2 * 2 + 1


@given(height=st.integers(3, 90), width=st.integers(3, 300), step=st.integers(0, 99))
def test_squares_fit_the_image_and_have_a_middle_in_l2(height: int, width: int, step: int) -> None:
    assert 1 <= side_at(step, 100, "linf", height, width) <= min(height, width)
    side = side_at(step, 100, "l2", height, width)
    assert 3 <= side <= min(height, width)
    assert side % 2 == 1


class Steps(nn.Module):
    """A network that sees 16 levels of brightness: its gradient is 0 everywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 15).round() / 15)


def test_squares_do_without_a_gradient(small_net: nn.Module, make_batch: Any) -> None:
    network, batch = Steps(small_net).eval(), make_batch(30)
    how: dict[str, Any] = {"steps": 100, "random_start": True}
    asked: list[bool] = []
    handle = network.register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    square = search(network, batch, ImageThreat(eps=0.1), method="square", **how)
    handle.remove()
    assert asked == [False] * 102, "the steps, the last candidate, and the result's measure"
    masked = search(network, batch, ImageThreat(eps=0.1), method="pgd", **how)
    assert square.loss_B.mean() > masked.loss_B.mean() + 0.1
    assert square.broken_B.sum() > masked.broken_B.sum()


class Dilemma(nn.Module):
    """Brighter images have another label and a lower loss: three probabilities, linear in the mean of x."""

    def forward(self, x: Tensor) -> Tensor:
        share = x.mean(dim=(1, 2, 3))
        return torch.stack([0.4 + 0.05 * share, 0.3 + 0.25 * share, 0.3 - 0.3 * share], dim=1).log()


@pytest.mark.parametrize("method", ["random", "square", "apgd"])
def test_a_query_that_broke_an_example_is_kept_though_others_have_higher_losses(method: str) -> None:
    x = torch.linspace(0.2, 0.6, 60)[:, None, None, None].expand(60, 1, 5, 5)
    batch = Batch([str(i) for i in range(60)], x, torch.zeros(60, dtype=torch.int64))
    network, asked = Dilemma(), []
    handle = network.register_forward_hook(lambda *told: asked.append(told[2].detach()))
    found = search(network, batch, ImageThreat(eps=0.3), method=method, steps=4)
    handle.remove()
    logits = torch.stack(asked[:-1])  # the last is the result's measure
    losses, broke = -logits[:, :, 0], logits.argmax(dim=2) != 0
    assert len(losses) == 5
    torch.testing.assert_close(found.broken_B, broke.any(dim=0))
    torch.testing.assert_close(found.loss_B, torch.where(broke | ~broke.any(dim=0), losses, -torch.inf).amax(dim=0))
    assert (found.broken_B & (losses.amax(dim=0) > found.loss_B)).sum() > 10, "the highest loss alone would have missed these"
    assert 10 < found.broken_B.sum() < 60


def test_what_they_need_is_said(small_net: nn.Module, make_batch: Any) -> None:
    batch = make_batch()
    for method in ("square", "random"):
        with pytest.raises(UserError, match=f"method {method} draws random numbers .* needs random_start=true"):
            search(small_net, batch, ImageThreat(), method=method, random_start=False)
    for settings in (FogThreat(), ImageThreat(norm="l1", eps=1.0)):
        with pytest.raises(UserError, match="norm linf or l2; for others give method random"):
            search(small_net, batch, settings, method="square")


COUNT, QUERIES, SEEDS = 100, 100, (0, 1, 2)
MORE = 5  # digits that may stand, in the mean over the seeds, under ours and not under theirs: from seed to seed it is four


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """The two that ship with the tests."""
    found = {}
    for name in ("standard", "robust"):
        network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=10)
        checkpoint.load_weights(Path(__file__).parents[1] / "classifiers" / name, network)
        found[name] = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "eps"), [pytest.param("standard", "linf", 0.1, marks=pytest.mark.exhaustive), ("robust", "l2", 3.0)]
)
def test_square_is_as_strong_as_autoattacks(networks: Any, name: str, norm: Any, eps: float) -> None:
    """At equal queries, and stronger than random points."""
    network, every = networks[name], digits("test")
    with torch.no_grad():
        right = (network(every.x_BCHW).argmax(dim=1) == every.y_B).nonzero()[:, 0]
    batch = every.take(right[torch.arange(COUNT) * len(right) // COUNT])

    def ours(method: Any, seed: int) -> int:
        row = ImageRow(name="S", norm=norm, eps=eps, steps=QUERIES, method=method)
        return int((~attack(network, threats.build(row, None), batch, row, seed=seed, purpose="test").broken_B).sum())

    @torch.no_grad()
    def theirs(seed: int) -> int:
        how = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "n_queries": QUERIES, "eps": eps, "seed": seed, "device": "cpu"}
        x = SquareAttack(network, **how).perturb(batch.x_BCHW, batch.y_B)
        return int((network(x).argmax(dim=1) == batch.y_B).sum())

    square, peer = (sum(stand(seed) for seed in SEEDS) / len(SEEDS) for stand in (functools.partial(ours, "square"), theirs))
    assert 0.1 * COUNT < peer < 0.9 * COUNT, "the places tell strong attacks from weak ones"
    assert square <= peer + MORE
    assert ours("random", 0) > square + 2 * MORE
