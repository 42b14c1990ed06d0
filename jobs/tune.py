"""Search attack budgets and mixing ratios: Ray Tune over Ray Train runs on the on-manifold set of the output folder."""

from dmat_ray import cli
from dmat_ray.cluster.session import prepare_environment


def main() -> None:
    config, _ = cli.parse(str(__doc__), preset=["demo"])
    prepare_environment(config)
    from dmat_ray.cluster import tune
    from dmat_ray.cluster.jobs import Speaker
    from dmat_ray.cluster.session import connected

    with connected(config.cluster):
        found = tune.search(config, Speaker().stage("tune"))
    print(f"trials by {config.tune.metric}, best first:")
    for result in found:
        sample = ", ".join(f"{key} = {value}" for key, value in result["sample"].items())
        print(f"  {result['metrics'][config.tune.metric]:.3f}  {sample}")


if __name__ == "__main__":
    cli.run(main)
