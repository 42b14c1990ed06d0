"""How long the rest of a stage is said to take."""

import pytest

from dmat_ray.cluster.forecast import Forecast


def test_the_rest_takes_as_long_as_what_was_done_by_cost_without_the_start():
    """Actors take 40 s to start; then a unit of cost c takes c / 10 seconds."""
    costs, now, said = [1.0, 100.0, 100.0, 200.0, 600.0, 1000.0], 40.0, []
    forecast = Forecast(sum(costs), 1)
    for cost in costs:
        now += cost / 10
        forecast.done(cost, now)
        said.append(forecast.to_go(now))
    assert said[:2] == ["", ", about 3 minutes to go"]
    assert said[-1] == ""
    left = [sum(costs[i + 1 :]) / 10 for i in range(len(costs))]
    told = [float(text.split()[1]) * (60 if "minutes" in text else 1) for text in (t.removeprefix(", ") for t in said) if text]
    assert told == pytest.approx(left[1:-1], abs=30)


def test_nothing_is_said_while_next_to_nothing_is_done():
    forecast = Forecast(1000.0, 1)
    forecast.done(1.0, 100.0)
    forecast.done(1.0, 100.2)
    assert forecast.to_go(100.2) == ""
    forecast.done(60.0, 106.4)
    assert forecast.to_go(106.4) == ", about 2 minutes to go", "938 at 61 in 6.4 s"


def test_the_first_of_every_actor_does_not_count():
    """Eight actors that start within 8 s and take 60 s for each of 100 units: 12 or 13 rounds."""
    ends = sorted(start + 60.0 * (turn + 1) for start in range(8) for turn in range(13))[:100]
    forecast = Forecast(100.0, 8)
    for number, now in enumerate(ends, 1):
        forecast.done(1.0, now)
        if told := forecast.to_go(now):
            left = ends[-1] - now
            said = float(told.split()[2]) * (60 if "minutes" in told else 1)
            assert 0.7 * left - 60 <= said <= 1.6 * left + 60, "they end in waves"
        assert bool(told) == (number >= 13 and number < 100)
