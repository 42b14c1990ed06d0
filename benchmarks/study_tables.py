"""Tables of a study, as Markdown: accuracies, the claims, the worst case, AutoAttack, ablations, and what doing it again says."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from study_claims import Claim, claims, holm, verdict
from study_methods import ABLATIONS, METHODS, TABLE, WORST
from study_rows import Study

from dmat_ray import suites
from dmat_ray.config import EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation.intervals import Estimate, estimate, points
from dmat_ray.evaluation.metrics import Results
from dmat_ray.reports.columns import SET_NAMES

HEADLINE = ("clean", "PGD-50", "OM-PGD-50", "L2", "fog", "unseen mean", "worst")
BESIDE = ("PGD-50", "APGD-CE", "APGD-DLR")  # of the study's own attacks, set beside AutoAttack


def table(
    study: Study, methods: Sequence[str], set_name: str, columns: Sequence[str], seeds: Sequence[int] | None = None
) -> list[str]:
    """Methods by columns, of each column the best in bold."""
    cells = {(m, c): study.cell(m, set_name, c, seeds) for m in methods for c in columns}
    best = {c: max(round(points(cells[m, c].value), 1) for m in methods) for c in columns}
    lines = [f"| method | models | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for m in methods:
        shown = [f"**{cells[m, c]}**" if round(points(cells[m, c].value), 1) == best[c] else str(cells[m, c]) for c in columns]
        lines.append(f"| {m} | {len(study.seeds[m] if seeds is None else seeds)} | {' | '.join(shown)} |")
    return lines


def differences(study: Study) -> dict[tuple[str, Claim], Estimate]:
    """Of every claim on every test set."""
    made = [(s, claim) for s in study.config.evaluation.sets for claim in claims(study.columns(s))]
    return {(s, claim): found for s, claim in made if (found := study.difference(claim, s)) is not None}


def together(study: Study, chances: Mapping[Any, float]) -> dict[Any, float]:
    """p-values of all of these (Holm), times how often the study was looked at before it went on (Bonferroni)."""
    return {key: min(1.0, study.looks * p) for key, p in zip(chances, holm(list(chances.values())), strict=True)}


def verdicts(study: Study, set_name: str) -> list[str]:
    """Each claim with the difference behind it, and its p-value among the claims of all test sets."""
    every = differences(study)
    chances = together(study, {key: one.chance(key[1].bound) for key, one in every.items() if one.trainings > 1})
    lines = ["| claim | column | difference in points | models | | p, all together |", "|---|---|---|---|---|---|"]
    for (where, claim), found in every.items():
        if where != set_name:
            continue
        shown = _signed(found)
        chance = chances.get((where, claim))
        told, p = ("open (one seed)", "") if chance is None else (verdict(found, claim.bound), _chance(chance))
        if told != "open" and chance is not None and chance < 0.05:
            told = f"**{told}**"
        lines.append(f"| {claim.text} | {claim.column} | {shown} | {found.trainings} | {told} | {p} |")
    return lines


def worst_cases(study: Study) -> list[str]:
    """Methods by test sets, and each method's difference to DMAT, to AT, and to AT of its own radius where that is another."""
    if study.worst is None:
        return []
    names = (name.rsplit("-", 1) for name in study.worst.models)
    seeds: dict[str, list[int]] = {}
    for method, seed in names:
        seeds.setdefault(method, []).append(int(seed))
    sets = study.config.evaluation.sets
    own = {method: at for method in seeds if (at := method.replace("dmat", "at", 1)) in seeds and at not in ("at", method)}
    beside = {"less DMAT's": dict.fromkeys(seeds, "dmat"), "less AT's": dict.fromkeys(seeds, "at")}
    beside |= {"less AT's of the same radius": own} if own else {}
    heads = [f"{SET_NAMES[s]}{what}" for s in sets for what in ("", *(f", {less}" for less in beside))]
    lines = [f"| method | models | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    methods = sorted(seeds, key=lambda m: (TABLE.index(m) if m in TABLE else len(TABLE), m))
    found: dict[tuple[str, str, str], Estimate] = {}
    for method, set_name, others in itertools.product(methods, sets, beside.values()):
        than = others.get(method, method)
        if both := sorted(set(seeds[method]) & set(seeds.get(than, ()))) if method != than else []:
            pairs = [(study.worst_of_others(method, s, set_name), study.worst_of_others(than, s, set_name)) for s in both]
            found[method, set_name, than] = estimate([a - b for a, b in pairs])
    twice = ("at", "dmat")  # the same difference, the other way round
    # those to AT of the same radius came later, and are told by their own intervals
    # of one model a difference is of images alone, and settles nothing about its method
    chances = together(
        study,
        {
            key: one.chance(0.0)
            for key, one in found.items()
            if key[2] in ("dmat", "at") and (key[0], key[2]) != twice and one.trainings > 1
        },
    )
    for method in methods:
        cells = []
        for set_name in sets:
            right = [study.worst_of_others(method, seed, set_name) for seed in seeds[method]]
            cells.append(str(estimate(right, share=True)))
            for others in beside.values():
                than = others.get(method, method)
                one = found.get((method, set_name, than))
                key = ("dmat", set_name, "at") if (method, than) == twice else (method, set_name, than)
                told = "" if one is None else _signed(one)
                cells.append(f"**{told}**" if one is not None and chances.get(key, 1.0) < 0.05 else told)
        lines.append(f"| {method} | {len(seeds[method])} | {' | '.join(cells)} |")
    return lines


def autoattack(study: Study) -> list[str]:
    """The library's attacks, on the first seed's models."""
    files = sorted((study.folder / "autoattack").glob("*.parquet"))
    if not files:
        return []
    suite = study.notes["autoattack"]["suite"]
    config = suites.resolved(EvaluationConfig(suites=(suite,), sets=("natural",)))
    results = Results(pa.concat_tables([pq.read_table(file) for file in files]), config)
    columns, beside = results.columns("natural"), [c for c in BESIDE if c in study.results.columns("natural")]
    ours, theirs = (found.ids(results.models[0], "natural") for found in (study.results, results))
    both = np.isin(theirs, ours).sum()
    heads = [*columns, *(c if both == len(theirs) else f"{c}, of {both} of them" for c in beside)]
    lines = [f"| model | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for model in (f"{m}-0" for m in TABLE if f"{m}-0" in results.models):
        cells = [results.accuracy(model, "natural", column) for column in columns]
        shown = [f"{100 * c.value:.0f} ({100 * c.low:.0f} to {100 * c.high:.0f})" for c in cells]
        same = np.isin(study.results.ids(model, "natural"), results.ids(model, "natural"))
        shown += [f"{100 * study.results.per_example(model, 'natural', column)[same].mean():.0f}" for column in beside]
        lines.append(f"| {model} | {' | '.join(shown)} |")
    return lines


def _signed(found: Estimate) -> str:
    """A difference in points, with its sign."""
    return f"{points(found.value):+.1f} ± {points(found.half):.1f}"


def _chance(p: float) -> str:
    """A p-value; of the far tail, which few seeds say nothing of, only that it is there."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def ablations(study: Study) -> list[str]:
    """Tables of which most methods are there, and not only those that the main tables set side by side as well."""
    tables = {title: [m for m in methods if m in study.seeds] for title, methods in ABLATIONS.items()}
    shown = {
        title: there
        for title, there in tables.items()
        if 2 * len(there) > len(ABLATIONS[title]) and set(there) - set(METHODS[:8])
    }
    columns = [c for c in HEADLINE if c in study.results.columns("on_manifold")]
    lines = []
    for title, there in shown.items():
        shared = sorted(set.intersection(*(set(study.seeds[m]) for m in there)))
        if shared:
            lines += ["", f"### {title}", "", *table(study, there, "on_manifold", columns, shared)]
    about = (
        f"On {SET_NAMES['on_manifold']}. One thing is changed of `dmat`, evaluation is the same. Only seeds that a table's "
        "methods share are counted; with one seed, intervals are of images alone."
    )
    return ["", "## Ablations", "", about, *lines] if lines else []


def again(study: Study, found: Study, fixed: Sequence[Mapping[str, str]]) -> list[str]:
    """Claims that were `fixed` before the study was done again, by what was `found` then, beside what the first said.

    `worst` is that of all test images. Raises UserError if some of it was not found.
    """
    lines = ["| claim | test set, column | first | again | trainings | | p, all together |", "|---|---|---|---|---|---|---|"]
    told: dict[tuple[str, Claim], tuple[Estimate, Estimate]] = {}
    for one in fixed:
        claim = Claim(one["text"], one["better"], one["than"], one["column"])
        before, now = (_of_all(of, claim, one["set"]) for of in (study, found))
        if before is None or now is None:
            raise UserError(f"'{found.folder}' has no rows of what was to be done again: {claim.text}")
        told[one["set"], claim] = before, now
    chances = dict(zip(told, holm([now.chance(0.0) for _, now in told.values()]), strict=True))
    for (set_name, claim), (first, second) in told.items():
        said = verdict(second, 0.0)
        shown = f"**{said}**" if said != "open" and chances[set_name, claim] < 0.05 else said
        lines.append(
            f"| {claim.text} | {SET_NAMES[set_name]}, {claim.column} | {_signed(first)} | "
            f"{_signed(second)} | {second.trainings} | {shown} | {_chance(chances[set_name, claim])} |"
        )
    return lines


def _of_all(study: Study, claim: Claim, set_name: str) -> Estimate | None:
    if claim.column != WORST:
        return study.difference(claim, set_name)
    worst = study.worst
    pairs = [
        [worst.per_example(f"{method}-{seed}", set_name, WORST) for method in (claim.better, claim.than)]
        for seed in study.shared(claim)
        if worst is not None and {f"{claim.better}-{seed}", f"{claim.than}-{seed}"} <= set(worst.models)
    ]
    return estimate([a - b for a, b in pairs]) if pairs else None


def headline(study: Study) -> list[str]:
    """The short table."""
    columns = [c for c in HEADLINE if c in study.results.columns("on_manifold")]
    return table(study, study.methods, "on_manifold", columns)
