"""Give trained models to others: a folder that plain torch reads, a card, and a model in MLflow.

python jobs/export_model.py --output runs/demo --models dmat at
python jobs/export_model.py --output runs/demo --models dmat --register digits --alias champion
"""

import argparse

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.storage import at
from dmat_ray.storage.folders import replace_folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", action="extend", required=True, metavar="NAME", help="models under OUTPUT/models, or folders"
    )
    parser.add_argument("--to", metavar="FOLDER", help="where a folder for each goes (default: OUTPUT/exported)")
    parser.add_argument("--register", metavar="NAME", help="register the model in MLflow under this name")
    parser.add_argument("--alias", metavar="ALIAS", help="alias of the registered version, e.g. champion")


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    prepare_environment(config, places={"to": arguments.to})
    from dmat_ray.cluster import export, jobs
    from dmat_ray.exchange import model_export
    from dmat_ray.training import trained_models

    root = at(config.output)
    target = at(arguments.to) if arguments.to else root / "exported"
    found = trained_models.named_folders(config, arguments.models)
    export.require_loggable(found, arguments.register, arguments.alias)
    say = jobs.Speaker().stage("export")
    for name, model in found.items():
        folder = target / name
        model_export.require_ours(folder)
        replace_folder(folder, lambda fresh, m=model, n=name: model_export.export(m, n, root / "evaluation", fresh))
        say(f"{name}: {folder}")
        export.log_model(config, name, model, folder, arguments.register, arguments.alias, say)


if __name__ == "__main__":
    cli.run(main)
