"""The first convolution: the same output and the same gradient to the image as PyTorch's."""

import pytest
import torch
from gradients import require_same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dmat_ray.networks.stem import Stem, fits


@given(
    taps=st.integers(1, 11),
    stride=st.integers(2, 4),
    padding=st.integers(0, 5),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(12, 21), st.integers(12, 21)),
)
def test_gradient_to_the_image_is_torchs(taps: int, stride: int, padding: int, channels: int, size: tuple[int, int]) -> None:
    conv = nn.Conv2d(channels, 5, taps, stride=stride, padding=min(padding, taps - 1)).double().requires_grad_(False)
    stem = Stem(conv)
    x = torch.rand(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    require_same(stem, conv, x)


def test_refresh_takes_over_new_weights() -> None:
    conv = nn.Conv2d(3, 4, 7, stride=2, padding=3).requires_grad_(False)
    stem = Stem(conv)
    with torch.no_grad():
        conv.weight.normal_()
    stem.refresh()
    x = torch.rand(1, 3, 16, 16)
    slopes = [torch.autograd.grad(f(x.requires_grad_(True)).square().sum(), x)[0] for f in (stem, conv)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("conv", "may"),
    [
        (nn.Conv2d(3, 8, 7, stride=2, padding=3), True),
        (nn.Conv2d(3, 8, 3), False),
        (nn.Conv2d(8, 8, 3, stride=2), False),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), False),
        (nn.Conv2d(3, 8, 3, stride=2, dilation=2), False),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(3, 8, 3, stride=(2, 1)), False),
        (nn.Linear(3, 3), False),
    ],
)
def test_what_may_become_a_stem(conv: nn.Module, may: bool) -> None:
    assert fits(conv) == may
