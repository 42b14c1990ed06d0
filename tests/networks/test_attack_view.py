"""The copy that attacks see is the network: its outputs and its gradients to the image."""

import functools
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from gradients import require_same
from torch import Tensor, nn
from viewed_networks import Small, trained_a_little

from dmat_ray.config import ClassifierConfig
from dmat_ray.networks import classifiers
from dmat_ray.networks.attack_view import AttackView

NETWORKS = [("digits_cnn", 4), ("resnet18", 20), ("densenet121", 59), ("mobilenet_v3_small", 34)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folded", "channels_last"),
    [
        *((*network, True) for network in NETWORKS),
        *((*network, False) for network in NETWORKS[:2]),
        *(pytest.param(name, n, True, marks=pytest.mark.exhaustive) for name, n in (("vgg11", 0), ("vgg11_bn", 8))),  # large ones
    ],
)
def test_the_view_is_the_network(name: str, folded: int, channels_last: bool) -> None:
    torch.manual_seed(1)
    network = trained_a_little(classifiers.build(ClassifierConfig(name=name), 3, 5), 3, 40)
    view = AttackView(network, torch.float64, channels_last)
    assert len(view.folded) == folded
    x = torch.rand(3, 3, 40, 40, dtype=torch.float64)
    require_same(view, network, x)
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
            tensor.mul_(1.1)
    with pytest.raises(AssertionError, match="not close"):
        require_same(view, network, x)
    view.refresh()
    require_same(view, network, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/resnet18", "timm/convnext_atto", "timm/resnetv2_18", "timm/efficientnet_lite0"])
def test_timm_models_have_views(name: str) -> None:
    torch.manual_seed(1)
    network = trained_a_little(classifiers.build(ClassifierConfig(name=name), 1, 5), 1, 32)
    require_same(AttackView(network, torch.float64), network, torch.rand(2, 1, 32, 32, dtype=torch.float64))


class Shared(nn.Module):
    """Two layers of one convolution's weights, tied or taken out of it, each before a batch norm of its own."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.one, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        if tied:
            self.two = nn.Conv2d(3, 3, 3, padding=1)
            self.two.weight = self.one.weight
        self.norm_two, self.three, self.norm_three = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.one(x)))
        h = self.two(h) if self.tied else nn.functional.conv2d(h, self.one.weight, padding=1)
        return self.norm_three(self.three(torch.relu(self.norm_two(h)))).mean(dim=(2, 3))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_at_work_in_two_places_are_not_folded(tied: bool) -> None:
    torch.manual_seed(0)
    network = trained_a_little(Shared(tied), 3, 8)
    view = AttackView(network, torch.float64)
    assert view.folded == [("three", "norm_three")]
    require_same(view, network, torch.rand(3, 3, 8, 8, dtype=torch.float64))


class Normalising(Small):
    def forward(self, x: Tensor, normalised: Tensor | None = None, scale: float = 0.3) -> Tensor:
        return super().forward((x - 0.4) / scale if normalised is None else normalised)


def with_hooks(where: str) -> nn.Module:
    """Before and after the whole network, or a layer of it."""
    network = Small()
    layer = network if where == "network" else network.get_submodule(where)
    layer.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - 0.1) / 0.3,))
    layer.register_forward_hook(lambda _, inputs, output: output * 2 + inputs[0].mean())
    return network


def with_weights_made_anew(how: str) -> nn.Module:
    network = Small()
    if how == "pruned":
        nn.utils.prune.random_unstructured(network.conv, "weight", 0.3)
    elif how == "weight norm":
        nn.utils.weight_norm(network.conv)
    elif how == "spectral norm":
        nn.utils.spectral_norm(network.conv)
    elif how == "parametrised":
        nn.utils.parametrizations.weight_norm(network.conv)
    return network


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "folds"),
    [
        (Normalising, True),
        *((functools.partial(with_hooks, where), where in ("network", "head")) for where in ("network", "conv", "norm", "head")),
        *(
            (functools.partial(with_weights_made_anew, how), False)
            for how in ("pruned", "weight norm", "spectral norm", "parametrised")
        ),
    ],
)
def test_the_view_is_the_network_as_it_is_called(make: Callable[[], nn.Module], folds: bool) -> None:
    """Arguments with defaults, hooks, weights that are made anew by each call: an attack on another function finds less."""
    torch.manual_seed(0)
    network = trained_a_little(make(), 1, 8)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        network(x)  # of older norms of weights a copy can be made only after such a call
    view = AttackView(network, torch.float64)
    assert view.folded == ([("conv", "norm")] if folds else [])
    require_same(view, network, x)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1.1)
    view.refresh()
    require_same(view, network, x)


def test_a_layer_that_forward_does_not_use_may_own_another_ones_weights() -> None:
    network = Small()
    del network.head  # so that the other comes first
    network.aside, network.head = nn.Linear(4, 3), nn.Linear(4, 3)
    network.head.weight = network.aside.weight
    network = trained_a_little(network, 1, 8)
    view, x = AttackView(network, torch.float64), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    require_same(view, network, x)
    with torch.no_grad():
        network.head.weight.mul_(2)
    view.refresh()
    require_same(view, network, x)


class Centring(Small):
    """Keeps a mean of its images: at first one number, then a new tensor of their shape in each step."""

    def __init__(self, folds: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        if not folds:
            self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return super().forward(x - self.mean)


@pytest.mark.parametrize("folds", [True, False])
def test_a_buffer_that_is_bound_anew_in_each_step_is_followed(folds: bool) -> None:
    torch.manual_seed(0)
    network, x = Centring(folds).double(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    view = AttackView(network, torch.float64)
    for step in range(3):
        network.train()(x + step)
        view.refresh()
        require_same(view, network.eval(), x)
    assert bool(view.folded) == folds


def test_bf16_is_near_and_float32_comes_out() -> None:
    torch.manual_seed(1)
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), 1, 5).eval()
    x = torch.rand(8, 1, 32, 32)
    with torch.no_grad():
        found, expected = AttackView(network, torch.bfloat16)(x), network(x)
    assert found.dtype == torch.float32
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03


def test_attacks_on_the_view_leave_the_network_alone() -> None:
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), 1, 5).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    view = AttackView(network)
    view(torch.rand(4, 1, 32, 32)).sum()
    assert not any(p.requires_grad for p in view.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert network.training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert len(list(network.modules())) == len(list(classifiers.build(ClassifierConfig(name="digits_cnn"), 1, 5).modules()))


def test_a_network_that_draws_numbers_goes_on_drawing_them() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean(dim=(2, 3)) + torch.randn(3)

    view, x = AttackView(Noisy().eval()), torch.rand(2, 1, 8, 8)
    assert not torch.equal(view(x), view(x))


def test_a_network_that_draws_numbers_by_python_goes_on_drawing_them() -> None:
    class Shifted(nn.Module):
        """Random padding, as defences have it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, stride=3)
            self.draws = random.Random(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left = self.draws.randint(0, 5)
            return self.conv(nn.functional.pad(x, (left, 5 - left, 0, 0))).mean(dim=(2, 3))

    view, x = AttackView(Shifted().eval()), torch.rand(2, 1, 8, 8)
    assert len({round(view(x).sum().item(), 4) for _ in range(20)}) > 2  # some shifts are another one by a stride
