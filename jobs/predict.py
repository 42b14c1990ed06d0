"""Let a model label a folder of images: one row an image in Parquet, with its five likeliest classes.

python jobs/predict.py --output runs/demo --model dmat --images photos
python jobs/predict.py --output runs/demo --model dmat --images s3://bucket/photos --to s3://bucket/labels.parquet
"""

import argparse

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.errors import UserError
from dmat_ray.storage import at


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="a model under OUTPUT/models, or a folder")
    parser.add_argument("--images", required=True, metavar="FOLDER_OR_URL", help="folder of images, with or without sub-folders")
    parser.add_argument("--to", metavar="FILE", help="Parquet file (default: OUTPUT/predictions/NAME.parquet)")


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    prepare_environment(config, tracked=False, places={"to": arguments.to})
    from dmat_ray.cluster import jobs
    from dmat_ray.models import checkpoint, prediction
    from dmat_ray.training import trained_models

    ((name, model),) = trained_models.named_folders(config, [arguments.model]).items()
    target = at(arguments.to or at(config.output) / "predictions" / f"{name}.parquet")
    if not target.name.endswith(".parquet"):
        raise UserError(f"--to '{target}' must end in .parquet")
    images = str(at(arguments.images))  # workers run in other folders
    say = jobs.Speaker().stage("predict")
    given = [name for name, value in vars(arguments).items() if value is not None]
    named = [name.removeprefix("data.") for name in given if name.startswith("data.")]
    for note in prediction.notes_of_decoding(checkpoint.read_run(model), config.data, named):
        say(note)
    table = jobs.predict(config, model, images, target, say)
    unreadable = table.num_rows - table["prediction"].drop_null().length()
    print(f"{table.num_rows - unreadable} of {table.num_rows} images have a prediction: {target}")


if __name__ == "__main__":
    cli.run(main)
