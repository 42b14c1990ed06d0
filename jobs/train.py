"""Train one classifier on the on-manifold set of the output folder, on Ray Train; a rerun goes on where it stopped."""

from dmat_ray import cli
from dmat_ray.cluster.session import prepare_environment


def main() -> None:
    config, _ = cli.parse(str(__doc__), preset=["demo", "dmat"])
    prepare_environment(config)
    from dmat_ray.cluster import jobs

    say = jobs.Speaker().stage("train")
    for folder in jobs.train([config], say):
        say(f"model in {folder}")


if __name__ == "__main__":
    cli.run(main)
