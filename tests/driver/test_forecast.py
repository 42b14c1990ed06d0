"""How far a stage is said to be, and how long its rest to take."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from dmat_ray.cluster import evaluate, forecast, gauges, predict, project, silence
from dmat_ray.cluster.forecast import Forecast
from dmat_ray.config import ClusterConfig
from dmat_ray.evaluation.units import Unit
from dmat_ray.models import prediction


def test_the_rest_takes_as_long_as_what_was_done_by_cost_without_the_start():
    """Actors take 40 s to start; then a unit of cost c takes c / 10 seconds."""
    costs, now, said = [1.0, 100.0, 100.0, 200.0, 600.0, 1000.0], 40.0, []
    rest = Forecast(sum(costs), 1)
    for cost in costs:
        now += cost / 10
        rest.done(cost, now)
        said.append(rest.to_go(now))
    assert said[:2] == ["", ", about 3 minutes to go"]
    assert said[-1] == ""
    left = [sum(costs[i + 1 :]) / 10 for i in range(len(costs))]
    told = [float(text.split()[1]) * (60 if "minutes" in text else 1) for text in (t.removeprefix(", ") for t in said) if text]
    assert told == pytest.approx(left[1:-1], abs=30)


def test_nothing_is_said_while_next_to_nothing_is_done():
    rest = Forecast(1000.0, 1)
    rest.done(1.0, 100.0)
    rest.done(1.0, 100.2)
    assert rest.to_go(100.2) == ""
    rest.done(60.0, 106.4)
    assert rest.to_go(106.4) == ", about 2 minutes to go", "938 at 61 in 6.4 s"


def test_the_first_of_every_actor_does_not_count():
    """Eight actors that start within 8 s and take 60 s for each of 100 units: 12 or 13 rounds."""
    ends = sorted(start + 60.0 * (turn + 1) for start in range(8) for turn in range(13))[:100]
    rest = Forecast(100.0, 8)
    for number, now in enumerate(ends, 1):
        rest.done(1.0, now)
        if told := rest.to_go(now):
            left = ends[-1] - now
            said = float(told.split()[2]) * (60 if "minutes" in told else 1)
            assert 0.7 * left - 60 <= said <= 1.6 * left + 60, "they end in waves"
        assert bool(told) == (number >= 13 and number < 100)


class Clock:
    """In place of `time`: it goes only as it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def after(self, each_s: float, pieces: Iterable[Any]) -> Iterator[Any]:
        """The pieces, one every so many seconds."""
        for piece in pieces:
            self.now += each_s
            yield piece


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """For lines about a stage, without Ray's counters."""
    found = Clock()
    monkeypatch.setattr(forecast, "time", found)
    monkeypatch.setattr(forecast, "breaking_silence", lambda piece, say: contextlib.nullcontext(lambda: None))
    for name in ("projected", "evaluated"):
        monkeypatch.setattr(gauges, name, lambda *_: None)
    monkeypatch.setattr(evaluate.session, "await_machines", lambda *_: None)
    return found


def projected(clock: Clock, say: Callable[[str], None]) -> None:
    todo = [SimpleNamespace(rows=pa.table({"id": range(10)})) for _ in range(40)]
    summaries = clock.after(4.0, ({"rows": 9, "rejected": 1} for _ in todo))
    assert len(list(project._progress(summaries, todo, 1, say))) == 40


def evaluated(clock: Clock, say: Callable[[str], None]) -> None:
    todo = [Unit("dmat", "natural", "PGD", (k,)) for k in range(40)]
    config = SimpleNamespace(cluster=ClusterConfig(evaluation_actors=1))
    work = SimpleNamespace(config=config, cost=lambda unit: 10.0, run=lambda left: clock.after(4.0, left))
    evaluate._run_all(work, todo, "round 1 of 2: ", say)


def of_images(begin: int) -> pa.Table:
    rows = {"path": [f"{begin + i:03d}.png" for i in range(10)], "reason": [None] * 9 + ["broken"]}
    return pa.table({field.name: rows.get(field.name, pa.nulls(10, field.type)) for field in prediction.SCHEMA})


def predicted(clock: Clock, say: Callable[[str], None]) -> None:
    tables = [of_images(begin) for begin in range(0, 400, 10)]
    dataset = SimpleNamespace(iter_batches=lambda **_: clock.after(4.0, reversed(tables)))
    listing = pa.table({"id": [f"{i:03d}.png" for i in range(400)]})
    found = predict._collected(dataset, listing, 1, lambda line: None if line.startswith("unreadable") else say(line))
    assert found["path"].to_pylist() == listing["id"].to_pylist()


@pytest.mark.parametrize(
    ("stage", "early", "middle", "last"),
    [
        (
            projected,
            "projected 20/400 images, 2 rejected",
            "projected 200/400 images, 20 rejected, 2.5 images/s, about 80 s to go",
            "projected 400/400 images, 40 rejected, 3 minutes",
        ),
        (
            evaluated,
            "round 1 of 2: 2/40 batches, 8 s; last PGD on dmat",
            "round 1 of 2: 20/40 batches, 80 s, about 80 s to go; last PGD on dmat",
            "round 1 of 2: 40/40 batches, 160 s; last PGD on dmat",
        ),
        (
            predicted,
            "predicted 18 of 400 images, 2 could not be read, 8 s",
            "predicted 180 of 400 images, 20 could not be read, 80 s, about 80 s to go",
            "predicted 360 of 400 images, 40 could not be read, 160 s",
        ),
    ],
)
def test_stages_say_how_far_they_are_every_five_seconds(clock, stage, early, middle, last):
    lines: list[str] = []
    stage(clock, lines.append)
    told = [line for line in lines if not line.endswith("batches for 1 actors")]
    assert len(told) == 20, "every other piece, of 4 s each"
    assert (told[0], told[9], told[-1]) == (early, middle, last)


def test_a_prediction_that_waits_says_so(monkeypatch):
    monkeypatch.setattr(silence, "FIRST_S", 0.2)
    monkeypatch.setattr(silence, "_cluster", lambda: "; Ray counts none")
    lines: list[str] = []

    def slow(**_: Any) -> Iterator[pa.Table]:
        time.sleep(0.7)
        yield of_images(0)

    listing = pa.table({"id": [f"{i:03d}.png" for i in range(10)]})
    predict._collected(SimpleNamespace(iter_batches=slow), listing, 1, lines.append)
    assert lines[0].startswith("no batch was finished in the last ")
