"""Train one classifier on the on-manifold set of the output folder, on Ray Train; a rerun goes on where it stopped."""

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment


def main() -> None:
    config, given = cli.parse(str(__doc__), preset=["demo", "dmat"], add=cli.add_dry_run)
    if given.dry_run:
        from dmat_ray import dry_run

        print(dry_run.text(config, dry_run.stages(config, train=[config])))
        return
    prepare_environment(config)
    from dmat_ray.cluster import jobs

    say = jobs.Speaker().stage("train")
    for folder in jobs.train([config], say):
        say(f"model in {folder}; next, with the same options: jobs/evaluate.py")


if __name__ == "__main__":
    cli.run(main)
