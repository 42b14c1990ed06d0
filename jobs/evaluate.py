"""Attack trained models on on-manifold and natural test images: rows in Parquet, a table, report.html."""

import argparse

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.errors import UserError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="models under OUTPUT/models, or folders (default: all under OUTPUT/models)",
    )
    cli.add_dry_run(parser)


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    prepare_environment(config, tracked=not arguments.dry_run)
    from dmat_ray import dry_run
    from dmat_ray.cluster import jobs
    from dmat_ray.models.checkpoint import RUN
    from dmat_ray.reports import terminal
    from dmat_ray.training.trained_models import models_folder, named_folders

    root = models_folder(config)
    if arguments.dry_run and root.local is None:  # what is in an object store is not looked at
        print(dry_run.text(config, dry_run.stages(config, models=len(arguments.models or config.methods))))
        return
    # one that is half published, in an object store, or its empty folder, has no such file
    given = arguments.models or [folder.name for folder in root.folders() if (folder / RUN).is_file()]
    if not given:
        raise UserError(f"there are no models under '{root}'; train one with jobs/train.py, or name folders with --models")
    models = named_folders(config, given)
    if arguments.dry_run:
        print(dry_run.text(config, [dry_run.evaluation_stage(config, models)]))
        return
    results, findings = jobs.evaluate(config, models, jobs.Speaker().stage("evaluate"))
    print(terminal.of_evaluation(results, models, findings))
    print(f"report: {jobs.report_page(config)}")
    print("next: jobs/export_model.py makes folders of models for others")


if __name__ == "__main__":
    cli.run(main)
