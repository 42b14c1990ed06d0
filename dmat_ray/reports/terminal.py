"""What jobs and notebooks print: tables of an evaluation, and any table as plain text."""

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from dmat_ray.errors import UserError
from dmat_ray.evaluation import intervals
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models import checkpoint, methods
from dmat_ray.reports import report_methods, report_text, report_values
from dmat_ray.reports.report_values import per_cent
from dmat_ray.storage import Place
from dmat_ray.wording import number_of

WIDTH = 110


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
    parts: list[RenderableType] = []
    for found in report_values.tables(results, models):
        rows = {m: [per_cent(found.cells[m, c]) for c in found.columns] for m in models}
        parts += [_in_line(found.title), *_tables("method", found.columns, rows)]
    return plain(parts, WIDTH)


def terminal_methods(results: Results, models: Mapping[str, Place]) -> str:
    """Means over trainings and differences of methods, of models that are there with several seeds; "" if none is.

    `models` maps names to folders of checkpoints.
    """
    parts: list[RenderableType] = []
    trained = methods.among({name: checkpoint.read_run(folder) for name, folder in models.items()})
    for found in report_methods.tables(results, trained).values():
        parts.append(f"{_in_line(found.title)}, ± half of the 95 % interval")
        rows = {m.name: [str(len(m.trainings)), *(str(found.cells[m.name, c]) for c in found.columns)] for m in found.methods}
        parts += _tables("method", ["trainings", *found.columns], rows)
        if found.differences:
            parts.append("in points; * where the interval excludes 0")
            rows = {pair.title: [pair.trainings, *map(_marked, pair.cells.values())] for pair in found.differences}
            parts += _tables("difference", ["trainings", *found.columns], rows)
    return plain(parts, WIDTH)


def _marked(found: intervals.Estimate) -> str:
    mark = "*" if report_values.differs(found) else " "
    return f"{intervals.points(found.value):+.1f} ± {intervals.points(found.half):.1f}{mark}"


def _in_line(title: str) -> str:
    return f"{title[0].lower()}{title[1:]}"


def _tables(head: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[Table]:
    """Rows by their names, in as many tables as their columns take."""
    room = WIDTH - max(len(name) for name in (head, *rows)) - 4
    widths = [max(5, len(column), *(len(row[k]) for row in rows.values())) + 3 for k, column in enumerate(columns)]
    parts: list[list[int]] = [[]]
    for k, width in enumerate(widths):
        if parts[-1] and sum(widths[i] for i in parts[-1]) + width > room:
            parts.append([])
        parts[-1].append(k)
    found = []
    for part in parts:
        table = Table()
        table.add_column(head)
        for k in part:
            table.add_column(columns[k], justify="right")
        for name, row in rows.items():
            table.add_row(name, *(row[k] for k in part))
        found.append(table)
    return found


def warnings(findings: Sequence[Finding]) -> list[str]:
    """Those of the checks, a line each."""
    return [f"warning: {f.model}: {f.check}: {f.text}" for f in findings if f.level == "warning"]


def terminal_checks(findings: Sequence[Finding]) -> str:
    """A line for each warning, and one that says how many checks passed."""
    lines = warnings(findings)
    good, every = report_text.passed(findings)
    others = f"; {every - good} gave {number_of(len(lines), 'warning')}" if lines else ""
    return "\n".join([*lines, f"{good} of {every} checks passed{others}" if every else "no checks were made"])


def of_evaluation(results: Results, models: Mapping[str, Place], findings: Sequence[Finding]) -> str:
    """All that a job prints of its evaluation: the table, methods with several seeds, and what the checks found."""
    parts = (terminal_table(results, list(models)), terminal_methods(results, models), terminal_checks(findings))
    return "\n".join(part for part in parts if part)


def plain(parts: Iterable[RenderableType], width: int) -> str:
    """What rich prints of tables and lines, as text of so many columns."""
    # markup would swallow a name such as "at [fast]"
    console = Console(width=width, force_terminal=False, color_system=None, markup=False, record=True, file=io.StringIO())
    for part in parts:
        console.print(part)
    return console.export_text().rstrip()
