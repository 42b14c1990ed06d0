"""Project every image into the generator's W+ space: an on-manifold data set in Parquet, with its manifest."""

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment


def main() -> None:
    config, given = cli.parse(str(__doc__), preset=["demo"], add=cli.add_dry_run)
    if given.dry_run:
        from dmat_ray import dry_run

        print(dry_run.text(config, dry_run.stages(config, project=True)))
        return
    prepare_environment(config, images=True)
    from dmat_ray.cluster import jobs

    say = jobs.Speaker().stage("project")
    jobs.project(config, say)
    say("next, with the same options: jobs/inspect_set.py looks at it, jobs/train.py trains on it")


if __name__ == "__main__":
    cli.run(main)
