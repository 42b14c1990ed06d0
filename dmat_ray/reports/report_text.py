"""The page's siblings: the same numbers as Markdown, and as CSV for other programs."""

import csv
import io
import re
from collections.abc import Mapping, Sequence

from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.intervals import Accuracy, Difference, Estimate
from dmat_ray.evaluation.metrics import Results
from dmat_ray.reports.columns import SET_NAMES, columns_described, over
from dmat_ray.reports.report_methods import MethodTable
from dmat_ray.reports.report_values import differences, differs, interval, per_cent, points, tables, transfers
from dmat_ray.wording import number_of

COMPARED = (
    "Differences between models in percentage points, image by image, with 95 % intervals and McNemar's p; with a plus the model "
    "that is named first is right more often. Bold is what excludes 0 by both, as about one in twenty does by chance alone. "
    "Training again with another seed may change more:"
)
CSV_COLUMNS = ("table", "set", "method", "source", "attack", "eps", "accuracy", "low", "high", "count")


def passed(findings: Sequence[Finding]) -> tuple[int, int]:
    """How many checks passed, and how many were made; a check that warns twice is one."""
    every = {(f.model, f.check) for f in findings}
    return len(every - {(f.model, f.check) for f in findings if f.level == "warning"}), len(every)


def markdown(
    title: str,
    results: Results,
    models: list[str],
    findings: Sequence[Finding],
    facts: Sequence[tuple[str, str]],
    config: str,
    by_method: Mapping[str, MethodTable] | None = None,
) -> str:
    """Everything of the page but its pictures; `by_method` is what `report_methods.tables` found."""
    text = [f"# {escaped(title)}", ""]
    warnings = [f for f in findings if f.level == "warning"]
    if warnings:
        text += ["## Warnings", ""]
        text += [f"- **Warning:** {escaped(f.model)}: {escaped(f.check)}: {escaped(f.text)}" for f in warnings] + [""]
    for table in tables(results, models):
        text += [f"## {escaped(table.title)}", ""]
        cells = [[(per_cent(table.cells[m, c]), table.is_best(m, c)) for c in table.columns] for m in models]
        text += _table(["method", *table.columns], models, [[f"**{t}**" if b else t for t, b in row] for row in cells])
        text += ["95 % intervals:", ""]
        text += _table(["method", *table.columns], models, [[interval(table.cells[m, c]) for c in table.columns] for m in models])
        if pairs := differences(results, table):
            text += [COMPARED, ""]
            body = [[f"**{points(d)}**" if differs(d) else points(d) for d in pair["cells"].values()] for pair in pairs]
            text += _table(["difference", *pairs[0]["cells"]], [pair["title"] for pair in pairs], body)
        if by_method and table.set_name in by_method:
            text += _by_method(by_method[table.set_name])
    text += ["## Columns", "", *(f"- **{escaped(c)}**: {escaped(what)}" for c, what in columns_described(results).items()), ""]
    for set_name in results.config.sets:
        for name, every in results.curves(set_name).items():
            text += [f"## {escaped(name)} over {escaped(over(results.suite[name]))} on {escaped(SET_NAMES[set_name])}", ""]
            body = [[per_cent(results.at_eps(m, set_name, name, eps)) for eps in every] for m in models]
            text += _table(["method", *(f"{eps:.4g}" for eps in every)], models, body)
    for transfer in transfers(results, models):
        text += [f"## Transfer of {escaped(transfer['title'])}", ""]
        body = [[per_cent(transfer["pairs"][source, judge]) for judge in models] for source in models]
        text += _table(["attacked, then judged by", *models], models, body)
    if findings:
        good, every_check = passed(findings)
        others = f"; {every_check - good} gave the {number_of(len(warnings), 'warning')} above" if warnings else ""
        text += ["## Checks", "", f"{good} of {every_check} passed{others}.", ""]
        text += [f"- {f.level}: {escaped(f.model)}: {escaped(f.check)}: {escaped(f.text)}" for f in findings] + [""]
    text += ["## Settings", "", *(f"- {escaped(name)}: {escaped(value)}" for name, value in facts), ""]
    text += [fenced(config, "yaml"), ""]
    return "\n".join(text)


def _by_method(found: MethodTable) -> list[str]:
    text, names = [f"### {escaped(found.title)}", ""], [method.name for method in found.methods]
    body = []
    for method in found.methods:
        shown = [(str(found.cells[method.name, c]), found.is_best(method.name, c)) for c in found.columns]
        body.append([str(len(method.trainings)), *(f"**{cell}**" if best else cell for cell, best in shown)])
    text += [*_table(["method", "trainings", *found.columns], names, body), escaped(found.explained), ""]
    if found.differences:
        body = [
            [pair.trainings, *(f"**{points(d)}**" if differs(d) else points(d) for d in pair.cells.values())]
            for pair in found.differences
        ]
        text += _table(["difference", "trainings", *found.columns], [pair.title for pair in found.differences], body)
        text += [escaped(found.compared), ""]
    return text


def escaped(text: str) -> str:
    """A name as Markdown's text."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#|&~!" else c for c in " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(head: Sequence[str], names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(escaped(c) for c in head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *(f"| {escaped(n)} | " + " | ".join(row) + " |" for n, row in zip(names, body, strict=True)), ""]


def comma_separated(results: Results, models: list[str], by_method: Mapping[str, MethodTable] | None = None) -> str:
    """A line for each number of the tables, of the curves over eps, and of transfer; accuracies are shares of 1, in full.

    Of a difference `accuracy` is that of `method` less that of `source`. Where there are means over trainings a last column says
    of how many they are.
    """
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow([*CSV_COLUMNS, *(["trainings"] if by_method else [])])

    def write(
        kind: str, set_name: str, method: str, source: str, attack: str, eps: float | str, found: Accuracy | Difference
    ) -> None:
        numbers = [found.value, found.low, found.high, found.count]
        lines.writerow([kind, set_name, method, source, attack, eps, *numbers, *([""] if by_method else [])])

    def write_mean(kind: str, table: MethodTable, method: str, source: str, attack: str, found: Estimate) -> None:
        trainings = found.trainings if found.others is None else f"{found.trainings} and {found.others}"
        numbers = [found.value, found.low, found.high, table.count, trainings]
        lines.writerow([kind, table.set_name, method, source, attack, "", *numbers])

    for table in tables(results, models):
        for (model, column), found in table.cells.items():
            write("accuracy", table.set_name, model, model, column, getattr(results.suite.get(column), "eps", ""), found)
        for pair in differences(results, table):
            for column, apart in pair["cells"].items():
                write("difference", table.set_name, pair["first"], pair["second"], column, "", apart)
    for means in (by_method or {}).values():
        for (method, column), mean in means.cells.items():
            if mean.trainings > 1:
                write_mean("mean over trainings", means, method, method, column, mean)
        for compared in means.differences:
            for column, mean in compared.cells.items():
                write_mean("difference over trainings", means, compared.first, compared.second, column, mean)
    for set_name in results.config.sets:
        for name, every in results.curves(set_name).items():
            for model in models:
                for eps in every:
                    write("curve", set_name, model, model, name, eps, results.at_eps(model, set_name, name, eps))
    for transfer in transfers(results, models):
        for source in models:
            for judge in models:
                write("transfer", transfer["set"], judge, source, transfer["name"], "", transfer["pairs"][source, judge])
    return buffer.getvalue()
