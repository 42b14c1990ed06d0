"""Means over trainings with intervals over images and seeds, against scipy and against draws whose truth is known."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray.evaluation.intervals import Estimate, estimate, estimate_apart, student_chance, student_quantile


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 3, 4.7, 10, 99, 1234.5, 1e5, 1e7, np.inf])
def test_students_t_is_scipys(freedom: float) -> None:
    assert student_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-8)


@given(t=st.floats(-100, 100), freedom=st.floats(1, 1e6))
def test_the_tails_of_students_t_are_scipys(t: float, freedom: float) -> None:
    assert student_chance(t, freedom) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom), rel=1e-7, abs=1e-250)


@pytest.mark.parametrize("least", [-1, 0])
def test_an_interval_of_one_pair_of_models_is_that_of_its_mean(least: int) -> None:
    better = np.random.default_rng(0).integers(least, 2, 300)
    found = estimate([better.astype(float)])
    assert found.value == pytest.approx(better.mean())
    low, high = scipy.stats.t.interval(0.95, len(better) - 1, better.mean(), scipy.stats.sem(better))
    assert (found.low, found.high) == pytest.approx((low, high))
    back = estimate([-better.astype(float)])
    assert (back.low, back.high) == pytest.approx((-high, -low)), "the other way round"


def test_an_interval_of_one_model_is_as_wide_as_wilsons() -> None:
    found = estimate([(np.arange(300) < 291).astype(float)], share=True)
    low, high = scipy.stats.binomtest(291, 300).proportion_ci(method="wilson")
    assert (found.value, found.half) == (pytest.approx(0.97), pytest.approx((high - low) / 2))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.8, 0.95, 0.97, 0.99])
def test_an_interval_of_one_model_covers_the_truth_near_the_ends_too(share: float) -> None:
    """Exactly: the probability of every number of right answers among 100 whose interval has the truth."""
    every = [estimate([(np.arange(100) < right).astype(float)], share=True) for right in range(101)]
    has = [found.low <= share <= found.high for found in every]
    assert scipy.stats.binom.pmf(np.arange(101), 100, share)[has].sum() >= 0.93


def test_where_images_do_not_differ_the_interval_is_students_over_trainings() -> None:
    first, second = np.array([0.61, 0.7, 0.64, 0.58]), np.array([0.5, 0.66, 0.59])
    rows = [[np.full(50, value) for value in side] for side in (first, second)]
    found, expected = estimate(rows[0]), scipy.stats.ttest_1samp(first, 0)
    assert (found.value, found.freedom, found.trainings) == (pytest.approx(first.mean()), pytest.approx(3), 4)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.chance(0.6) == pytest.approx(scipy.stats.ttest_1samp(first, 0.6).pvalue)
    apart, welch = estimate_apart(*rows), scipy.stats.ttest_ind(first, second, equal_var=False)
    assert (apart.low, apart.high) == pytest.approx(tuple(welch.confidence_interval()))
    assert (apart.chance(), apart.freedom) == (pytest.approx(welch.pvalue), pytest.approx(welch.df))
    assert (apart.trainings, apart.others) == (4, 3)


def test_two_trainings_that_differ_have_a_very_wide_interval() -> None:
    found = estimate([np.full(1000, 0.7), np.full(1000, 0.6)])
    assert found.half == pytest.approx(12.706 * 0.05, rel=1e-4)
    assert str(found) == "65.0 ± 63.5"


def test_a_tie_is_rounded_as_it_is_in_decimal() -> None:
    assert str(Estimate(0.2875, 0.0125, 1)).split() == [f"{28.75:.1f}", "±", f"{1.25:.1f}"]


@pytest.mark.parametrize(("trainings", "least"), [(2, 0.84), (3, 0.90), (5, 0.91)])
@pytest.mark.parametrize("spread", [0.1, 0.6])
def test_an_interval_covers_the_truth_when_images_and_seeds_are_drawn(trainings: int, spread: float, least: float) -> None:
    rng, held = np.random.default_rng(0), {"one": 0, "apart": 0}
    for _ in range(400):
        hardness = rng.normal(0, 1, 300)
        one, other = (
            (1 + rng.normal(0, spread, (count, 1)) - hardness + rng.normal(0, 1, (count, 300)) > 0).astype(float)
            for count in (trainings, trainings + 1)
        )
        # the sum of the three draws is normal with variance 1 + spread^2 + 1
        truth = scipy.stats.norm.cdf(1 / np.sqrt(2 + spread**2))
        found, apart = estimate(list(one)), estimate_apart(list(one), list(other))
        held["one"] += found.low <= truth <= found.high
        held["apart"] += apart.low <= 0 <= apart.high
    assert (
        least <= held["one"] / 400 <= 0.995
    )  # trainings that differ much: 87 % of two, 91 % of three, 93 % of five, of 5,000 draws
    assert 0.93 <= held["apart"] / 400 <= 0.995


def test_a_p_value_is_that_of_students_test_and_below_5_percent_where_the_interval_ends() -> None:
    values = np.random.default_rng(1).normal(0.05, 0.3, 200)
    found = estimate([values])
    assert found.chance(0.0) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    assert found.chance(-0.02) == pytest.approx(scipy.stats.ttest_1samp(values, -0.02).pvalue)
    assert found.chance(found.value - found.half) == pytest.approx(0.05)


@pytest.mark.parametrize("value", [1.0, 1 / 3, 0.1, -0.7])
def test_what_is_always_the_same_may_still_differ_once_in_a_third_of_the_images(value: float) -> None:
    """Also where the mean of equal values is not quite any of them."""
    for trainings, images in itertools.product((1, 2, 3, 7), (10, 50, 301)):
        found = estimate([np.full(images, value)] * trainings, share=value > 0)
        assert (found.low, found.chance(0.0)) == (pytest.approx(value - 3 / images), 1.0)


def test_what_has_no_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="no spread over 1 images"):
        estimate([np.ones(1), np.zeros(1)])
    with pytest.raises(ValueError, match="a method that has one"):
        estimate_apart([np.ones(9), np.zeros(9)], [np.ones(9)])
