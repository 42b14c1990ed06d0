"""Training losses against plainly written steps of the papers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from dmat_ray.attack import attack
from dmat_ray.config import ObjectiveConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import Draws
from dmat_ray.training import objectives
from dmat_ray.types import Batch

IMAGE = {"eps": 0.1, "steps": 4, "step_size": 0.04, "random_start": False}
LATENT = {"eps": 0.3, "steps": 3, "step_size": 0.15, "random_start": False}
OFF: dict[str, Any] = {"weight": 0}


@pytest.fixture
def network(small_net: nn.Module) -> nn.Module:
    """Without dropout, whose masks two computations would not share."""
    small_net.drop.p = 0.0
    return small_net.double().train()


@pytest.fixture
def manifold(make_generator: Callable[..., StyleGAN2]) -> StyleGAN2:
    return make_generator().double()


@pytest.fixture
def batch(manifold: StyleGAN2) -> Batch:
    rng = torch.Generator().manual_seed(2)
    w = manifold.mapping(torch.randn(8, 8, generator=rng, dtype=torch.float64)).contiguous()
    return Batch([f"image-{i}" for i in range(8)], manifold.synthesis(w), torch.randint(4, (8,), generator=rng), w)


def pgd(
    network: nn.Module, render: Callable[[Tensor], Tensor], theta: Tensor, y: Tensor, how: dict[str, Any], loss: Any
) -> Tensor:
    """Madry's attack in the L-infinity ball around zero, on the network in eval mode; returns the images it ends with."""
    network.eval()
    for _ in range(how["steps"]):
        theta = theta.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(network(render(theta)), y), theta)
        theta = (theta.detach() + how["step_size"] * slope.sign()).clamp(-how["eps"], how["eps"])
    network.train()
    return render(theta).detach()


def worst_image(network: nn.Module, batch: Batch) -> Tensor:
    x = batch.x_BCHW
    return pgd(network, lambda d: (x + d).clamp(0, 1), torch.zeros_like(x), batch.y_B, IMAGE, F.cross_entropy)


def worst_latent(network: nn.Module, batch: Batch, manifold: StyleGAN2) -> Tensor:
    w = batch.w_BLD
    assert w is not None
    return pgd(network, lambda d: manifold.synthesis(w + d), torch.zeros_like(w), batch.y_B, LATENT, F.cross_entropy)


def configured(manifold: StyleGAN2, **terms: Any) -> objectives.Objective:
    return objectives.build(ObjectiveConfig.model_validate({"clean": OFF, **terms}), manifold)


def step(objective: objectives.Objective, network: nn.Module, batch: Batch, purpose: str = "test") -> tuple[Tensor, Any]:
    """Attacks on `network` and the loss over it, as the trainer makes them."""
    drawn = objective.drawn(0, purpose)
    images = objective.worst(network, batch, drawn, seed=0, purpose=purpose)
    return objective.loss(network, network, images, batch.y_B, drawn)


def require_equal(
    network: nn.Module, objective: objectives.Objective, batch: Batch, plain: Callable[[nn.Module], Tensor]
) -> None:
    """Loss, all gradients and the batch-norm statistics left behind, against `plain` on a copy of the network."""
    other = copy.deepcopy(network)
    expected = plain(other)
    expected.backward()
    loss, metrics = step(objective, network, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(p.grad.abs().max() > 0 for p in network.parameters() if p is not network.conv1.bias)


def cases(manifold: StyleGAN2, batch: Batch) -> Iterator[tuple[str, dict[str, Any], Callable[[nn.Module], Tensor]]]:
    y = batch.y_B

    def standard(f: nn.Module) -> Tensor:
        return F.cross_entropy(f(batch.x_BCHW), y)

    def at(f: nn.Module) -> Tensor:
        return F.cross_entropy(f(worst_image(f, batch)), y)

    def om_at(f: nn.Module) -> Tensor:
        return F.cross_entropy(f(worst_latent(f, batch, manifold)), y)

    def dmat(f: nn.Module) -> Tensor:
        x_image, x_latent = worst_image(f, batch), worst_latent(f, batch, manifold)
        return 0.5 * F.cross_entropy(f(x_image), y) + 0.5 * F.cross_entropy(f(x_latent), y)

    def mixed(f: nn.Module) -> Tensor:
        x_image, x_latent = worst_image(f, batch), worst_latent(f, batch, manifold)
        losses = [F.cross_entropy(f(x), y, label_smoothing=0.1) for x in (batch.x_BCHW, x_image, x_latent)]
        return 0.2 * losses[0] + 0.3 * losses[1] + 1.5 * losses[2]

    yield "standard", {"clean": {"weight": 1}}, standard
    yield "at", {"image": {"weight": 1, **IMAGE}}, at
    yield "om_at", {"latent": {"weight": 1, **LATENT}}, om_at
    yield "dmat", {"image": {"weight": 0.5, **IMAGE}, "latent": {"weight": 0.5, **LATENT}}, dmat
    weights = {"clean": {"weight": 0.2}, "image": {"weight": 0.3, **IMAGE}, "latent": {"weight": 1.5, **LATENT}}
    yield "mixed", {**weights, "label_smoothing": 0.1}, mixed


@pytest.mark.parametrize("method", ["standard", "at", "om_at", "dmat", "mixed"])
def test_loss_and_gradients_are_those_of_a_plain_step(network: nn.Module, manifold: StyleGAN2, batch: Batch, method: str) -> None:
    terms, plain = next((terms, plain) for name, terms, plain in cases(manifold, batch) if name == method)
    require_equal(network, configured(manifold, **terms), batch, plain)


def test_adversarial_examples_are_made_before_batch_norm_moves(network: nn.Module, manifold: StyleGAN2, batch: Batch) -> None:
    """The attacks see the statistics from before the step: dmat's latent examples are those of om_at alone."""
    before = copy.deepcopy(network)
    objective = configured(manifold, image={"weight": 0.5, **IMAGE}, latent={"weight": 0.5, **LATENT})
    _, metrics = step(objective, network, batch)
    before.train()
    x = worst_latent(before, batch, manifold)
    assert metrics["latent_loss"].item() == pytest.approx(F.cross_entropy(before(x), batch.y_B).item(), rel=1e-5)


def test_trades_is_clean_loss_and_kl(network: nn.Module, manifold: StyleGAN2, batch: Batch) -> None:
    """CE(f(x), y) + beta KL(f(x) || f(x')), x' from PGD on the KL term (arXiv 1901.08573)."""
    how = {"eps": 0.1, "steps": 4, "step_size": 0.03}
    x = batch.x_BCHW

    def trades(f: nn.Module) -> Tensor:
        f.eval()
        with torch.no_grad():
            natural = f(x).softmax(dim=1)
        start = Draws(0, batch.id, "test/image/0").uniform(*x.shape[1:], like=x) * 0.2 - 0.1
        start = (x + start).clamp(0, 1) - x
        kl = nn.KLDivLoss(reduction="sum")
        x_adv = pgd(f, lambda d: (x + d).clamp(0, 1), start, natural, how, lambda o, p: kl(o.log_softmax(dim=1), p))
        logits = f(x)
        robust = nn.KLDivLoss(reduction="batchmean")(f(x_adv).log_softmax(dim=1), logits.softmax(dim=1))
        return F.cross_entropy(logits, batch.y_B) + 6.0 * robust

    objective = configured(manifold, clean={"weight": 1}, image={"weight": 6, "divergence": "kl", **how})
    require_equal(network, objective, batch, trades)


def test_metrics_are_each_terms_loss_and_accuracy(network: nn.Module, manifold: StyleGAN2, batch: Batch) -> None:
    objective = configured(manifold, clean={"weight": 0.25}, latent={"weight": 0.75, **LATENT})
    reference = copy.deepcopy(network)
    loss, metrics = step(objective, network, batch)
    assert set(metrics) == {"loss", "clean_loss", "clean_accuracy", "latent_loss", "latent_accuracy"}
    assert not any(value.requires_grad for value in metrics.values())
    assert loss.item() == pytest.approx((0.25 * metrics["clean_loss"] + 0.75 * metrics["latent_loss"]).item())
    right = reference(batch.x_BCHW).argmax(dim=1) == batch.y_B
    assert metrics["clean_accuracy"].item() == pytest.approx(right.double().mean().item())


def test_trades_has_a_slope_where_a_probability_underflows(manifold: StyleGAN2) -> None:
    """exp(-120) is 0 in float32; the gradient of KL(q || p) to q's logits is q (log q - log p - KL), the batch's mean of it."""
    objective = configured(manifold, clean={"weight": 1}, image={"weight": 1, "divergence": "kl"})
    clean = torch.tensor([[0.0, -120.0, 3.0]], requires_grad=True)
    moved = torch.tensor([[1.0, 0.0, 2.0]])
    logits = {"clean": clean, "image": moved}
    network = nn.Identity()
    y = torch.tensor([2])
    total, _ = objective.loss(network, lambda x: x, logits, y, {"image": 1.0})
    (slope,) = torch.autograd.grad(total, clean)
    q, log_ratio = clean.detach().softmax(1), clean.detach().log_softmax(1) - moved.log_softmax(1)
    torch.testing.assert_close(slope, q * (log_ratio - (q * log_ratio).sum()))


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_a_random_start_differs_by_purpose_and_repeats(
    network: nn.Module, manifold: StyleGAN2, batch: Batch, divergence: str
) -> None:
    term = {"weight": 1, "eps": 0.1, "steps": 1, "method": "random", "divergence": divergence}
    objective = configured(manifold, image=term)
    losses = [step(objective, copy.deepcopy(network), batch, purpose)[0].item() for purpose in ("train/0", "train/0", "train/1")]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_weights_all_zero_are_refused() -> None:
    with pytest.raises(ValidationError, match="every term has weight 0"):
        ObjectiveConfig.model_validate({"clean": OFF})


def test_kl_without_random_start_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs random_start"):
        ObjectiveConfig.model_validate({"image": {"weight": 1, "divergence": "kl", "random_start": False}})


def test_any_threats_are_terms_by_names_of_their_own(network: nn.Module, manifold: StyleGAN2, batch: Batch) -> None:
    """The loss is the weighted sum of each term's cross entropy on its own worst images."""
    more = {
        "flakes": {"threat": "snow", "eps": 0.3, "weight": 0.25, "steps": 2},
        "both": {"threat": "joint", "eps": 0.05, "latent_eps": 0.2, "weight": 0.5, "steps": 2},
        "off": {"threat": "elastic"},
    }
    config = ObjectiveConfig.model_validate({"clean": OFF, "more": more})
    assert objectives.on_manifold_terms(config) == ["both"]
    objective = objectives.build(config, manifold)
    assert [name for name, _, _ in objective.active] == ["flakes", "both"]
    loss, metrics = step(objective, copy.deepcopy(network).train(), batch, "train/0")
    plain = copy.deepcopy(network).train()
    total = 0.0
    for name, term, threat in objective.active:
        x = attack(network, threat, batch, term, seed=0, purpose=f"train/0/{name}").x_BCHW
        cost = torch.nn.functional.cross_entropy(plain(x), batch.y_B).item()
        assert metrics[f"{name}_loss"].item() == pytest.approx(cost, rel=1e-5)
        total += term.weight * cost
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_names_of_terms_that_are_taken_are_refused() -> None:
    with pytest.raises(ValidationError, match="'image' is the name of a term that is always there"):
        ObjectiveConfig.model_validate({"more": {"image": {"threat": "fog"}}})
    with pytest.raises(ValidationError, match="'robust' cannot be the name of a term"):
        ObjectiveConfig.model_validate({"more": {"robust": {"threat": "fog"}}})
    with pytest.raises(ValidationError, match="threat"):
        ObjectiveConfig.model_validate({"more": {"mine": {"threat": "rain"}}})


def test_only_the_latent_term_needs_a_generator() -> None:
    at = ObjectiveConfig.model_validate({"clean": OFF, "image": {"weight": 1}})
    dmat = ObjectiveConfig.model_validate({"clean": OFF, "image": {"weight": 1}, "latent": {"weight": 1}})
    assert objectives.on_manifold_terms(at) == []
    assert objectives.on_manifold_terms(dmat) == ["latent"]
    assert [name for name, _, _ in objectives.build(at, None).active] == ["image"]
    with pytest.raises(UserError, match="needs a generator"):
        objectives.build(dmat, None)
