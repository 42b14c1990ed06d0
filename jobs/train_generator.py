"""Train a StyleGAN 2 on the training split: weights in safetensors, a card, a grid of samples."""

import argparse
import shlex
import sys
from contextlib import suppress

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.errors import UserError
from dmat_ray.storage import local_output


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace another generator that is in the output folder")
    cli.add_dry_run(parser)


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["mnist32_generator"], add=add)
    output = local_output(config, "jobs/train_generator.py")
    if arguments.dry_run:
        from dmat_ray import dry_run

        print(dry_run.text(config, dry_run.generator_stages(config)))
        return
    prepare_environment(config, elastic=False, images=True)
    from dmat_ray.cluster import gan
    from dmat_ray.cluster.jobs import Speaker
    from dmat_ray.manifold.gan_folder import is_trained, settle
    from dmat_ray.manifold.gan_images import sweep
    from dmat_ray.storage.lease import sole

    say = Speaker().stage("generator")
    folder = output / "generator"
    if not arguments.overwrite and is_trained(config, folder):
        with suppress(UserError), sole(folder):  # what a training that was killed in its last moment has left
            settle(config, folder, output / "train")
            sweep(output / "train")
        say("is trained already and unchanged, nothing to do")
    else:
        gan.train(config, folder, shlex.join(["python", "jobs/train_generator.py", *sys.argv[1:]]), say, anew=arguments.overwrite)
    say(f"generator in {folder}; use it with --generator.path {folder}")


if __name__ == "__main__":
    cli.run(main)
