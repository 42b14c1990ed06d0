"""Balls of threats: the closest point, the steepest step and random points, in each norm."""

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray import threats
from dmat_ray.config import ImageThreat
from dmat_ray.rng import Draws
from dmat_ray.threats.balls import ball_norm, project_ball, project_l1_in_box, random_in_ball, steepest
from dmat_ray.types import Batch


@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 10), scale=st.floats(0.01, 100))
def test_projection_is_the_closest_point(seed: int, eps: float, scale: float) -> None:
    theta = scale * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    box = project_ball(theta, "linf", eps)
    np.testing.assert_array_equal(box.numpy(), np.clip(theta.numpy(), -eps, eps))
    for before, after in zip(theta.flatten(1).numpy(), project_ball(theta, "l2", eps).flatten(1).numpy(), strict=True):
        size = np.linalg.norm(before)
        if size <= eps:
            np.testing.assert_allclose(after, before)
        else:
            assert np.linalg.norm(after) == pytest.approx(eps)
            np.testing.assert_allclose(after / eps, before / size, atol=1e-9)


@given(seed=st.integers(0, 10**6))
def test_steepest_reaches_the_dual_norm(seed: int) -> None:
    """The largest <g, s> over the unit ball is the L1 norm of g for L-infinity and its L2 norm for L2."""
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for norm, order in (("linf", 1), ("l2", 2)):
        step = steepest(gradient, norm)
        reached = (gradient * step).flatten(1).sum(dim=1)
        np.testing.assert_allclose(reached, np.linalg.norm(gradient.flatten(1).numpy(), ord=order, axis=1))
        np.testing.assert_allclose(ball_norm(step, norm), 1.0)


@pytest.mark.parametrize("power", [-140, -80, -45, 0, 100])
def test_a_step_in_l2_is_of_unit_length_however_small_the_gradient(power: int) -> None:
    """That of a network that is very sure has squares below what single precision holds."""
    gradient = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)).clamp(0.5, 2)
    scaled = (gradient.double() * 2.0**power).float()
    assert scaled.min() > 0
    torch.testing.assert_close(steepest(scaled, "l2"), steepest(gradient, "l2"), rtol=1e-2 if power == -140 else 1e-6, atol=0)


def test_a_step_in_l1_goes_to_the_largest_coordinates() -> None:
    gradient = torch.randn(4, 1, 16, 25, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.0, 0.01, 0.5, 1.0])
    for counts, sparse_B in (([4, 4, 4, 4], None), ([1, 4, 200, 400], shares)):  # a hundredth of 400, or as is asked
        for count, step, slope in zip(counts, steepest(gradient, "l1", sparse_B).flatten(1), gradient.flatten(1), strict=True):
            largest = slope.abs().argsort(descending=True)[:count]
            wanted = torch.zeros(400)
            wanted[largest] = slope[largest].sign() / count
            torch.testing.assert_close(step, wanted)


@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 4), boxed=st.booleans())
def test_projection_to_l1_is_the_closest_point(seed: int, eps: float, boxed: bool) -> None:
    """Against a solver of quadratic programs that knows nothing of thresholds: point = plus - minus, both positive."""
    rng = np.random.default_rng(seed)
    point = rng.normal(0, 2, 6)
    low, high = (-rng.uniform(0, 1, 6), rng.uniform(0, 1, 6)) if boxed else (np.full(6, -9.0), np.full(6, 9.0))
    found = project_l1_in_box(*(torch.from_numpy(a)[None] if isinstance(a, np.ndarray) else a for a in (point, eps, low, high)))[
        0
    ]
    solved = scipy.optimize.minimize(
        lambda z: ((z[:6] - z[6:] - point) ** 2).sum(),
        np.zeros(12),
        jac=lambda z: np.concatenate([2 * (z[:6] - z[6:] - point), -2 * (z[:6] - z[6:] - point)]),
        bounds=[*((0, h) for h in high), *((0, -b) for b in low)],
        constraints={"type": "ineq", "fun": lambda z: eps - z.sum(), "jac": lambda _: -np.ones(12)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    np.testing.assert_allclose(found.numpy(), solved[:6] - solved[6:], atol=1e-5)


def test_a_zero_gradient_is_no_step() -> None:
    zero = torch.zeros(2, 1, 4, 4)
    for norm in ("linf", "l2", "l1"):
        assert torch.equal(steepest(zero, norm), zero)
        assert torch.equal(project_ball(zero, norm, 0.5), zero)


def test_random_points_are_uniform_in_the_ball() -> None:
    like = torch.empty(1500, 1, 2, 2)
    draws = Draws(0, [f"example-{i}" for i in range(1500)], "test")
    box = random_in_ball(draws, like, "linf").numpy()
    assert scipy.stats.kstest((box.ravel() + 1) / 2, "uniform").pvalue > 0.01
    ball = random_in_ball(draws, like, "l2").flatten(1).numpy()
    # in four dimensions the share of the ball within r is r^4
    assert scipy.stats.kstest(np.linalg.norm(ball, axis=1) ** 4, "uniform").pvalue > 0.01
    assert np.abs(ball.mean(axis=0)).max() < 0.05
    diamond = random_in_ball(draws, like, "l1").flatten(1).numpy()
    assert scipy.stats.kstest(np.abs(diamond).sum(axis=1) ** 4, "uniform").pvalue > 0.01
    assert np.abs(diamond.mean(axis=0)).max() < 0.05
    # on the simplex every coordinate's share is Beta(1, dims - 1)
    share = np.abs(diamond[:, 0]) / np.abs(diamond).sum(axis=1)
    assert scipy.stats.kstest(share, scipy.stats.beta(1, 3).cdf).pvalue > 0.01


def test_a_step_in_l1_leaves_out_pixels_that_are_at_the_border_it_would_cross() -> None:
    x = torch.full((1, 1, 4, 5), 0.5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 0.0
    gradient = torch.full_like(x, 0.1)
    gradient[0, 0, 0, 0], gradient[0, 0, 0, 1], gradient[0, 0, 2, 2] = 9.0, -8.0, 1.0  # the steepest lead out of [0, 1]
    threat = threats.build(ImageThreat(norm="l1", eps=1.0), None)
    step = threat.direction(Batch(["a"], x, torch.tensor([0])), torch.zeros_like(x), gradient)
    expected = torch.zeros_like(x)
    expected[0, 0, 2, 2] = 1.0
    torch.testing.assert_close(step, expected)
    inwards = threat.direction(Batch(["a"], x, torch.tensor([0])), torch.zeros_like(x), -gradient)
    assert inwards[0, 0, 0, 0] == -1
