"""What is made of a search's trials: objectives, Pareto fronts, importances, tables."""

import io
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from tiny_search import COLUMNS, KNOBS, make_found, make_trials, write_page

from dmat_ray.config import Config, TuneConfig
from dmat_ray.config.tuning import parse_objective
from dmat_ray.errors import UserError
from dmat_ray.reports import search_result, trials, trials_charts, trials_table
from dmat_ray.reports.trials import Trial


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("worst", {"worst": 1.0}),
        ("0.3*clean + 0.7*unseen mean", {"clean": 0.3, "unseen mean": 0.7}),
        ("clean + 2 * PGD-20", {"clean": 1.0, "PGD-20": 2.0}),
        ("1e-1*PGD L2", {"PGD L2": 0.1}),
        ("4/255+8/255", {"4/255+8/255": 1.0}),  # a sum has spaces about its plus
    ],
)
def test_an_objective_is_a_column_or_a_weighted_sum(text: str, parts: dict[str, float]) -> None:
    assert parse_objective(text) == parts
    scores = {name: random.Random(name).random() for name in parts}
    assert trials.value(text, scores) == pytest.approx(np.dot(list(parts.values()), list(scores.values())))


@pytest.mark.parametrize("text", ["", "2*", "a*b", "clean + clean", "-1*clean", "0*clean", "0.5.*clean", "clean + "])
def test_no_objective_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="objective"):
        TuneConfig(objective=(text,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": ("clean", "worst"), "scheduler": "asha"}, "scheduler asha compares trials by one number"),
        ({"scheduler": "pbt", "searcher": "tpe"}, "searcher must be random"),
        ({"scheduler": "pbt", "searcher": "random", "num_samples": 1}, "population"),
        ({"epochs": 2, "grace_epochs": 3}, "grace_epochs 3 is more than epochs 2"),
        ({"objective": ("clean", "clean")}, "'clean' twice"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TuneConfig.model_validate(settings)


def test_an_objective_of_a_column_that_nobody_reports_is_refused() -> None:
    with pytest.raises(UserError, match=r"names 'unsee', which no trial reports; suite search has clean, worst"):
        trials.require_columns(["0.5*clean + 0.5*unsee"], ["clean", "worst"], ["search"])


@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
def test_of_a_front_both_ends_and_what_is_evenly_between(count: int) -> None:
    every = [Trial(f"t{k:02d}", "finished", {}, 1, 0, {"a": k / 20, "b": 1 - k / 20}) for k in range(count)]
    found = [trial.name for trial in trials.spread(every[::-1], 4, "a")]
    assert sorted(found) == {13: ["t00", "t04", "t08", "t12"], 5: ["t00", "t01", "t03", "t04"]}.get(
        count, [t.name for t in every]
    )


POINTS = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=12)


@given(POINTS, st.integers(1, 3))
def test_the_front_is_what_none_beats(points: list[list[int]], count: int) -> None:
    """By the definition: a point is beaten if another is as good in all and better in one."""
    names = "abc"[:count]
    every = [Trial(f"t{k:02d}", "finished", {}, 1, 0, dict(zip("abc", map(float, p), strict=True))) for k, p in enumerate(points)]
    found = trials.front(every, list(names))
    values = [tuple(p[:count]) for p in points]

    def beaten(point: tuple[int, ...]) -> bool:
        return any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in values)

    assert {tuple(int(t.scores[n]) for n in names) for t in found} == {p for p in values if not beaten(p)}
    assert len(found) == len({tuple(t.scores[n] for n in names) for t in found}), "each point once"


@pytest.mark.parametrize(
    ("budget", "gpu_hours", "minutes", "used_up"),
    [
        ({}, 1e9, 1e9, ""),
        ({"max_gpu_hours": 2}, 1.9, 1e9, ""),
        ({"max_gpu_hours": 2}, 2.1, 0.0, "tune.max_gpu_hours 2"),
        ({"max_wall_minutes": 30}, 1e9, 29.0, ""),
        ({"max_wall_minutes": 30}, 0.0, 31.0, "tune.max_wall_minutes 30"),
    ],
)
def test_a_budget_is_used_up_when_it_is(budget: dict[str, float], gpu_hours: float, minutes: float, used_up: str) -> None:
    assert TuneConfig.model_validate(budget).used_up(gpu_hours=gpu_hours, minutes=minutes) == used_up


def test_failed_and_diverged_trials_are_ranked_nowhere() -> None:
    every = make_trials()
    ranked = trials.ranked(every, ["worst"])
    assert len(ranked) == len(every) - 2
    assert [t.scores["worst"] for t in ranked] == sorted((t.scores["worst"] for t in ranked), reverse=True)
    assert not {every[1].name, every[2].name} & {t.name for t in ranked}


def test_importance_finds_the_knob_that_matters() -> None:
    """The worst case of these trials is linear in eps, and nothing else goes in."""
    shares = trials.importance(make_trials(40), "worst")
    assert next(iter(shares)) == "objective.image.eps"
    assert shares["objective.image.eps"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_importance_shares_what_two_knobs_do_in_equal_parts() -> None:
    """Of f = a + b with a and b uniform, each explains half of the variance."""
    draws = random.Random(0)
    every = []
    for number in range(200):
        a, b, c = (draws.random() for _ in range(3))
        every.append(Trial(f"t{number}", "finished", {"a": a, "b": b, "c": c}, 1, 0, {"f": a + b}))
    shares = trials.importance(every, "f")
    assert shares["a"] == pytest.approx(0.5, abs=0.1)
    assert shares["b"] == pytest.approx(0.5, abs=0.1)
    assert shares["c"] < 0.05


@pytest.mark.parametrize("count", [0, 3])
def test_importance_of_too_few_trials_is_not_told(count: int) -> None:
    assert trials.importance(make_trials()[3 : 3 + count], "worst") == {}


def test_importance_of_equal_values_is_not_told() -> None:
    every = [Trial(f"t{k}", "finished", {"a": float(k)}, 1, 0, {"worst": 0.5}) for k in range(9)]
    assert trials.importance(every, "worst") == {}


def test_trials_travel_as_json() -> None:
    for trial in make_trials():
        assert Trial.from_json(trial.to_json()) == trial


def test_a_searchs_result_is_read_as_it_was_written(tmp_path) -> None:
    assert search_result.read(tmp_path) is None
    search_result.write(tmp_path, make_found())
    assert search_result.read(tmp_path) == make_found()


def test_short_names_stay_different() -> None:
    names = ["objective.image.eps", "objective.latent.eps", "training.lr"]
    assert [trials_table.short(n, names) for n in names] == ["image.eps", "latent.eps", "lr"]


def test_the_terminals_table_has_all_trials_best_first() -> None:
    every = make_trials()
    text = trials_table.text(every, ["worst"], width=200)
    positions = [text.index(trial.name) for trial in trials.ranked(every, ["worst"])]
    assert positions == sorted(positions)
    assert all(trial.name in text for trial in every)
    assert all(trials_table.short(knob, every[0].knobs) in text for knob in KNOBS)
    best = trials.ranked(every, ["worst"])[0]
    (row,) = [line for line in text.splitlines() if best.name in line]
    assert f"{100 * best.scores['worst']:.1f}" in row


def test_the_live_table_draws_what_it_is_given_and_goes() -> None:
    """In a terminal of 80 columns, too, one can tell the trials."""
    console = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    with trials_table.LiveTable(["worst"], "tiny", console) as live:
        live.update(make_trials(40))
    text = console.export_text()
    assert "tiny" in text
    assert "20 more" in text
    assert len(set(re.findall(r"^│ (\d+) +│ (?:running|finished|stopped|diverged|failed) +│", text, re.MULTILINE))) == 20


def test_a_log_has_no_live_table(capsys: pytest.CaptureFixture[str]) -> None:
    with trials_table.LiveTable(["worst"], "tiny") as live:
        live.update(make_trials())
    assert capsys.readouterr().out == ""


def test_comparison_is_of_means_over_seeds() -> None:
    scores = {"b1": {"w": 0.6}, "b2": {"w": 0.8}, "s1": {"w": 0.7}, "s2": {"w": 0.5}}
    (row,) = search_result.comparison(scores, {"best": ["b1", "b2"], "start": ["s1", "s2"]})
    assert (row["best"], row["start"], row["difference"]) == pytest.approx((70.0, 60.0, 10.0))
    assert row["best_sd"] == pytest.approx(np.std([60, 80], ddof=1))
    assert (row["better"], row["seeds"]) == (1, 2)


def test_parallel_coordinates_stand_where_their_values_say() -> None:
    scale = trials_charts.Scale("eps", [0.1, 0.2, 0.4])
    assert [scale.share(v) for v in scale.values] == pytest.approx([0, 1 / 3, 1])
    assert trials_charts.Scale("kind", ["a", "b", "a", "c"]).marks() == [(0, "a"), (0.5, "b"), (1, "c")]
    assert all(0 <= share <= 1 for share, _ in scale.marks())
    same = trials_charts.Scale("steps", [3, 3])
    assert same.share(3) == pytest.approx(0.5)
    drawn = trials_charts.parallel("t", [scale, scale], [1.0, 0.5, 0.0], ["one", "<two>", "three"], 0)
    heights = [float(y) for y in re.findall(r'class="line s1" d="M[\d.]+ ([\d.]+)', drawn)]
    assert heights == [trials_charts.HIGH - trials_charts.BOTTOM]
    assert "&lt;two&gt;" in drawn


def test_page_shows_every_trial_and_escapes_what_it_shows(tmp_path, make_config) -> None:
    config: Config = make_config()
    text = write_page(tmp_path, config).read_text()
    found = make_found()
    assert all(trial.name in text for trial in found.trials)
    assert "tiny &lt;search&gt;" in text
    assert "its &lt;process&gt; has died" in text
    assert "tune.max_wall_minutes 5 was used up" in text
    assert "until epoch 2, as tiny_001" in text
    assert "<b>" not in text
    assert all(column.replace("<&>", "&lt;&amp;&gt;") in text for column in COLUMNS)
    assert text.count("<svg") >= 5
    assert "3 of 3" in text or "0 of 3" in text
