"""Numbers from rows, against scipy and against counting by hand."""

import tracemalloc
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dmat_ray.config import EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation import row_order
from dmat_ray.evaluation.intervals import paired, wilson
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import rows_to_run

IDS = [f"image-{i}" for i in range(6)]
SUITE = {
    "sets": ["natural"],
    "attacks": [
        {"threat": "clean", "name": "clean"},
        {"threat": "image", "name": "PGD", "eps": 0.1, "curve": [0.05, 0.2]},
        {"threat": "image", "name": "CE", "eps": 0.1, "group": "both"},
        {"threat": "image", "name": "DLR", "eps": 0.1, "group": "both"},
        {"threat": "fog", "name": "fog"},
    ],
    "summaries": [
        {"name": "worst", "how": "worst", "of": ["PGD", "both", "fog"]},
        {"name": "worst of alone", "how": "worst", "of": ["PGD", "fog"]},
        {"name": "mean", "how": "mean", "of": ["PGD", "fog"]},
        {"name": "UAR", "how": "uar", "of": ["PGD", "fog"], "trained": [0.5, 0.25]},
    ],
}
NAMES = ["clean", "PGD", "PGD @ 0.05", "PGD @ 0.2", "CE", "DLR", "fog"]


def table(answers: dict[str, dict[str, bool]], model: str = "at", source: str | None = None) -> pa.Table:
    """attack -> id -> right, as rows."""
    rows = [
        {"model": model, "source": source or model, "set": "natural", "attack": name, "id": id, "correct": right, "label": 0}
        | {"prediction": 0 if right else 1}
        for name, found in answers.items()
        for id, right in found.items()
    ]
    return pa.Table.from_pylist(rows)


ANSWERS = st.fixed_dictionaries({name: st.fixed_dictionaries({id: st.booleans() for id in IDS}) for name in NAMES})


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


NAMED = st.sampled_from(["at", "ä", "\U0001f600", "\uffff"])
ROWS = st.lists(
    st.fixed_dictionaries(dict.fromkeys(("model", "source", "set", "attack"), NAMED) | {"id": st.text(max_size=2)}), max_size=60
)


@given(rows=ROWS, cut=st.integers(0, 30))
def test_rows_are_found_and_sorted_as_pyarrow_does(rows: list[dict[str, Any]], cut: int) -> None:
    """In pieces that have texts of their own, too; rows that are alike stay in the order that they came in."""
    columns = ["model", "source", "set", "attack", "id"]
    numbers = [("label", pa.int64()), ("prediction", pa.int64()), ("correct", pa.bool_())]
    kind = pa.schema([*((name, pa.string()) for name in columns), *numbers])
    rows = [row | {"label": k % 3, "prediction": k, "correct": k % 3 == 0} for k, row in enumerate(rows)]
    whole = pa.concat_tables([pa.Table.from_pylist(part, kind) for part in (rows[:cut], [], rows[cut:])])
    expected = whole.sort_by([(name, "ascending") for name in columns])
    with mock.patch.object(row_order, "PART", 7):
        assert row_order.in_order(whole).to_pylist() == expected.to_pylist()
    results = Results(whole, EvaluationConfig(sets=("natural",)))
    for model, source, set_name, attack in {tuple(row[name] for name in columns[:4]) for row in rows}:
        mine = [row for row in expected.to_pylist() if [row[n] for n in columns[:4]] == [model, source, set_name, attack]]
        assert results.transferred(source, model, set_name, attack).tolist() == [row["correct"] for row in mine]
        if model == source:
            ids, right = results.met(model, set_name, attack)
            assert list(zip(ids, right, strict=True)) == [(row["id"], row["correct"]) for row in mine]
            counts = results.confusion(model, set_name, attack)
            assert all(counts[row["label"], row["prediction"]] == 1 for row in mine)
            assert counts.sum() == len(mine)
    assert results.transferred("nobody", "at", "natural", "PGD").tolist() == []
    assert results.confusion("nobody", "natural", "PGD", 3).sum() == 0


def test_many_small_tables_become_few_pieces() -> None:
    parts = [pa.table({"id": [f"{k}"]}) for k in range(2500)]
    whole = pa.concat_tables(row_order.pieces(iter(parts)))
    assert whole.equals(pa.concat_tables(parts))
    assert whole["id"].num_chunks == 3


def test_a_row_takes_few_bytes() -> None:
    """Beside the table itself: an evaluation has millions, and no text of theirs is wanted."""
    count, names = 20_000, ["clean", "PGD", "PGD @ 0.05", "PGD @ 0.2", "fog"]
    ids, zeros = pa.array([f"image-{k:08d}" for k in range(count)]), pa.array([0] * count)

    def of(name: str) -> pa.Table:
        texts = {
            key: pa.repeat(text, count) for key, text in (("model", "at"), ("source", "at"), ("set", "natural"), ("attack", name))
        }
        return pa.table({**texts, "id": ids, "label": zeros, "prediction": zeros, "correct": pa.repeat(True, count)})

    attacks = [row for row in SUITE["attacks"] if "group" not in row]
    results = Results(
        pa.concat_tables(map(of, names)), EvaluationConfig.model_validate({"sets": ["natural"], "attacks": attacks})
    )
    tracemalloc.start()
    found = results.accuracies()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {accuracy.value for accuracy in found.values()} == {1.0}
    assert most < 80 * results.rows.num_rows


@given(answers=ANSWERS)
def test_columns_are_what_counting_gives(answers: dict[str, dict[str, bool]]) -> None:
    # a row of the group meets what is right on the clean image and under the one before
    answers["CE"] = {id: right for id, right in answers["CE"].items() if answers["clean"][id]}
    answers["DLR"] = {id: right for id, right in answers["DLR"].items() if answers["CE"].get(id)}
    results = Results(table({name: found for name, found in answers.items() if found}), EvaluationConfig.model_validate(SUITE))
    assert results.columns("natural") == ["clean", "PGD", "both", "fog", "worst", "worst of alone", "mean", "UAR"]
    share = {name: sum(answers[name].values()) / 6 for name in ("clean", "PGD", "fog", "PGD @ 0.05", "PGD @ 0.2")}
    both = sum(answers["DLR"].values())
    worst = sum(answers["DLR"].get(id, False) and answers["PGD"][id] and answers["fog"][id] for id in IDS)
    expected = {name: share[name] for name in ("clean", "PGD", "fog")} | {"both": both / 6, "worst": worst / 6}
    expected["worst of alone"] = sum(all(answers[name][id] for name in ("clean", "PGD", "fog")) for id in IDS) / 6
    expected |= {"mean": (share["PGD"] + share["fog"]) / 2, "UAR": (share["PGD"] + share["fog"]) / 0.75}
    found = {column: accuracy for (_, _, column), accuracy in results.accuracies().items()}
    assert {name: accuracy.value for name, accuracy in found.items()} == pytest.approx(expected)
    assert {accuracy.count for accuracy in found.values()} == {6}
    for column in ("clean", "PGD", "both", "fog", "worst", "worst of alone", "mean"):
        assert results.per_example("at", "natural", column).mean() == pytest.approx(expected[column]), column
    each = [(answers["PGD"][id] + answers["fog"][id]) / 2 for id in sorted(IDS)]
    assert results.per_example("at", "natural", "mean").tolist() == each
    with pytest.raises(ValueError, match="'UAR' is a ratio"):
        results.per_example("at", "natural", "UAR")
    for part in ("CE", "DLR"):
        for of_all in (results.accuracy, results.per_example, results.correct):
            with pytest.raises(UserError, match=f"'{part}' met only what .*; ask for the group 'both'"):
                of_all("at", "natural", part)
    assert results.curves("natural") == {"PGD": [0.05, 0.1, 0.2]}
    at = [results.at_eps("at", "natural", "PGD", eps).value for eps in (0.05, 0.1, 0.2)]
    assert at == pytest.approx([share["PGD @ 0.05"], share["PGD"], share["PGD @ 0.2"]])


def test_a_group_counts_on_natural_images_by_its_rows_that_need_no_w() -> None:
    rows = [{"threat": "latent", "name": "OM", "group": "both"}, {"threat": "image", "name": "PGD", "group": "both"}]
    config = EvaluationConfig.model_validate(
        {"sets": ["natural"], "attacks": [{"threat": "clean"}, *rows], "summaries": [{"name": "worst", "of": ["both"]}]}
    )
    results = Results(table({"clean": dict.fromkeys(IDS, True), "PGD": {id: i < 2 for i, id in enumerate(IDS)}}), config)
    assert results.columns("natural") == ["clean", "both", "worst"]
    assert results.accuracy("at", "natural", "worst").value == results.accuracy("at", "natural", "both").value == 2 / 6


def test_a_curve_has_the_rows_own_eps_once() -> None:
    rows = rows_to_run(
        EvaluationConfig.model_validate({"attacks": [{"threat": "image", "name": "PGD", "eps": 0.1, "curve": [0.1, 0.2]}]})
    )
    assert list(rows) == ["clean", "PGD", "PGD @ 0.2"]


def test_transfer_is_told_apart_from_the_models_own() -> None:
    right = {"clean": dict.fromkeys(IDS, True)}
    own = table({**right, "PGD": {id: i < 1 for i, id in enumerate(IDS)}})
    other = table({**right, "PGD": {id: i < 4 for i, id in enumerate(IDS)}}, "dmat")
    suite = EvaluationConfig.model_validate(
        {"sets": ["natural"], "attacks": [{"threat": "clean"}, {"threat": "image", "name": "PGD"}], "transfer": ["PGD"]}
    )
    crossed = [
        table({"PGD": {id: i < 5 for i, id in enumerate(IDS)}}, "at", "dmat"),
        table({"PGD": {id: i < 2 for i, id in enumerate(IDS)}}, "dmat", "at"),
    ]
    results = Results(pa.concat_tables([own, other, *crossed]), suite)
    counts = {pair: round(6 * accuracy.value) for pair, accuracy in results.transfer("natural", "PGD").items()}
    assert counts == {("at", "at"): 1, ("dmat", "dmat"): 4, ("dmat", "at"): 5, ("at", "dmat"): 2}
    assert results.accuracy("at", "natural", "PGD").value == pytest.approx(1 / 6)


def test_confusion_counts_labels_and_predictions() -> None:
    results = Results(table({"clean": {id: i < 4 for i, id in enumerate(IDS)}}), EvaluationConfig(sets=("natural",)))
    assert np.array_equal(results.confusion("at", "natural", "clean", 3), [[4, 2, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"summaries": [{"name": "worst", "of": ["PGD", "rain"]}]}, ["worst", "'rain'", "PGD", "both"]),
        ({"summaries": [{"name": "PGD", "of": ["fog"]}]}, ["unique", "PGD"]),
        ({"summaries": [{"name": "UAR", "how": "uar", "of": ["fog"]}]}, ["trained", "1 row"]),
        ({"transfer": ["both"]}, ["transfer", "'both'"]),
        ({"transfer": ["CE"]}, ["transfer names 'CE'", "none of clean, PGD, fog"]),
        ({"attacks": [{"threat": "image", "name": "a", "group": "g", "curve": [0.1]}]}, ["group", "curve"]),
        ({"attacks": [{"threat": "image", "name": "a @ 0.1"}]}, ["'a @ 0.1'", "another eps"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        EvaluationConfig.model_validate({**SUITE, **changes})
    assert all(word in str(error.value) for word in words)


def of_counts(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of two models: so many that both, only the first, only the second and neither have right."""
    one = np.repeat([True, True, False, False], [both, first, second, neither])
    other = np.repeat([True, False, True, False], [both, first, second, neither])
    return one, other


def test_paired_shares_are_as_published() -> None:
    """The example of ci.prop.ps in statpsych, by an author of the interval: f00, f01, f10, f11 = 12, 4, 26, 6."""
    found = paired(*of_counts(6, 4, 26, 12))
    assert (found.low, found.high) == pytest.approx((-0.6251933, -0.2548067), abs=1e-6)
    assert (found.value, found.count) == (pytest.approx(-22 / 48), 48)


@given(counts=st.tuples(*(st.integers(0, 400) for _ in range(4))).filter(any))
def test_a_difference_is_mcnemars(counts: tuple[int, int, int, int]) -> None:
    one, other = of_counts(*counts)
    found, back = paired(one, other), paired(other, one)
    different = counts[1] + counts[2]
    exact = scipy.stats.binomtest(counts[1], different).pvalue if different else 1.0
    assert found.chance == pytest.approx(exact, rel=1e-6)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert -1 <= found.low <= found.high <= 1
    assert found.low < 0 < found.high or different


def test_intervals_of_differences_hold_what_they_promise() -> None:
    """Of shares and of means over attacks, by simulation: 95 % of them, or a little more."""
    rng = np.random.default_rng(0)

    def share(limit: float) -> float:
        return float(scipy.integrate.quad(lambda u: scipy.stats.norm.cdf((limit - u) / 0.3), 0, 1)[0])

    truth = share(0.6) - share(0.5)
    for columns in (1, 4):
        held = 0
        for _ in range(2000):
            easy = rng.random((60, 1))
            one, other = (easy + rng.normal(0, 0.3, (60, columns)) < limit for limit in (0.6, 0.5))
            found = paired(one.mean(axis=1), other.mean(axis=1))
            held += found.low <= truth <= found.high
        assert 0.93 <= held / 2000 <= 0.99, columns


@given(first=ANSWERS, second=ANSWERS)
def test_models_are_compared_image_by_image(first: Any, second: Any) -> None:
    rows = pa.concat_tables([table(first, "at"), table(dict(reversed(list(second.items()))), "dmat")])
    results = Results(rows, EvaluationConfig.model_validate(SUITE))
    for column in ("clean", "PGD", "both", "worst", "mean"):
        found = results.difference("dmat", "at", "natural", column)
        cells = [results.accuracy(model, "natural", column).value for model in ("dmat", "at")]
        assert found.value == pytest.approx(cells[0] - cells[1])
    with pytest.raises(UserError, match="there is no model 'dmt' in these results; did you mean dmat"):
        results.difference("dmt", "at", "natural", "clean")
    with pytest.raises(ValueError, match="'UAR' is a ratio of means"):
        results.difference("dmat", "at", "natural", "UAR")
    one = pc.and_(pc.equal(rows["model"], "at"), pc.equal(rows["id"], IDS[0]))
    few = results.rows.filter(pc.invert(one))
    with pytest.raises(UserError, match="different images"):
        Results(few, results.config).difference("dmat", "at", "natural", "clean")


@given(rows=st.lists(ANSWERS, min_size=5, max_size=5))
def test_means_over_trainings_are_of_the_models_that_are_named(rows: Any) -> None:
    names = ["dmat-0", "dmat-1", "at-0", "at-1", "at-2"]
    results = Results(pa.concat_tables(map(table, rows, names)), EvaluationConfig.model_validate(SUITE))
    for column in ("clean", "both", "worst", "mean"):
        cells = {name: results.accuracy(name, "natural", column).value for name in names}
        found = results.over_trainings(names[2:], "natural", column)
        assert (found.value, found.trainings) == (pytest.approx(np.mean([cells[name] for name in names[2:]])), 3)
        paired = results.difference_over_trainings(names[:2], names[2:4], "natural", column)
        moved = [results.difference(a, b, "natural", column).value for a, b in zip(names[:2], names[2:4], strict=True)]
        assert (paired.value, paired.trainings, paired.others) == (pytest.approx(np.mean(moved)), 2, None)
        apart = results.difference_over_trainings(names[:2], names[2:], "natural", column, paired=False)
        expected = np.mean([cells[name] for name in names[:2]]) - found.value
        assert (apart.value, apart.trainings, apart.others) == (pytest.approx(expected), 2, 3)


def test_trainings_that_cannot_be_compared_are_named() -> None:
    names = ["dmat-0", "dmat-1", "at-0", "at-1", "at-2"]
    answers = {name: dict.fromkeys(IDS, True) for name in NAMES}
    results = Results(pa.concat_tables([table(answers, name) for name in names]), EvaluationConfig.model_validate(SUITE))
    dmat, at = names[:2], names[2:]
    of_pairs, mean = results.difference_over_trainings, results.over_trainings
    for refused, words in (
        (lambda: of_pairs(dmat, at, "natural", "clean"), "2 and 3 trainings are no pairs"),
        (lambda: of_pairs(dmat[:1], at, "natural", "clean", paired=False), "two or more of each method"),
        (lambda: mean("dmat-0", "natural", "clean"), "'dmat-0' is one name; give the trainings of a method as a list"),
        (lambda: mean([], "natural", "clean"), "nothing is no list of trainings"),
        (lambda: mean(["at-0", "at-0"], "natural", "clean"), "at-0, at-0 is no list of trainings, each of them once"),
        (lambda: mean(["at-0", "at-9"], "natural", "clean"), "there is no model 'at-9'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            refused()
    few = results.rows.filter(pc.invert(pc.and_(pc.equal(results.rows["model"], "at-1"), pc.equal(results.rows["id"], IDS[0]))))
    with pytest.raises(UserError, match="'at-0' and 'at-1' were evaluated on different images"):
        Results(few, results.config).over_trainings(at, "natural", "clean")
