"""One training step against steps written out plainly from the papers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ViewingNet
from torch import Tensor, nn

from dmat_ray.attack import attack, kl_to
from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import batch_norm, classifiers
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.training.step import TrainingStep
from dmat_ray.types import Batch

MakeConfig = Callable[..., Config]
MakeBatch = Callable[..., Batch]
OFF = {"weight": 0}
CLEAN = {"clean": {"weight": 1}, "image": OFF, "latent": OFF}
SGD = {"momentum": 0.8, "weight_decay": 0.01}


@pytest.fixture
def make_step(make_config: MakeConfig, generator: StyleGAN2, tmp_path: Path) -> Callable[..., TrainingStep]:
    """make_step(objective=, training=, generator=): a step over the same small network every time, in training mode."""

    def make(generator: StyleGAN2 = generator, dtype: torch.dtype = torch.float32, **sections: Any) -> TrainingStep:
        config = make_config(**{**sections, "training": {**SGD, "channels_last": False, **sections.get("training", {})}})
        torch.manual_seed(5)
        network = classifiers.build(config.classifier, 1, 4)
        network.train()(torch.rand(16, 1, 8, 8))
        return TrainingStep(config, network.to(dtype), generator, LocalContext(tmp_path))

    return make


@pytest.fixture
def batch(make_batch: MakeBatch) -> Batch:
    return make_batch(12)


def linf_pgd(f: nn.Module, render: Callable[[Tensor], Tensor], start: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
    """Three steps of Madry's attack from `start`, in eval mode; images stay in [0, 1]."""
    f.eval()
    at = start
    for _ in range(3):
        at = at.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(f(render(at)), y), at)
        at = start + (at.detach() + step * slope.sign() - start).clamp(-eps, eps)
        at = at.clamp(0, 1) if at.dim() == 4 else at
    f.train()
    return render(at).detach()


def plain_dmat_step(f: nn.Module, generator: StyleGAN2, batch: Batch, rate: float, velocity: list[Tensor]) -> tuple[float, float]:
    """METHOD: two attacks, a forward pass for each in training mode, half of each loss, SGD with momentum and decay."""
    x, w = batch.x_BCHW, batch.w_BLD
    assert w is not None
    in_pixels = linf_pgd(f, lambda at: at, x, batch.y_B, 0.1, 0.05)
    on_manifold = linf_pgd(f, generator.synthesis, w, batch.y_B, 0.2, 0.1)
    image, latent = F.cross_entropy(f(in_pixels), batch.y_B), F.cross_entropy(f(on_manifold), batch.y_B)
    slopes = torch.autograd.grad(0.5 * image + 0.5 * latent, list(f.parameters()))
    with torch.no_grad():
        for p, v, slope in zip(f.parameters(), velocity, slopes, strict=True):
            v.mul_(0.8).add_(slope + 0.01 * p)
            p.sub_(rate * v)
    return image.item(), latent.item()


def test_dmat_steps_are_the_methods(make_step: Any, make_generator: Callable[..., StyleGAN2], make_batch: MakeBatch) -> None:
    """Losses, updated weights and batch-norm statistics after three steps, in float64, where rounding turns no signs."""
    generator = make_generator().double()
    w = make_batch(12).w_BLD.double()
    batch = Batch([f"image-{i}" for i in range(12)], generator.synthesis(w), make_batch(12).y_B, w)
    still = {"steps": 3, "random_start": False, "weight": 0.5}
    step = make_step(
        generator,
        torch.float64,
        objective={"image": {**still, "eps": 0.1, "step_size": 0.05}, "latent": {**still, "eps": 0.2, "step_size": 0.1}},
    )
    other = copy.deepcopy(step.network)
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    for i, rate in enumerate((0.1, 0.05, 0.02)):
        metrics = step(batch, 0, i, rate)
        image, latent = plain_dmat_step(other, generator, batch, rate, velocity)
        assert metrics["image_loss"].item() == pytest.approx(image, rel=1e-5)
        assert metrics["latent_loss"].item() == pytest.approx(latent, rel=1e-5)
        assert metrics["loss"].item() == pytest.approx((image + latent) / 2, rel=1e-5)
    torch.testing.assert_close(step.network.state_dict(), other.state_dict(), atol=1e-6, rtol=1e-5)


def test_one_batch_for_all_terms_is_a_pass_for_each(make_step: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [make_step(objective={"clean": {"weight": 0.3}}) for _ in range(2)]
    steps[0](batch, 0, 0, 0.1)
    monkeypatch.setattr(batch_norm, "can_share_a_batch", lambda network: False)
    calls: list[int] = []
    steps[1].view(batch.x_BCHW)  # which looks at the network, once
    forward = steps[1].trained.forward
    monkeypatch.setattr(steps[1].trained, "forward", lambda x: calls.append(len(x)) or forward(x))
    steps[1](batch, 0, 0, 0.1)
    assert calls == [12, 12, 12]
    torch.testing.assert_close(steps[0].network.state_dict(), steps[1].network.state_dict(), atol=1e-6, rtol=1e-4)


def test_joint_statistics_are_those_of_all_images_together(make_step: Any, batch: Batch) -> None:
    step = make_step(objective={"clean": {"weight": 1}, "image": {"eps": 0.2, "weight": 1}, "latent": OFF, "batch_norm": "joint"})
    other = copy.deepcopy(step.network)
    threat, term = step.objective.active[0][2], step.objective.active[0][1]
    attacked = attack(AttackView(other, channels_last=False), threat, batch, term, seed=0, purpose="train/0/image").x_BCHW
    logits = other(torch.cat([batch.x_BCHW, attacked]))
    expected = 2 * F.cross_entropy(logits, batch.y_B.repeat(2))
    metrics = step(batch, 0, 0, 0.1)
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(step.network.network[1].running_var, other.network[1].running_var)


@pytest.mark.parametrize("clean", [0, 1])
def test_per_term_statistics_are_met_by_each_attack(make_step: Any, batch: Batch, clean: float) -> None:
    terms = {"clean": {"weight": clean}, "image": {"eps": 0.3, "weight": 0.5}, "latent": {"eps": 0.3, "weight": 0.5}}
    step = make_step(objective={**terms, "batch_norm": "per_term"})
    for i in range(4):
        step(batch, 0, i, 0.05)
    names = step.objective.passes
    mean_TC = step.network.network[1].mean_TC
    assert mean_TC is not None
    assert len(mean_TC) == len(names) == 2 + clean
    assert (mean_TC[0] - mean_TC[-1]).abs().max() > 1e-3
    expected = mean_TC[0] if clean else mean_TC.mean(dim=0)
    torch.testing.assert_close(step.network.network[1].running_mean, expected)
    # the latent attack of the next step is that on a network with the latent term's statistics
    alone = copy.deepcopy(step.network)
    batch_norm.show(alone, [names.index("latent")])
    _, term, threat = step.objective.active[1]
    view = AttackView(alone, channels_last=False)
    attacked = attack(view, threat, batch, term, seed=0, purpose="train/0/latent").x_BCHW
    found = step.objective.worst(step.view, batch, step.objective.weights, seed=0, purpose="train/0")
    torch.testing.assert_close(found["latent"], attacked)


def test_a_divergence_is_from_what_the_clean_terms_statistics_give(make_step: Any, batch: Batch) -> None:
    terms = {"clean": {"weight": 1}, "image": {"eps": 0.3, "weight": 1, "divergence": "kl"}, "latent": OFF}
    step = make_step(objective={**terms, "batch_norm": "per_term"})
    for i in range(4):
        step(batch, 0, i, 0.05)
    (_, term, threat), views = step.objective.active[0], []
    for name in ("clean", "image"):
        alone = copy.deepcopy(step.network)
        batch_norm.show(alone, [step.objective.passes.index(name)])
        views.append(AttackView(alone, channels_last=False))
    with torch.no_grad():
        clean, other = (view(batch.x_BCHW) for view in views)
    assert (clean - other).abs().max() > 1e-2
    attacked = attack(views[1], threat, batch, term, seed=0, purpose="train/0/image", loss=kl_to(clean)).x_BCHW
    found = step.objective.worst(step.view, batch, step.objective.weights, seed=0, purpose="train/0")
    torch.testing.assert_close(found["image"], attacked)


def test_frozen_statistics_stay(make_step: Any, batch: Batch) -> None:
    step = make_step(objective={"batch_norm": "frozen"})
    before = {k: v.clone() for k, v in step.network.named_buffers()}
    weight = step.network.network[0].weight.detach().clone()
    step(batch, 0, 0, 0.1)
    torch.testing.assert_close(dict(step.network.named_buffers()), before, atol=0, rtol=0)
    assert not torch.equal(step.network.network[0].weight, weight)


@pytest.mark.parametrize("parts", [2, 5, 50])
def test_accumulated_parts_are_the_whole_batch(make_step: Any, batch: Batch, parts: int) -> None:
    """Where batch norm does not couple examples; also if parts are unequal or more than the examples."""
    steps = [make_step(objective={"batch_norm": "frozen"}, training={"accumulate": n}) for n in (1, parts)]
    metrics = [step(batch, 0, 0, 0.1) for step in steps]
    torch.testing.assert_close(metrics[1], metrics[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(steps[1].network.state_dict(), steps[0].network.state_dict(), atol=1e-6, rtol=1e-4)


def test_clipping_bounds_the_gradients_norm(make_step: Any, batch: Batch) -> None:
    norms = []
    for limit in (None, 0.1):
        step = make_step(objective=CLEAN, training={"clip_norm": limit})
        step(batch, 0, 0, 0.1)
        norms.append(torch.cat([p.grad.flatten() for p in step.network.parameters()]).norm().item())
    assert norms[0] > 0.5
    assert norms[1] == pytest.approx(0.1, rel=1e-3)


def test_awp_is_the_published_step(make_step: Any, batch: Batch) -> None:
    """Weights move by gamma of their norm along their gradient, the update's gradient is taken there, and they move back."""
    step = make_step(objective=CLEAN, training={"awp_gamma": 0.05})
    f = copy.deepcopy(step.network)
    plain = make_step(objective=CLEAN)
    proxy = copy.deepcopy(f)
    F.cross_entropy(proxy(batch.x_BCHW), batch.y_B).backward()
    moved = copy.deepcopy(f)
    with torch.no_grad():
        for (name, p), q in zip(moved.named_parameters(), proxy.parameters(), strict=True):
            if p.dim() > 1:
                assert name.endswith("weight")
                p.add_(0.05 * p.norm() * q.grad / q.grad.norm())
    loss = F.cross_entropy(moved(batch.x_BCHW), batch.y_B)
    loss.backward()
    with torch.no_grad():
        for p, q in zip(f.parameters(), moved.parameters(), strict=True):
            p.sub_(0.1 * (q.grad + 0.01 * p))
    metrics = step(batch, 0, 0, 0.1)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() > plain(batch, 0, 0, 0.1)["loss"].item(), "the weights were moved to where the loss is higher"
    torch.testing.assert_close(dict(step.network.named_parameters()), dict(f.named_parameters()), atol=1e-6, rtol=1e-5)
    # running statistics remember the one pass that counts
    torch.testing.assert_close(step.network.network[1].running_mean, moved.network[1].running_mean)
    assert step.network.network[1].num_batches_tracked == moved.network[1].num_batches_tracked


def test_awp_waits_for_its_warm_up(make_step: Any, batch: Batch) -> None:
    losses = [make_step(objective=CLEAN, training={"awp_gamma": 0.05, "awp_warmup": 2})(batch, e, 0, 0.1)["loss"] for e in (1, 2)]
    plain = make_step(objective=CLEAN)(batch, 1, 0, 0.1)["loss"]
    torch.testing.assert_close(losses[0], plain)
    assert losses[1] > losses[0] + 1e-3


def test_the_average_of_weights_is_exponential(make_step: Any, batch: Batch) -> None:
    """averaged <- d averaged + (1 - d) weights, d = min(decay, (1 + n) / (10 + n)) over the n averages before."""
    step = make_step(objective=CLEAN, training={"ema_decay": 0.3})
    averaged: dict[str, Tensor] = {}
    for i in range(8):
        step(batch, 0, i, 0.1)
        now = {k: v.detach().clone() for k, v in step.network.state_dict().items()}
        decay = min(0.3, (1 + i) / (10 + i))
        averaged = (
            {k: decay * averaged[k] + (1 - decay) * v if v.is_floating_point() else v for k, v in now.items()} if i else now
        )
    torch.testing.assert_close(step.result.state_dict(), averaged, atol=1e-6, rtol=1e-5)
    assert step.result is not step.network
    assert not torch.equal(averaged["network.0.weight"], step.network.network[0].weight)


def test_a_sampled_term_has_the_summed_loss_in_the_mean(make_step: Any, batch: Batch) -> None:
    objective = {"clean": {"weight": 0.2}, "image": {"weight": 0.5}, "latent": {"weight": 1.3}, "terms": "sample"}
    step = make_step(objective=objective)
    drawn = [step.objective.drawn(0, f"0/{i}") for i in range(3000)]
    assert all(len(d) == 1 and next(iter(d.values())) == pytest.approx(2.0) for d in drawn)
    names = [next(iter(d)) for d in drawn]
    for name, weight in (("clean", 0.2), ("image", 0.5), ("latent", 1.3)):
        # three standard deviations of a share
        share = weight / 2
        assert names.count(name) / 3000 == pytest.approx(share, abs=3 * (share * (1 - share) / 3000) ** 0.5)
    metrics = step(batch, 0, 0, 0.1)
    (name,) = step.objective.drawn(0, "0/0")
    assert set(metrics) == {"loss", f"{name}_loss", f"{name}_accuracy"}
    assert metrics["loss"].item() == pytest.approx(2 * metrics[f"{name}_loss"].item())


def update_of(step: TrainingStep, batch: Batch) -> Tensor:
    before = torch.cat([p.detach().flatten() for p in step.network.parameters()])
    step(batch, 0, 0, 0.1)
    return torch.cat([p.detach().flatten() for p in step.network.parameters()]) - before


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"channels_last": True}, pytest.param({"compile": True}, marks=pytest.mark.exhaustive)],  # a compiler is at work
)
def test_layout_and_compilation_do_not_change_the_step(make_step: Any, batch: Batch, changes: dict[str, Any]) -> None:
    expected, found = update_of(make_step(objective=CLEAN), batch), update_of(make_step(objective=CLEAN, training=changes), batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_a_network_that_flattens_by_view_is_trained_in_the_usual_layout(
    make_config: MakeConfig, generator: StyleGAN2, tmp_path: Path, batch: Batch
) -> None:
    ends = []
    for channels_last in (False, True):
        torch.manual_seed(5)
        config = make_config(training={**SGD, "channels_last": channels_last, "ema_decay": 0.5})
        step = TrainingStep(config, ViewingNet().train(), generator, LocalContext(tmp_path))
        for i in range(2):
            step(batch, 0, i, 0.1)
        logits = step.result.eval()(batch.x_BCHW)
        ends.append([logits, *step.network.state_dict().values(), *step.result.state_dict().values()])
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-3)


def test_bf16_leaves_weights_in_float32_and_goes_about_the_same_way(make_step: Any, batch: Batch) -> None:
    lowered = make_step(objective=CLEAN, training={"precision": "bf16"})
    expected, found = update_of(make_step(objective=CLEAN), batch), update_of(lowered, batch)
    assert {p.dtype for p in lowered.network.parameters()} == {torch.float32}
    assert {p.dtype for p in lowered.view.parameters()} == {torch.bfloat16}
    assert not torch.equal(found, expected)
    assert F.cosine_similarity(found, expected, dim=0) > 0.95
    only_update = make_step(training={"precision": "bf16", "attack_precision": "float32"})
    assert {p.dtype for p in only_update.view.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["reference", "fast"])
def test_recomputed_activations_give_the_same_gradient(generator_folder: Path, make_batch: MakeBatch, precision: str) -> None:
    batch = make_batch(4)
    assert batch.w_BLD is not None
    slopes = []
    for again in (False, True):
        loaded = generators.load_generator(str(generator_folder), precision=precision)
        kept: list[int] = []
        if again:
            generators.recompute(loaded)
        w = batch.w_BLD.clone().requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):
            x = loaded.synthesis(w)
        slopes.append((sum(kept), torch.autograd.grad(x.square().sum(), w)[0]))
    torch.testing.assert_close(slopes[0][1], slopes[1][1])
    assert slopes[1][0] < slopes[0][0] / 2, "less is kept"


def test_dropout_does_not_depend_on_what_came_before(make_config: MakeConfig, tmp_path: Path, batch: Batch) -> None:
    config = make_config(objective=CLEAN)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)).train()
        step = TrainingStep(config, network, None, LocalContext(tmp_path))
        torch.manual_seed(seed)
        losses.append(step(batch, 0, 0, 0.1)["loss"].item())
    assert losses[0] == losses[1]


def test_state_brings_everything_back(make_step: Any, batch: Batch) -> None:
    settings: dict[str, Any] = {"objective": {"batch_norm": "per_term"}, "training": {"ema_decay": 0.9}}
    one, two = make_step(**settings), make_step(**settings)
    for i in range(3):
        one(batch, 0, i, 0.1)
    two.load(copy.deepcopy(one.state()))
    metrics = [step(batch, 0, 3, 0.1) for step in (one, two)]
    torch.testing.assert_close(metrics[0], metrics[1], atol=0, rtol=0)
    torch.testing.assert_close(one.state(), two.state(), atol=0, rtol=0)


def test_a_latent_term_without_w_is_refused(make_step: Any, batch: Batch) -> None:
    with pytest.raises(UserError, match="a latent attack needs w"):
        make_step()(Batch(batch.id, batch.x_BCHW, batch.y_B), 0, 0, 0.1)


def test_dropouts_masks_are_new_in_every_step(make_config: MakeConfig, batch: Batch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    step = TrainingStep(make_config(objective=CLEAN), network, None, LocalContext(tmp_path))
    losses = [step(batch, epoch, i, 0.0)["loss"].item() for epoch, i in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert losses[3] == losses[0]
    assert len(set(losses)) == 3


def test_averaging_that_begins_in_a_branch_begins_at_its_weights(make_config: MakeConfig, batch: Batch, tmp_path: Path) -> None:
    def made(ema_decay: float) -> TrainingStep:
        torch.manual_seed(int(10 * ema_decay))
        network = classifiers.build(ClassifierConfig(name="digits_cnn"), 1, 4).train()
        return TrainingStep(
            make_config(objective=CLEAN, training={"ema_decay": ema_decay}), network, None, LocalContext(tmp_path)
        )

    trunk, branch = made(0.0), made(0.9)
    trunk(batch, 0, 0, 0.1)
    branch.load(trunk.state())
    torch.testing.assert_close(branch.result.state_dict(), trunk.network.state_dict(), atol=0, rtol=0)
