"""Batch norm over several terms, against passes of PyTorch's own layers."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dmat_ray.errors import UserError
from dmat_ray.networks import batch_norm


@pytest.fixture
def plain(small_net: nn.Module) -> nn.Module:
    """A network with torch's batch norm, in float64, without dropout."""
    small_net.drop.p = 0.0
    return small_net.double().train()


@pytest.fixture
def network(plain: nn.Module) -> nn.Module:
    """The same, prepared."""
    return batch_norm.prepare(copy.deepcopy(plain))


def images(*seeds: int) -> list[Tensor]:
    """Batches that differ in mean and spread."""
    return [
        torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * (0.3 + 0.2 * s) for s in seeds
    ]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def gradients(network: nn.Module) -> Iterator[Tensor]:
    for p in network.parameters():
        assert p.grad is not None
        yield p.grad


def test_prepared_layers_are_torchs_until_told_of_terms(plain: nn.Module, network: nn.Module) -> None:
    (x,) = images(0)
    assert isinstance(network.norm, batch_norm.TermBatchNorm2d)
    torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(state(network), state(plain), rtol=0, atol=0)
    torch.testing.assert_close(network.eval()(x), plain.eval()(x), rtol=0, atol=0)


def test_terms_in_one_batch_are_as_in_passes_of_their_own(plain: nn.Module, network: nn.Module) -> None:
    parts = images(0, 1, 2)
    expected = torch.cat([plain(x) for x in parts])
    expected.square().sum().backward()
    with batch_norm.terms_in_batch(network, (0, 1, 2)):
        found = network(torch.cat(parts))
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(list(gradients(network)), list(gradients(plain)))
    torch.testing.assert_close(state(network), state(plain))


def test_afterwards_a_batch_is_one_again(plain: nn.Module, network: nn.Module) -> None:
    parts = images(0, 1)
    with batch_norm.terms_in_batch(network, (0, 1)):
        pass
    torch.testing.assert_close(network(torch.cat(parts)), plain(torch.cat(parts)))


def test_statistics_kept_apart_are_those_of_each_terms_images_alone(plain: nn.Module, network: nn.Module) -> None:
    batch_norm.keep_apart(network, 2)
    alone = [copy.deepcopy(plain) for _ in range(2)]
    for seed in range(3):
        parts = images(seed, seed + 5)
        with batch_norm.terms_in_batch(network, (0, 1)):
            network(torch.cat(parts))
        for one, x in zip(alone, parts, strict=True):
            one(x)
    for term in (0, 1):
        batch_norm.show(network, [term])
        torch.testing.assert_close(network.norm.running_mean, alone[term].norm.running_mean)
        torch.testing.assert_close(network.norm.running_var, alone[term].norm.running_var)
    batch_norm.show(network, (0, 1))
    torch.testing.assert_close(network.norm.running_mean, (alone[0].norm.running_mean + alone[1].norm.running_mean) / 2)
    assert (alone[0].norm.running_mean - alone[1].norm.running_mean).abs().max() > 0.01


def test_statistics_go_on_from_those_of_as_many_terms_or_from_the_layers(network: nn.Module) -> None:
    batch_norm.keep_apart(network, 2)
    with batch_norm.terms_in_batch(network, (0, 1)):
        network(torch.cat(images(1, 7)))
    stored = [tensor.clone() for tensor in batch_norm.apart(network)]
    same, more = copy.deepcopy(network), copy.deepcopy(network)
    batch_norm.keep_apart(same, 2)
    batch_norm.restore(same, stored)
    assert all(torch.equal(mine, old) for mine, old in zip(batch_norm.apart(same), stored, strict=True))
    batch_norm.keep_apart(more, 3)
    more.norm.running_mean.fill_(0.25)
    batch_norm.restore(more, stored)
    assert torch.equal(more.norm.mean_TC, torch.full_like(more.norm.mean_TC, 0.25))
    assert len(more.norm.mean_TC) == 3


def test_frozen_statistics_neither_move_nor_depend_on_the_batch(plain: nn.Module, network: nn.Module) -> None:
    (x,) = images(3)
    before = state(network)
    with batch_norm.frozen_statistics(network):
        found = network(x)
    torch.testing.assert_close(found, plain.eval()(x))
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert network.norm.training


def test_unmoved_puts_statistics_back(network: nn.Module) -> None:
    batch_norm.keep_apart(network, 1)
    before, apart = state(network), [t.clone() for t in batch_norm.apart(network)]
    with batch_norm.unmoved(network):
        with batch_norm.terms_in_batch(network, (0,)):
            network(images(0)[0])
        network(images(0)[0])
        assert not torch.equal(network.norm.running_mean, before["norm.running_mean"])
        assert not torch.equal(batch_norm.apart(network)[0], apart[0])
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    torch.testing.assert_close(batch_norm.apart(network), apart, rtol=0, atol=0)


def test_unmoved_puts_a_buffer_back_that_was_bound_anew() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.passes = self.passes + 1
            return x * self.passes

    network = Counting()
    with batch_norm.unmoved(network):
        network(torch.ones(1))
        assert network.passes == 1
    assert network.passes == 0


def test_a_layer_that_averages_over_all_batches_is_not_kept_apart(plain: nn.Module) -> None:
    """Its terms would have other statistics than torch's, which weigh a batch by one over the number of batches."""
    plain.norm.momentum = None
    network = batch_norm.prepare(copy.deepcopy(plain))
    with pytest.raises(UserError, match="per_term needs batch norm with a momentum, and this network's is None"):
        batch_norm.keep_apart(network, 2)
    for seed in range(3):
        (x,) = images(seed)
        plain(x)
        with batch_norm.terms_in_batch(network, (0,)):
            network(x)
    torch.testing.assert_close(state(network), state(plain))


def test_other_kinds_of_batch_norm_are_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    network = batch_norm.prepare(nn.Sequential(nn.BatchNorm2d(3), Own(3)))
    assert [type(m) for m in network] == [batch_norm.TermBatchNorm2d, Own]
    assert not batch_norm.can_share_a_batch(network)
    with pytest.raises(UserError, match="per_term needs plain BatchNorm2d layers; this network has Own"):
        batch_norm.keep_apart(network, 2)
    assert batch_norm.can_share_a_batch(nn.Sequential(nn.LayerNorm(3)))
