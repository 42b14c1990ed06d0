"""What people look at: the table in the terminal, and one self-contained HTML page, with the same numbers as Markdown and CSV."""

import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from dmat_ray.config import Config
from dmat_ray.data import set_reader
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation, intervals
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models import checkpoint, methods
from dmat_ray.reports import charts, figures, report_methods, report_text, report_values
from dmat_ray.reports.report_values import interval, per_cent, points
from dmat_ray.storage import Location, Place, at
from dmat_ray.wording import number_of

WIDTH = 110
MOST_WARNINGS = 12  # that are shown at once


def terminal_table(results: Results, models: list[str]) -> str:
    """Accuracy in per cent, methods x columns, a block for each test set; many columns take several tables.

    Raises UserError for a model that was not evaluated, and for none.

    >>> from dmat_ray import evaluate, make_set, open_set, settings, terminal_table, train
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> test = open_set(make_set(config), "test")
    >>> rows = [{"threat": "clean"}, {"threat": "stadv", "name": "StAdv", "eps": 0.2, "steps": 5}]
    >>> results = evaluate({"dmat": train(config)}, test, "mnist32", config.evaluation, attacks=rows, summaries=(), limit=10)
    >>> print(terminal_table(results, ["dmat"]))  # doctest: +ELLIPSIS
    accuracy (%) on 10 on-manifold test images g(w)
    ┏━━━━━━━━┳━━━━━━━┳━━━━━━━┓
    ┃ method ┃ clean ┃ StAdv ┃
    ┡━━━━━━━━╇━━━━━━━╇━━━━━━━┩
    │ dmat   │ ... │ ... │
    └────────┴───────┴───────┘
    accuracy (%) on 10 natural test images x
    ...
    """
    if not isinstance(results, Results):
        raise UserError(f"results is a {type(results).__name__}; give what evaluate returns")
    if not models:
        raise UserError(f"models is {models!r}; give some of those that were evaluated: {', '.join(results.models)}")
    console = _console()
    for found in report_values.tables(results, models):
        console.print(_in_line(found.title))
        _print(console, "method", found.columns, {m: [per_cent(found.cells[m, c]) for c in found.columns] for m in models})
    return console.export_text().rstrip()


def terminal_methods(results: Results, models: Mapping[str, Place]) -> str:
    """Means over trainings and differences of methods, of models that are there with several seeds; "" if none is.

    `models` maps names to folders of checkpoints.
    """
    console = _console()
    trained = methods.among({name: checkpoint.read_run(folder) for name, folder in models.items()})
    for found in report_methods.tables(results, trained).values():
        console.print(f"{_in_line(found.title)}, ± half of the 95 % interval")
        rows = {m.name: [str(len(m.trainings)), *(str(found.cells[m.name, c]) for c in found.columns)] for m in found.methods}
        _print(console, "method", ["trainings", *found.columns], rows)
        if found.differences:
            console.print("in points; * where the interval excludes 0")
            rows = {pair.title: [pair.trainings, *map(_marked, pair.cells.values())] for pair in found.differences}
            _print(console, "difference", ["trainings", *found.columns], rows)
    return console.export_text().rstrip()


def _marked(found: intervals.Estimate) -> str:
    mark = "*" if report_values.differs(found) else " "
    return f"{intervals.points(found.value):+.1f} ± {intervals.points(found.half):.1f}{mark}"


def _console() -> Console:
    # markup would swallow a name such as "at [fast]"
    return Console(width=WIDTH, force_terminal=False, color_system=None, record=True, markup=False, file=io.StringIO())


def _in_line(title: str) -> str:
    return f"{title[0].lower()}{title[1:]}"


def _print(console: Console, head: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Rows by their names, in as many tables as their columns take."""
    room = WIDTH - max(len(name) for name in (head, *rows)) - 4
    widths = [max(5, len(column), *(len(row[k]) for row in rows.values())) + 3 for k, column in enumerate(columns)]
    parts: list[list[int]] = [[]]
    for k, width in enumerate(widths):
        if parts[-1] and sum(widths[i] for i in parts[-1]) + width > room:
            parts.append([])
        parts[-1].append(k)
    for part in parts:
        table = Table()
        table.add_column(head)
        for k in part:
            table.add_column(columns[k], justify="right")
        for name, row in rows.items():
            table.add_row(name, *(row[k] for k in part))
        console.print(table)


def terminal_checks(findings: Sequence[Finding]) -> str:
    """A line for each warning, and one that says how many checks passed."""
    lines = [f"warning: {f.model}: {f.check}: {f.text}" for f in findings if f.level == "warning"]
    good, every = report_text.passed(findings)
    others = f"; {every - good} gave {number_of(len(lines), 'warning')}" if lines else ""
    return "\n".join([*lines, f"{good} of {every} checks passed{others}" if every else "no checks were made"])


def write(
    config: Config,
    set_folder: Place,
    models: Mapping[str, Place],
    results: Results,
    checked: tuple[list[dict[str, Any]], list[Finding]],
    page: Place,
    shown: dict[str, Any],
) -> None:
    """Write the page of these results, and its `siblings`; the page comes last.

    `models` maps names to folders, in the order of the table; `checked` is what the checks measured, and what they found;
    `shown` is the gallery, attacks on a few images for every model, as `gallery.joined` has it.
    """
    import yaml

    measurements, findings = checked
    names = list(models)
    runs = {name: checkpoint.read_run(folder) for name, folder in models.items()}
    manifest = set_reader.read_manifest(at(set_folder))
    settings = str(yaml.safe_dump(config.to_json(), sort_keys=False, allow_unicode=True))
    tables, facts = report_values.tables(results, names), _facts(config, manifest, runs)
    good, every = report_text.passed(findings)
    by_method = report_methods.tables(results, methods.among(runs))
    title = f"Robustness on {PurePosixPath(_source(manifest)).name}"
    markdown, table = siblings(at(page))
    table.write_bytes(report_text.comma_separated(results, names, by_method).encode())
    text = report_text.markdown(title, results, names, findings, facts, settings, by_method)
    markdown.write_bytes(text.encode())
    figures.write_page(
        at(page),
        "report.html",
        title=title,
        models=names,
        swatches=[charts.swatch(look) for look in range(len(names))],
        tables=tables,
        per_cent=per_cent,
        interval=interval,
        points=points,
        differs=report_values.differs,
        most_compared=report_values.MOST_COMPARED,
        compared={table.set_name: report_values.differences(results, table) for table in tables},
        by_method=by_method,
        columns=report_values.columns_described(results),
        warnings=[f for f in findings if f.level == "warning"],
        most_warnings=MOST_WARNINGS,
        findings=findings,
        good=good,
        every=every,
        trade_offs=[(table, report_values.trade_offs(results, table)) for table in tables],
        curves=report_values.curves(results, names),
        transfers=report_values.transfers(results, names),
        confusions=[(table, report_values.confusions(results, table, manifest["class_names"])) for table in tables],
        class_names=manifest["class_names"],
        courses=report_values.courses(measurements, names),
        measurements=measurements,
        gallery=shown,
        histories=report_values.histories(runs),
        manifest=manifest,
        poor={split: count - manifest["usable"].get(split, 0) for split, count in manifest["splits"].items()},
        facts=facts,
        config=settings,
        siblings=[markdown.name, table.name],
    )


def siblings(page: Location) -> tuple[Location, Location]:
    """Where a page's numbers go as Markdown, and as CSV."""
    stem = page.name.removesuffix(".html")
    return page.parent / f"{stem}.md", page.parent / f"{stem}.csv"


def _source(manifest: dict[str, Any]) -> str:
    """Where the images of a set come from, if whoever made it says so."""
    return str(manifest.get("data", {}).get("source", "an on-manifold set"))


def _facts(config: Config, manifest: dict[str, Any], runs: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What the numbers came from."""

    def listed(versions: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items())

    left_out = evaluation.left_out(manifest)
    return [
        ("Images", _source(manifest)),
        *([("Left out", left_out)] if left_out else []),
        *(
            (f"Model {name} cannot know", f"{set_reader.named_classes(lost)}, of which it was trained without an image")
            for name, run in runs.items()
            if (lost := run.get(checkpoint.UNSEEN))
        ),
        ("MLflow experiment", config.tracking.experiment),
        ("Seed of the evaluation", str(config.evaluation.seed)),
        ("Precision of attacks", config.evaluation.precision),
        ("This page was made by", listed(checkpoint.versions())),
        ("The set was made by", listed(manifest["versions"])),
        *(
            (f"Model {name}", listed(run["versions"]) if run.get("versions") else "versions unknown")
            for name, run in runs.items()
        ),
        ("Generator sha256", manifest["generator_sha256"]),
    ]
