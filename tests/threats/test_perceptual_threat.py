"""Perceptual attacks against features that torchvision computes, and against dense linear algebra."""

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from pydantic import ValidationError
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, FogThreat, ImageTerm, ImageThreat, LatentThreat, PerceptualThreat
from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.threats import perceptual
from dmat_ray.types import Batch

pytestmark = pytest.mark.slow

EPS = 0.3
PerceptualRow = ROWS["perceptual"]


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    """A file with weights of torchvision's AlexNet, and the network, without the head, which is most of it."""
    torch.manual_seed(5)
    network = torchvision.models.alexnet(weights=None).eval().requires_grad_(False)
    network.classifier = nn.Identity()
    path = tmp_path_factory.mktemp("weights") / "alex.pth"
    torch.save(network.state_dict(), path)
    return str(path), network.double()


@pytest.fixture(scope="module")
def threat(alex: Any) -> Any:
    return threats.build(PerceptualThreat(eps=EPS, weights=alex[0]), None)


def phi(network: Any, x: Tensor) -> Tensor:
    """As in arXiv 2006.12655: after each of AlexNet's five ReLUs, unit vectors over channels, by the root of the pixels."""
    x = x.expand(-1, 3, -1, -1)
    h = (x - x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    rows = []
    for layer in network.features[:12]:
        h = layer(h.clone())  # the ReLUs work in place
        if isinstance(layer, nn.ReLU):
            rows.append((F.normalize(h, dim=1) / (h.shape[2] * h.shape[3]) ** 0.5).flatten(1))
    return torch.cat(rows, dim=1)


def photos(count: int = 3, channels: int = 3, size: int = 40, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(channels)
    x = (F.interpolate(torch.rand(count, channels, 8, 8, generator=rng), size=size, mode="bicubic") * 1.4 - 0.2).clamp(0, 1)
    return Batch([f"{i}" for i in range(count)], x.to(dtype), torch.arange(count) % 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_distance_is_the_published_formula(alex: Any, threat: Any, channels: int) -> None:
    batch = photos(channels=channels)
    theta = 0.2 * torch.randn(batch.x_BCHW.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = (batch.x_BCHW + theta).clamp(0, 1)
    wanted = (phi(alex[1], moved) - phi(alex[1], batch.x_BCHW)).norm(dim=1)
    assert wanted.min() > 0.1
    torch.testing.assert_close(threat.distance(batch, theta), wanted, atol=1e-6, rtol=1e-5)
    assert (threat.distance(batch, torch.zeros_like(theta)) == 0).all()
    short = threat.length(batch, theta, 1e-3 * theta)
    unit = 0.1 * theta / theta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    change = (phi(alex[1], moved + unit) - phi(alex[1], moved)).norm(dim=1)
    torch.testing.assert_close(short, change * 1e-3 * theta.flatten(1).norm(dim=1) / 0.1, atol=1e-9, rtol=1e-3)


def test_small_images_are_enlarged(threat: Any) -> None:
    small = photos(channels=1, size=16)
    large = Batch(small.id, F.interpolate(small.x_BCHW, size=32, mode="bilinear"), small.y_B)
    delta = torch.full_like(small.x_BCHW, 0.1)
    delta[:, :, :, 8:] = -0.1
    delta = (small.x_BCHW + delta).clamp(0, 1) - small.x_BCHW
    wanted = threat.distance(large, F.interpolate(delta, size=32, mode="bilinear"))
    torch.testing.assert_close(threat.distance(small, delta), wanted)


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_projection_ends_inside(alex: Any, threat: Any, channels: int, size: int) -> None:
    batch, rng = photos(channels=channels, size=size), torch.Generator().manual_seed(1)
    for scale in (0.0, 1e-3, 0.1, 1.0, 100.0):
        theta = scale * torch.randn(batch.x_BCHW.shape, generator=rng, dtype=torch.float64)
        back = threat.project(batch, theta)
        moved = batch.x_BCHW + back
        assert moved.min() >= -1e-12
        assert moved.max() <= 1 + 1e-12
        if size >= 32:
            assert ((phi(alex[1], moved) - phi(alex[1], batch.x_BCHW)).norm(dim=1) <= EPS * (1 + 1e-6)).all()
        assert (threat.distance(batch, back) <= EPS * (1 + 1e-6)).all()
        clipped = (batch.x_BCHW + theta).clamp(0, 1) - batch.x_BCHW
        if scale <= 1e-3:
            torch.testing.assert_close(back, clipped)
        if scale >= 1:
            assert (threat.distance(batch, back) > 0.97 * EPS).all()
            share = back.flatten(1).norm(dim=1) / clipped.flatten(1).norm(dim=1)
            torch.testing.assert_close(back, clipped * share.view(-1, 1, 1, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_of_the_distance_is_its_slope(threat: Any, channels: int) -> None:
    batch, rng = photos(channels=channels, size=20), torch.Generator().manual_seed(2)
    theta = threat.start(batch, Draws(0, batch.id, "test")).requires_grad_(True)
    (gradient,) = torch.autograd.grad(threat.distance(batch, theta).sum(), theta)
    inside = (batch.x_BCHW > 0.1) & (batch.x_BCHW < 0.9)  # clipping has the gradient of the identity
    for _ in range(4):
        move = inside * torch.randn(theta.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            up, down = (threat.distance(batch, theta + s * 1e-7 * move) for s in (1, -1))
        assert (gradient * move).sum().item() == pytest.approx((up - down).sum().item() / 2e-7, rel=1e-4)


def dense_slope(network: nn.Module, x: Tensor) -> np.ndarray:
    """J of phi at one image, one column a pixel, by central differences."""
    pixels = x[0].numel()
    steps = 1e-6 * torch.eye(pixels, dtype=x.dtype).view(pixels, *x.shape[1:])
    return ((phi(network, x + steps) - phi(network, x - steps)) / 2e-6).T.numpy()


def test_direction_solves_the_linearised_problem(alex: Any, threat: Any) -> None:
    """max g.v over |J v| = 1: as good as anything in the space that five iterations reach, and far better than the gradient."""
    batch = photos(count=2, channels=1, size=32)
    x = 0.25 + 0.5 * batch.x_BCHW
    batch = Batch(batch.id, x, batch.y_B)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = threat.direction(batch, torch.zeros_like(x), gradient)
    J, g, v = dense_slope(alex[1], x[1:]), gradient[1].flatten().numpy(), found[1].flatten().numpy()
    assert np.linalg.norm(J @ v) == pytest.approx(1, rel=1e-3)
    squared = J.T @ J
    space = [g / np.linalg.norm(g)]
    for _ in range(4):
        following = squared @ space[-1]
        following -= sum((following @ s) * s for s in space)
        space.append(following / np.linalg.norm(following))
    basis = np.stack(space, axis=1)
    reduced, part = basis.T @ squared @ basis, basis.T @ g
    assert g @ v == pytest.approx(np.sqrt(part @ np.linalg.solve(reduced, part)), rel=1e-2)
    assert g @ v > 1.5 * (g @ g) / np.linalg.norm(J @ g)
    assert (threat.direction(batch, torch.zeros_like(x), torch.zeros_like(x)) == 0).all()


class Judge(nn.Module):
    """A small network for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 5, stride=2), nn.Tanh(), nn.Conv2d(12, 12, 5, stride=2), nn.Tanh())
        self.head = nn.Linear(12 * 25, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(4 * x - 2).flatten(1))


def test_both_attacks_raise_the_loss_inside_the_budget(alex: Any) -> None:
    network, batch = Judge(), photos(count=6, size=32, dtype=torch.float32)
    threat = threats.build(PerceptualThreat(eps=EPS, weights=alex[0]), None)
    run = functools.partial(attack, network, threat, batch, seed=0, purpose="test")
    with torch.no_grad():
        clean = F.cross_entropy(network(batch.x_BCHW), batch.y_B, reduction="none")
    steps = {"pgd": 8, "lagrange": 8, "lpa": 40, "random": 8}
    found = {method: run(AttackConfig(steps=number, method=method)) for method, number in steps.items()}  # type: ignore[arg-type]
    for result in found.values():
        x = result.x_BCHW.double()
        assert ((phi(alex[1], x) - phi(alex[1], batch.x_BCHW.double())).norm(dim=1) <= EPS * (1 + 1e-3)).all()
        assert x.min() >= 0
        assert x.max() <= 1
    for method in ("pgd", "lagrange"):
        assert (found[method].loss_B > clean + 0.1).all(), method
        assert found[method].loss_B.mean() > found["random"].loss_B.mean() + 0.1
    assert found["lagrange"].loss_B.mean() > found["pgd"].loss_B.mean() - 0.1
    assert found["lpa"].broken_B.sum() >= found["lagrange"].broken_B.sum()
    assert found["lpa"].broken_B.any()
    alone = attack(network, threat, batch.take(torch.tensor([5, 2])), AttackConfig(steps=3), seed=0, purpose="test")
    torch.testing.assert_close(alone.x_BCHW, run(AttackConfig(steps=3)).x_BCHW[[5, 2]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["pgd", "momentum", "apgd", "lagrange", "lpa", "random"])
def test_in_training_an_image_is_measured_as_it_was_projected(
    alex: Any, monkeypatch: pytest.MonkeyPatch, method: Literal["pgd", "momentum", "apgd", "lagrange", "lpa", "random"]
) -> None:
    """In a batch as large: TF32, which is allowed there, would round by more than is left free if it were another one."""
    network, batch = Judge(), photos(count=3, size=32, dtype=torch.float32)
    threat = threats.build(PerceptualThreat(eps=EPS, weights=alex[0]), None)
    measured: list[Tensor] = []
    projected: list[Tensor] = []
    features, project = perceptual._features, threat.project

    def note(judge: Any, x: Tensor) -> Tensor:
        measured.append(x)
        return features(judge, x)

    def note_projection(batch: Batch, theta: Tensor) -> Tensor:
        begun, found = len(measured), project(batch, theta)
        projected.extend(measured[begun:])
        return found

    monkeypatch.setattr(perceptual, "_features", note)
    monkeypatch.setattr(threat, "project", note_projection)
    config = AttackConfig(steps=10 if method == "lpa" else 2, restarts=2, method=method)
    found = attack(network, threat, batch, config, seed=0, purpose="test", measure=False)
    last = measured[-1]  # as the budget is checked
    assert torch.equal(last, found.x_BCHW)
    assert all(any(x.shape == last.shape and torch.equal(x[k], last[k]) for x in projected) for k in range(len(batch)))


def test_lpa_leaves_alone_what_it_has_broken_inside(alex: Any) -> None:
    """And goes on with the rest: where a network is wrong at once, the image it begins with is the result."""

    class Sure(nn.Module):  # of the first class, but for images named by their first pixel
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([4 * x[:, 0, 0, 0], x.flatten(1).mean(dim=1), *torch.zeros(2, len(x))], dim=1)

    x = 0.25 + 0.5 * photos(count=2, size=32, dtype=torch.float32).x_BCHW
    batch, threat = Batch(["a", "b"], x, torch.tensor([1, 0])), threats.build(PerceptualThreat(eps=EPS, weights=alex[0]), None)
    found = attack(Sure(), threat, batch, AttackConfig(steps=10, method="lpa"), seed=0, purpose="test")
    start = threat.render(batch, threat.start(batch, Draws(0, batch.id, "test/0")))
    assert found.broken_B[0]
    torch.testing.assert_close(found.x_BCHW[0], start[0])
    assert (found.x_BCHW[1] - start[1]).abs().max() > 0.01


@pytest.mark.parametrize("more", [{"steps": 4}, {"steps": 10, "loss": "dlr"}, {"steps": 10, "targets": 3}])
def test_lpa_has_rounds_and_a_loss_of_its_own(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"method lpa (goes in 5 rounds|raises a margin of its own)"):
        PerceptualRow(name="LPA", method="lpa", **more)
    with pytest.raises(ValidationError, match="method lpa raises a margin of its own; give divergence ce"):
        ImageTerm(weight=1, steps=10, method="lpa", divergence="kl")


@pytest.mark.parametrize("settings", [ImageThreat(norm="l2", eps=1.0), LatentThreat(norm="l2", eps=1.0)])
def test_the_lagrangian_serves_other_balls(small_net: nn.Module, generator: StyleGAN2, make_batch: Any, settings: Any) -> None:
    """In L2 it does nearly what projected descent does."""
    batch, threat = make_batch(12), threats.build(settings, generator)
    pgd, lagrange = (
        attack(small_net, threat, batch, AttackConfig(steps=40, method=method), seed=0, purpose="test").loss_B.mean()
        for method in ("pgd", "lagrange")
    )
    start = F.cross_entropy(small_net.eval()(batch.x_BCHW), batch.y_B)
    assert lagrange > start + 0.8 * (pgd - start)


@pytest.mark.parametrize("method", ["lagrange", "lpa"])
def test_the_lagrangian_needs_a_length(small_net: nn.Module, make_batch: Any, method: Any) -> None:
    with pytest.raises(UserError, match=f"{method} needs a threat whose steps have a length"):
        attack(
            small_net,
            threats.build(FogThreat(), None),
            make_batch(),
            AttackConfig(method=method),
            seed=0,
            purpose="test",
        )


def test_weights_are_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79\.pth' is not there.*perceptual\.weights=random does without"):
        threats.build(PerceptualThreat(), None)
