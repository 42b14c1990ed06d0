"""Train a StyleGAN 2 on the training split: weights in safetensors, a card, a grid of samples."""

import shlex
import sys
from pathlib import Path

from dmat_ray import cli
from dmat_ray.cluster.session import prepare_environment


def main() -> None:
    config, _ = cli.parse(str(__doc__), preset=["mnist32_generator"])
    prepare_environment(config)
    from dmat_ray.cluster import gan
    from dmat_ray.cluster.jobs import Speaker
    from dmat_ray.cluster.session import connected
    from dmat_ray.manifold.gan import check_images

    say = Speaker().stage("generator")
    command = shlex.join(["python", "jobs/train_generator.py", *sys.argv[1:]])
    check_images(config.gan, *gan.training_images(config.data))  # bad data ends here, before Ray starts
    with connected(config.cluster):
        folder = gan.train(config, Path(config.output).resolve() / "generator", command, say)
    say(f"generator in {folder}; use it with --generator.path {folder}")


if __name__ == "__main__":
    cli.run(main)
