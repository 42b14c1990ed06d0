"""What the published pages and README say of the studies, against the studies' rows."""

import shutil
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from dmat_ray.errors import UserError
from dmat_ray.evaluation.intervals import estimate
from dmat_ray.evaluation.metrics import Results

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study_claims  # noqa: E402
import study_report  # noqa: E402
import study_rows  # noqa: E402
import study_tables  # noqa: E402

pytestmark = pytest.mark.slow

PUBLISHED = sorted(rows.parent.name for rows in (ROOT / "benchmarks" / "results").glob("*/rows"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_results_are_what_their_rows_say(name: str) -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / name)
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert page == "\n".join(study_report.page(study)) + "\n"


def test_the_package_gives_what_the_study_prints() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.split(study_report.BEGIN)[1].split("\n\n")[1].splitlines()]
    assert head[:3] == ["method", "models", "clean"]
    assert len(rows) > 8
    for method, models, _, *cells in rows:
        names = [f"{method}-{seed}" for seed in range(int(models))]
        found = [str(study.results.over_trainings(names, "on_manifold", column)) for column in head[3:]]
        assert found == [cell.strip("*") for cell in cells]
    trained = [[f"{method}-{seed}" for seed in range(3)] for method in ("dmat", "at")]
    less = study.results.difference_over_trainings(*trained, "on_manifold", "OM-PGD-50")
    (row,) = [line for line in study_report.verdicts(study, "on_manifold") if "not robust on the manifold" in line]
    assert f"| {less.value * 100:+.1f} ± {less.half * 100:.1f} | 3 |" in row


def test_what_the_readme_says_of_the_study_in_colour_is_what_the_rows_say() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "cifar5")
    (row,) = [line for line in study_tables.worst_cases(study) if line.startswith("| dmat_fog_recolor_stadv |")]
    _, _, _, _, projected, _, _, natural, than_at, *_ = (cell.strip() for cell in row.split("|"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    notes = " ".join((study.folder / "notes.md").read_text(encoding="utf-8").split())
    assert natural.startswith("**+"), "what differs among all is bold"
    assert not projected.startswith("**")
    assert not than_at.startswith("**")
    fixed = yaml.safe_load((ROOT / "benchmarks" / "studies" / "cifar5_claims.yaml").read_text())["claims"]
    table = study_tables.again(study, study_rows.Study(study.folder / "again"), fixed)[2:]
    rows = [[cell.strip().lstrip("+") for cell in line.strip("| ").split(" | ")] for line in table]
    (clean, clean_too), (projected, projected_too), (latent, latent_too), (dmat, dmat_too), (at, at_too) = (r[2:4] for r in rows)
    assert [row[4] for row in rows] == ["5"] * 5
    assert [(row[5], row[6]) for row in rows[3:]] == [("**confirmed**", "< 0.001")] * 2
    assert {row[5] for row in rows[:3]} == {"open"}
    assert (
        f"by {dmat_too} points than DMAT's and by {at_too} than AT's (p < 0.001 each, all five claims together; in the first "
        f"study {dmat} and {at})" in text
    )
    assert f"On clean natural images {clean} points in the first study, after correction, and {clean_too} in the second" in text
    assert f"on the manifold {latent} and {latent_too} points of robustness" in text
    assert f"by {dmat_too} and {at_too} points on natural images, p < 0.001 each" in notes
    gained = f"{clean_too} points on clean natural images, {projected_too} on clean projections and {latent_too} on the manifold"
    assert gained in notes
    for first, second in ((clean, clean_too), (projected, projected_too), (latent, latent_too)):
        (value, half), (before, _) = ([float(part) for part in one.split(" ± ")] for one in (second, first))
        assert value - half < 0 < before < value + half, "each interval holds both nothing and what the first study had"
        assert 0.35 < value / before < 0.6, "about half"
    wide = study.difference(study_claims.Claim("", "dmat_trades_wide", "at", "clean"), "natural")
    assert f"(`dmat_trades_wide`) has {wide} points more on clean natural images than AT" in notes
    told = {s: [line for line in study_tables.verdicts(study, s) if "DMAT" in line] for s in ("natural", "on_manifold")}
    assert [line.count("**confirmed**") for line in told["natural"] if "better clean accuracy than AT" in line] == [1]
    assert [line.count("| confirmed |") for line in told["on_manifold"] if "AT is not robust on the manifold" in line] == [1]
    study.looks = 1
    (of_one_look,) = [line for line in study_tables.verdicts(study, "on_manifold") if "AT is not robust on the manifold" in line]
    assert f"the gain on the manifold would not (p {of_one_look.split('|')[-2].strip()})" in notes
    (row,) = [line for line in study_tables.worst_cases(study) if line.startswith("| dmat_fog_recolor_stadv |")]
    assert row.split("|")[8].strip().startswith("**+"), "which that of best_color over AT would"


def test_what_was_done_again_is_told_beside_what_the_first_said(tmp_path: Path) -> None:
    folder = shutil.copytree(
        ROOT / "benchmarks" / "results" / "cifar5", tmp_path / "cifar5", ignore=shutil.ignore_patterns("again")
    )
    shutil.copytree(folder, tmp_path / "once more")
    shutil.move(tmp_path / "once more", folder / "again")
    page = study_report.page(study_rows.Study(folder))
    start = page.index("## Done again")
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page[start + 6 : start + 11]]
    assert all(first == again for _, _, first, again, *_ in rows)
    study = study_rows.Study(folder)
    clean = study.difference(study_claims.Claim("", "dmat", "at", "clean"), "natural")
    assert clean is not None
    (told,) = [row for row in rows if row[1] == "natural test images x, clean"]
    assert told[3] == f"{clean.value * 100:+.1f} ± {clean.half * 100:.1f}"
    assert told[-2] == "**confirmed**"
    assert told[-1] == "< 0.001"
    assert 5 * clean.chance(0.0) < 0.001, "the least of five"
    study.worst = None
    with pytest.raises(UserError, match=r"has no rows of what was to be done again: worst case"):
        study_tables.again(
            study, study, [{"text": "worst case", "better": "dmat", "than": "at", "set": "natural", "column": "worst"}]
        )


def test_claims_are_corrected_over_both_test_sets_and_for_looks() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "cifar5")
    every = {key: one.chance(key[1].bound) for key, one in study_tables.differences(study).items() if one.trainings > 1}
    assert len({s for s, _ in every}) == 2
    least = min(every, key=every.__getitem__)  # Holm multiplies the least by the number of all, and the next not by less
    assert study_tables.together(study, every)[least] == pytest.approx(min(1.0, 2 * len(every) * every[least]))
    second = sorted(every, key=every.__getitem__)[1]
    expected = 2 * max(len(every) * every[least], (len(every) - 1) * every[second])
    assert study_tables.together(study, every)[second] == pytest.approx(min(1.0, expected))
    study.looks = 1
    assert study_tables.together(study, every)[least] == pytest.approx(min(1.0, len(every) * every[least]))


def test_what_the_readme_says_of_unseen_attacks_on_digits_is_what_the_rows_say() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    claim = study_claims.Claim("", "dmat_eps_20", "at_eps_20", "unseen mean")
    natural, projected = (study.difference(claim, name) for name in ("natural", "on_manifold"))
    assert f"{natural} on natural images, also after correction" in text
    by_looks = [[study.of_examples(m, seed, "natural", "unseen mean") for seed in (1, 2)] for m in ("dmat_eps_20", "at_eps_20")]
    new = estimate([a - b for a, b in zip(*by_looks, strict=True)])
    notes = " ".join((study.folder / "notes.md").read_text(encoding="utf-8").split())
    by_looks = [[study.of_examples(m, k, "on_manifold", "unseen mean") for k in (1, 2)] for m in ("dmat_eps_20", "at_eps_20")]
    too = estimate([a - b for a, b in zip(*by_looks, strict=True)])
    assert f"By those two alone it gains {new} and {too} points over unseen attacks" in notes
    near = study.difference(study_claims.Claim("", "dmat", "at", "PGD-50"), "natural")
    assert near is not None
    assert near.value - near.half > -study_claims.NEAR
    assert "DMAT is less than two points below AT under L∞, by its own interval" in text
    assert f"and {projected} on projections, by its own interval" in text
    (row,) = [line for line in study_tables.verdicts(study, "natural") if "twice the radius in both" in line and "unseen" in line]
    assert "**confirmed**" in row
    (row,) = [
        line for line in study_tables.verdicts(study, "on_manifold") if "twice the radius in both" in line and "unseen" in line
    ]
    assert "| confirmed |" in row


def test_what_the_readme_says_of_the_worst_case_on_digits_is_what_the_rows_say() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    rows = {
        row.split(" | ")[0].strip("| "): [c.strip() for c in row.strip("| ").split(" | ")]
        for row in study_tables.worst_cases(study)
    }
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    _, _, _, _, projected, of_its_radius, _, _, natural, natural_of_its_radius = rows["dmat_eps_20"]
    assert projected.startswith("**+"), "what differs among all is bold"
    assert natural.startswith("**+")
    assert (
        f"by {projected.strip('*+')} points on projections and {natural.strip('*+')} on natural images, after correction" in text
    )
    assert f"`at_eps_20` by {of_its_radius.strip('+')} and {natural_of_its_radius.strip('+')}, each by its own interval" in text
    _, _, _, projected, than_at, _, _, natural, *_ = rows["dmat_trades_wide"]
    assert not projected.startswith("**")
    assert than_at.startswith("**+")
    assert (
        f"above AT's by {than_at.strip('*+')} points on projections, after correction, and above DMAT's by "
        f"{projected.strip('+')}, by its own interval" in text
    )
    assert not natural.startswith("**")


def test_a_difference_of_one_model_each_is_never_bold() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    assert study.worst is not None
    first = pc.ends_with(study.worst.rows["model"], "-0")
    study.worst = Results(study.worst.rows.filter(first), study.worst.config)
    rows = study_tables.worst_cases(study)
    assert any(line.startswith("| dmat_eps_20 | 1 | ") for line in rows)
    assert not [line for line in rows if "**" in line]


def test_numbers_beside_autoattack_say_of_how_many_of_its_images_they_are() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    assert study_tables.autoattack(study)[0].endswith("| PGD-50 | APGD-CE | APGD-DLR |")
    kept = pc.unique(pq.read_table(study.folder / "autoattack" / "all.parquet")["id"])[:30]
    study.results = Results(study.results.rows.filter(pc.is_in(study.results.rows["id"], value_set=kept)), study.results.config)
    head, _, first, *_ = study_tables.autoattack(study)
    assert head.endswith("| PGD-50, of 30 of them | APGD-CE, of 30 of them | APGD-DLR, of 30 of them |")
    right = study.results.correct(first.split()[1], "natural", "PGD-50")
    assert float(first.split(" | ")[-3]) == round(100 * right.sum() / 30)


def test_the_readme_shows_the_study_on_digits() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split(study_report.BEGIN)[1].split(study_report.END)[0].strip() == "\n".join(study_tables.headline(study))
