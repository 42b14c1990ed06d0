"""What an evaluation shows: one self-contained HTML page, with the same numbers as Markdown and CSV."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from dmat_ray.config import Config
from dmat_ray.data import set_reader
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.metrics import Results
from dmat_ray.models import checkpoint, methods
from dmat_ray.reports import charts, figures, report_methods, report_text, report_values
from dmat_ray.reports.columns import columns_described
from dmat_ray.reports.report_values import interval, per_cent, points
from dmat_ray.storage import Location, Place, at

MOST_WARNINGS = 12  # that are shown at once


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
        columns=columns_described(results),
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
