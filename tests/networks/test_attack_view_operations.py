"""Operations whose gradients are not told, that decide or come twice: what attacks see of them, and what is not folded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import require_same
from torch import Tensor, nn
from viewed_networks import Small, trained_a_little

from dmat_ray.networks.attack_view import AttackView, takes, view_of


class Rounded(torch.autograd.Function):
    """To 16 levels, with the gradient of the identity: as networks with few bits are trained, and attacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 15).round() / 15

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Clipped(torch.autograd.Function):
    """Whose backward shows only where the clipping does, which is not between 0 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1.0, 2.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        lost = (x * 15).round() / 15 - x
    return x + lost


def with_gradients_switched_off(x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    lost = (x * 15).round() / 15 - x
    torch.set_grad_enabled(True)
    return x + lost


def of_tensors(x: Tensor) -> Tensor:
    return x * 2 if isinstance(x, Tensor) else x


def with_a_hook(x: Tensor) -> Tensor:
    if x.requires_grad is True:
        x.register_hook(lambda gradient: -gradient)
    return x


@pytest.mark.parametrize(
    "act", [Rounded.apply, Clipped.apply, without_gradients, with_gradients_switched_off, of_tensors, with_a_hook]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_operations_do_not_tell_are_the_networks(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """An attack on the operations alone finds nothing where these round, and the network passes for robust."""

    class Acting(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(act(x))

    torch.manual_seed(0)
    network = trained_a_little(Acting(), 1, 8)
    if dtype == torch.bfloat16:
        network = network.float()
    x = 2.5 * torch.rand(3, 1, 8, 8, dtype=next(network.parameters()).dtype)
    before = torch.get_rng_state()
    view = AttackView(network, dtype)
    with torch.no_grad():
        view(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert view.folded == []
    if dtype == torch.float64:
        require_same(view, network, x)
    else:
        ours, theirs = (
            torch.autograd.grad(f(start := x.clone().requires_grad_(True))[:, 0].sum(), start)[0] for f in (view, network)
        )
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


class Deciding(nn.Module):
    """Cannot be traced: what it does depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean(dim=(2, 3))
        return self.head(x if x.sum() > 0 else -x)


class Twice(nn.Module):
    """A convolution with two batch norms, a batch norm with two uses, and an output that goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.split, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 4, 1, bias=False)
        self.last = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.shared(x)).relu() + self.two(self.shared(x * 2)).tanh()
        y = self.split(x)
        x = self.after(y) + y.sin() + self.after(x)
        return self.last(self.bare(x)).mean(dim=(2, 3))


@pytest.mark.parametrize(("make", "folded"), [(Deciding, 0), (Twice, 1)])
def test_what_cannot_be_folded_stays(make: type[nn.Module], folded: int) -> None:
    torch.manual_seed(2)
    network = make().double()
    network(torch.rand(5, 1, 8, 8, dtype=torch.float64))
    view = AttackView(network.eval(), torch.float64)
    assert len(view.folded) == folded
    require_same(view, network, torch.rand(3, 1, 8, 8, dtype=torch.float64))


class Flattened(nn.Module):
    """Takes its last map apart as LeNet does, in the usual order of channels, rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 64, 5)

    def forward(self, x_BCHW: Tensor) -> Any:
        return self.linear(self.bn(self.conv(x_BCHW)).relu().view(len(x_BCHW), -1))


@pytest.mark.parametrize("traced", [True, False])
def test_a_network_that_flattens_by_view_has_one_in_the_usual_layout(traced: bool) -> None:
    network = trained_a_little(Flattened(), 3, 8).float()
    if not traced:
        network.register_forward_hook(lambda *_: None)
    x = torch.rand(4, 3, 8, 8)
    assert not takes(copy.deepcopy(network).to(memory_format=torch.channels_last), x, torch.channels_last)
    view = view_of(network)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x):
        torch.testing.assert_close(view(images.requires_grad_(True)), network(x), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(view(x).square().sum(), x)
    (expected,) = torch.autograd.grad(network(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
