"""Numbers from rows, against scipy and against counting by hand."""

from typing import Any

import pyarrow as pa
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray.metrics import accuracies, wilson, worst_case

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(["at", "dmat"]),
            "set": st.sampled_from(["natural", "on_manifold"]),
            "attack": st.sampled_from(["clean", "PGD", "fog"]),
            "id": st.sampled_from([f"image-{i}" for i in range(6)]),
            "correct": st.booleans(),
        }
    ),
    min_size=1,
    max_size=80,
    unique_by=lambda row: (row["model"], row["set"], row["attack"], row["id"]),
)


@given(data=st.data(), count=st.integers(1, 5000))
def test_wilson_is_scipys(data: st.DataObject, count: int) -> None:
    correct = data.draw(st.integers(0, count))
    expected = scipy.stats.binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    found = wilson(correct, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert (found.value, found.count) == (correct / count, count)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (0, 200), (200, 200)])
def test_wilson_at_the_ends(correct: int, count: int) -> None:
    expected = scipy.stats.binomtest(correct, count).proportion_ci(method="wilson")
    assert (wilson(correct, count).low, wilson(correct, count).high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_no_examples_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no examples"):
        wilson(0, 0)


@given(rows=ROWS)
def test_accuracies_are_shares(rows: list[dict[str, Any]]) -> None:
    found = accuracies(pa.Table.from_pylist(rows))
    expected: dict[tuple[str, str, str], list[bool]] = {}
    for row in rows:
        expected.setdefault((row["model"], row["set"], row["attack"]), []).append(row["correct"])
    assert {key: (a.value, a.count) for key, a in found.items()} == {
        key: (sum(answers) / len(answers), len(answers)) for key, answers in expected.items()
    }


@given(rows=ROWS, attacks=st.lists(st.sampled_from(["clean", "PGD", "fog"]), min_size=1, unique=True))
def test_worst_case_is_what_stands_under_every_attack(rows: list[dict[str, Any]], attacks: list[str]) -> None:
    model, set_name = rows[0]["model"], rows[0]["set"]
    mine = [r for r in rows if (r["model"], r["set"]) == (model, set_name) and r["attack"] in attacks]
    ids = {r["id"] for r in mine}
    standing = [i for i in ids if all(r["correct"] for r in mine if r["id"] == i)]
    table = pa.Table.from_pylist(rows)
    if not ids:
        with pytest.raises(ValueError, match="no examples"):
            worst_case(table, model, set_name, attacks)
        return
    found = worst_case(table, model, set_name, attacks)
    assert (found.value, found.count) == (len(standing) / len(ids), len(ids))
