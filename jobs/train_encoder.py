"""Train an encoder for the generator, on samples of that generator alone: projection can start from what it says."""

import argparse
import shlex
import sys

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace another encoder that is in the output folder")
    cli.add_dry_run(parser)


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    if arguments.dry_run:
        from dmat_ray import dry_run

        print(dry_run.text(config, dry_run.encoder_stages(config)))
        return
    prepare_environment(config, elastic=False)
    from dmat_ray.cluster.encoder import train_encoder
    from dmat_ray.cluster.jobs import Speaker

    say = Speaker().stage("encoder")
    command = shlex.join(["python", "jobs/train_encoder.py", *sys.argv[1:]])
    folder = train_encoder(config, arguments.overwrite, command, say)
    say(f"encoder in {folder}; projection finds it with --projection.start encoder and the same --output")


if __name__ == "__main__":
    cli.run(main)
