"""Suites: every one that ships is whole, includes and overrides work, and what is wrong is named."""

from pathlib import Path
from typing import Any

import pytest

from dmat_ray import cli, presets, suites
from dmat_ray.config import ON_MANIFOLD, Config, EvaluationConfig, JointThreat
from dmat_ray.errors import UserError
from dmat_ray.evaluation import units


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_that_ships_is_whole(name: str) -> None:
    config = suites.resolved(EvaluationConfig(suites=(name,)))
    assert len(config.attacks) > 1
    assert config.suites == ()
    planned = [row for names in units.rounds(config) for row in names]
    assert sorted(planned) == sorted(units.rows_to_run(config))
    parts = {part for summary in config.summaries for part in summary.of}
    groups = {units.group_of(row) for row in config.attacks}
    assert parts <= {row.name for row in config.attacks} | groups


def test_full_has_all_others() -> None:
    full = {row.name for row in suites.resolved(EvaluationConfig(suites=("full",))).attacks}
    for name in set(suites.names()) - {
        "full",
        "digits",
        "digits_full",
        "cifar10",
        "search",
        "digits_search",
        "cifar10_search",
        "search_std",
    }:  # small images, or for ranking
        assert {row.name for row in suites.resolved(EvaluationConfig(suites=(name,))).attacks} <= full, name


def rows_of(*names: str) -> list[Any]:
    """The attacks of these suites."""
    return [row for row in suites.resolved(EvaluationConfig(suites=names)).attacks if row.threat != "clean"]


def budget(row: Any) -> tuple[Any, ...]:
    """How far a row goes, in which units, and how it is searched."""
    return (row.threat, row.method, *(getattr(row, name, None) for name in ("norm", "eps", "scale", "latent_eps")))


OF_A_SET = [name for name in presets.names() if presets.load([name]).get("evaluation", {}).get("suites")]


@pytest.mark.parametrize("name", OF_A_SET)
def test_trials_are_judged_by_the_budgets_of_the_evaluation(name: str) -> None:
    """Of one data set: by those of another a search would find what is best against attacks of no interest there."""
    config = Config.model_validate(presets.load([name]))
    evaluated = {budget(row) for row in rows_of(*config.evaluation.suites)}
    judged = rows_of(*config.tune.suites)
    assert {"linf", "latent", "l2"} <= {row.name for row in judged}
    assert {row.name for row in judged if budget(row) not in evaluated} == set()
    found = suites.resolved(EvaluationConfig(suites=config.tune.suites))
    assert [summary.name for summary in found.summaries] == ["unseen", "worst"]


def test_presets_of_all_data_sets_are_looked_at() -> None:
    assert set(OF_A_SET) == {"demo", "cifar10", "mixed10", "mixed10_own"}


@pytest.mark.parametrize("name", [name for name in suites.names() if name.endswith("_std")])
def test_a_suite_in_deviations_differs_from_its_own_in_radii_of_w_only(name: str) -> None:
    found, published = ({row.name: row for row in rows_of(one)} for one in (name, name.removesuffix("_std")))
    assert list(found) == list(published)
    for key, row in found.items():
        was = published[key]
        if isinstance(row, ON_MANIFOLD):
            radius = "latent_eps" if isinstance(row, JointThreat) else "eps"
            assert (row.scale, getattr(row, radius)) == ("std", 0.1)  # type: ignore[attr-defined]
            assert (row.step_size or 0) / 0.1 == pytest.approx((was.step_size or 0) / 0.02)
            was = was.model_copy(update={"scale": "std", radius: 0.1, "step_size": row.step_size})
        assert row == was


def test_all_that_there_is_can_be_had_in_deviations() -> None:
    moves = [row for row in rows_of("full", "known_std", "adaptive_std") if isinstance(row, ON_MANIFOLD)]
    assert len(moves) == 6
    assert {row.scale for row in moves} == {"std"}  # type: ignore[attr-defined]


def test_rows_of_ones_own_win_over_a_suites(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "include: [known]\n"
        "attacks:\n  - {threat: fog, name: mist, eps: 0.1}\n  - {threat: image, name: FGSM, eps: 8/255, steps: 1}\n"
        "summaries:\n  - {name: all, of: [mist, FGSM]}\n"
    )
    (tmp_path / "settings.yaml").write_text("evaluation:\n  attacks: [{threat: image, name: PGD-50, eps: 0.3, steps: 7}]\n")
    preset, mine = str(tmp_path / "settings.yaml"), str(tmp_path / "mine.yaml")
    config, _ = cli.parse("", ["--preset", "demo", preset, "--evaluation.suites", f"{mine},unseen"])
    rows = {row.name: row for row in config.evaluation.attacks}
    assert (rows["PGD-50"].eps, rows["PGD-50"].steps) == (0.3, 7)
    assert rows["mist"].eps == 0.1
    assert rows["FGSM"].eps == pytest.approx(8 / 255)
    assert {"snow", "MIA-50"} <= rows.keys()
    assert [s.name for s in config.evaluation.summaries][:2] == ["worst of FGSM PGD MIA", "all"]
    assert list(rows)[:2] == ["PGD-50", "clean"]
    again = suites.resolved(config.evaluation)
    assert again == config.evaluation


def test_of_several_suites_the_last_wins(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "attacks: [{threat: image, name: FGSM, eps: 0.3, steps: 1}]\nsummaries: [{name: worst, of: [FGSM]}]\n"
    )
    mine = str(tmp_path / "mine.yaml")
    for order, eps in ((("digits_full", mine), 0.3), ((mine, "digits_full"), 0.1)):
        found = suites.resolved(EvaluationConfig(suites=order))
        assert next(row.eps for row in found.attacks if row.name == "FGSM") == eps
        assert (next(s.of for s in found.summaries if s.name == "worst") == ("FGSM",)) == (eps == 0.3)


def test_the_worst_case_is_over_every_attack() -> None:
    for name in ("digits_full", "cifar10"):
        found = suites.resolved(EvaluationConfig(suites=(name,)))
        worst = next(summary.of for summary in found.summaries if summary.name == "worst")
        assert set(worst) == {row.name for row in found.attacks} - {"clean"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("attacks: [{threat: rain, name: a}]", ["mine.yaml', attack 'a': ", "no threat 'rain'", "'fog'", "'snow'"]),
        ("attacks: [{threat: imgae, name: PGD}]", ["mine.yaml', attack 'PGD': ", "did you mean image?"]),
        ("attacks: [{threat: image, name: a, radius: 3}]", ["radius", "no such setting", "there are threat, norm, eps"]),
        ("attacks: [{threat: image, name: a, step: 3}]", ["no such setting as step; did you mean steps?"]),
        ("attacks: [{threat: image, name: a, eps: 8}]", ["attack 'a': eps is 8, but pixels are in [0, 1]; did you mean 8/255?"]),
        ("attacks: [{threat: latent, name: a, scale: std}]", ["attack 'a': eps 0.02 is a radius in raw W; give one"]),
        ("attacks: [{threat: autoattack, name: a, group: g, eps: 8}]", ["attack 'a': eps is 8, but pixels", "8/255?"]),
        ("attacks: [{threat: image, name: a, steps: 0}]", ["attack 'a': steps: must be 1 or more"]),
        ("attacks: [7]", ["attack 7: "]),
        ("summaries: [{name: s, on: [clean]}]", ["summary 's': of: is missing"]),
        ("summaries: [{name: s, of: [clean], hwo: worst}]", ["summary 's': there is no such setting as hwo; did you mean how?"]),
        ("rows: []", ["'rows'", "attacks, include, summaries"]),
        ("- a", ["list"]),
        ("include: [nothing]", ["'nothing' does not exist", "known", "unseen"]),
        ("attacks: [", ["not valid YAML"]),
        ("attacks: []\nattacks: []", ["mine.yaml', line 2: 'attacks' is there already, in line 1; give it once"]),
        ("attacks: [{threat: image, eps: 0.1,\n  name: a, eps: 0.2}]", ["mine.yaml', line 2: 'eps' is there already, in line 1"]),
        ("summaries: [{name: s, of: [ghost]}]", ["s names 'ghost'"]),
        ("include: known", ["include is 'known'", "[known]"]),
    ],
)
def test_what_is_wrong_with_a_suite_is_named(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        cli.parse("", ["--evaluation.suites", str(tmp_path / "mine.yaml")])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_suite_that_includes_itself_is_refused(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"include: [{other}.yaml]")
    with pytest.raises(UserError, match="includes itself"):
        suites.load(str(tmp_path / "a.yaml"))
