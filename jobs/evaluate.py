"""Attack trained models on on-manifold and natural test images: rows in Parquet, a table, report.html."""

import argparse
from pathlib import Path

from dmat_ray import cli
from dmat_ray.cluster.session import prepare_environment
from dmat_ray.errors import UserError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="models under OUTPUT/models, or folders (default: all under OUTPUT/models)"
    )


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    prepare_environment(config)
    from dmat_ray import report
    from dmat_ray.cluster import jobs

    root = Path(config.output).resolve() / "models"
    given = arguments.models or sorted(p.name for p in root.glob("[!.]*") if p.is_dir())
    if not given:
        raise UserError(f"there are no models under '{root}'; train one with jobs/train.py, or name folders with --models")
    models = {Path(name).name: (root / name if (root / name).is_dir() else Path(name)).resolve() for name in given}
    if len(models) < len(given):
        raise UserError(f"two of the models have the same name: {', '.join(given)}")
    rows = jobs.evaluate(config, models, jobs.Speaker().stage("evaluate"))
    print(report.terminal_table(rows, list(models), config.evaluation))
    print(f"report: {Path(config.output).resolve() / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
