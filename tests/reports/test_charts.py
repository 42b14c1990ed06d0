"""Charts: round ticks, values where they belong, a front that is one, and names that stay text."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray.reports import charts
from dmat_ray.reports.charts import HEIGHT, WIDTH, Axis, Series

NUMBERS = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6)
PLACES = st.tuples(st.floats(0, 100), st.floats(0, 100))


def paths(svg: str, kind: str) -> list[ET.Element]:
    return [p for p in ET.fromstring(svg).iter("path") if kind in p.attrib["class"].split()]


def places(svg: str) -> list[tuple[float, float]]:
    """Where the marks stand."""
    found = [re.findall(r"-?[\d.]+", mark.attrib["transform"]) for mark in paths(svg, "mark")]
    return [(float(x), float(y)) for x, y in found]


@given(low=NUMBERS, width=st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = charts.ticks(low, low + width)
    assert 2 <= len(found) <= 6
    slack = 1e-6 * max(abs(low), width)
    assert low - slack <= found[0] <= found[-1] <= low + width + slack
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-5, abs=1e-9)
    assert min(abs(steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9) - f) for f in (1, 2, 2.5, 5, 10)) < 1e-3


@given(y=st.lists(NUMBERS, min_size=2, max_size=8))
def test_marks_of_a_line_are_inside_and_in_order_of_their_values(y: list[float]) -> None:
    found = places(charts.lines("t", Axis("x"), Axis("y"), [Series("a", 0, range(len(y)), y)]))
    assert len(found) == len(y)
    assert all(0 < px < WIDTH and 0 < py < HEIGHT for px, py in found)
    assert [px for px, _ in found] == sorted({px for px, _ in found})
    for (_, above), (_, below), a, b in zip(found, found[1:], y, y[1:], strict=False):
        assert a == b or above == pytest.approx(below, abs=0.11) or (above < below) == (a > b)


def test_a_scale_is_linear() -> None:
    svg = charts.lines("t", Axis("x", (0, 4)), Axis("y", (0, 100)), [Series("a", 0, (0, 1, 4), (0, 25, 100))])
    (x0, y0), (x1, y1), (x2, y2) = places(svg)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.25, abs=1e-3)


def test_counts_have_no_ticks_between_and_long_labels_an_end() -> None:
    svg = charts.lines("t", Axis("step", whole=True), Axis("accuracy " * 20), [Series("a", 0, (0, 1, 2), (0.1, 0.2, 0.3))])
    texts = [str(t.text) for t in ET.fromstring(svg).iter("text")]
    assert {"0", "1", "2"} <= set(texts)
    assert not {"0.5", "1.5"} & set(texts)
    assert max(map(len, texts)) < 45


def test_values_that_are_not_finite_are_left_out_and_constant_ones_drawn() -> None:
    series = [Series("a", 0, (0, 1, 2), (1.0, math.nan, math.inf)), Series("b", 1, (0, 1), (1.0, 1.0)), Series("c", 2, (), ())]
    svg = charts.lines("t", Axis("x"), Axis("y"), series)
    assert len(places(svg)) == 3
    assert "nan" not in svg
    assert "inf" not in svg
    assert "nan" not in charts.lines("t", Axis("x"), Axis("y"), [Series("a", 0, (), ())])


def test_names_stay_text() -> None:
    name = "<b>&\"'</b>"
    for svg in (
        charts.lines(name, Axis(name), Axis(name), [Series(name, 0, (0, 1), (0, 1))], name),
        charts.points(name, Axis(name), Axis(name), [Series(name, 0, (5,), (5,), (1,), (9,))], [(1, 9)]),
    ):
        root = ET.fromstring(svg)
        assert root.attrib["aria-label"] == name
        assert [t.text for t in root.iter("text")].count(name) >= 2
        assert all(name in str(title.text) for title in root.iter("title"))


@given(where=st.lists(PLACES, min_size=1, max_size=12, unique=True))
def test_the_front_joins_what_none_beats(where: list[tuple[float, float]]) -> None:
    series = [Series(f"model {k}", k, (x,), (y,), (y,), (y,)) for k, (x, y) in enumerate(where)]
    svg = charts.points("t", Axis("x"), Axis("y"), series, [(x, x) for x, _ in where])
    beaten = [any(c >= a and d >= b and (c, d) != (a, b) for c, d in where) for a, b in where]
    front = sorted(place for place, out in zip(places(svg), beaten, strict=True) if not out)
    drawn = paths(svg, "front")
    assert len(drawn) == (len(front) > 1)
    for path in drawn:
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
        assert sorted(zip(numbers[::2], numbers[1::2], strict=True)) == front


@given(where=st.lists(PLACES, min_size=1, max_size=12, unique=True))
def test_labels_cover_no_mark_and_no_other_label(where: list[tuple[float, float]]) -> None:
    series = [Series(f"model {k}", k, (x,), (y,), (y,), (y,)) for k, (x, y) in enumerate(where)]
    svg = charts.points("t", Axis("x"), Axis("y"), series, [(x, x) for x, _ in where])
    labels = [t for t in ET.fromstring(svg).iter("text") if t.attrib.get("class") == "label"]
    boxes = [(float(t.attrib["x"]), float(t.attrib["y"]), charts.CHARACTER * len(str(t.text))) for t in labels]
    assert len(boxes) >= 1 or len(where) > 1
    for k, (x, y, width) in enumerate(boxes):
        assert not any(x < px < x + width and y - 10 < py < y for px, py in places(svg))
        assert not any(x < a + w and a < x + width and y - 10 < b and b - 10 < y for a, b, w in boxes[k + 1 :])


def test_models_look_different() -> None:
    looks = [charts.swatch(k) for k in range(36)]
    assert len({(re.search(r" s(\d)", s).group(1), re.search(r'm.*? d="([^"]*)">?</path>', s).group(1)) for s in looks}) == 36  # type: ignore[union-attr]
