"""Search settings with Ray Tune: attack budgets, mixing ratios, the optimizer, or any space of your own.

    python jobs/tune.py --preset demo dmat --output runs/demo --space tune_spaces/mixing_ratio.py --cluster.train_workers 1
    ... --resume

Trials train on the on-manifold set of the output folder and are judged on held-out training images by the same attacks,
whatever they train on (tune.suites). The best model and its Pareto neighbours end up in OUTPUT/models and in MLflow's registry,
all trials in OUTPUT/tune/NAME with a page of them, report.html.
"""

import argparse
import re

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.storage import local_output
from dmat_ray.validated import validate


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", metavar="FILE", help="short for --tune.space")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a search that was killed, or whose budget was used up; begins one if there is none",
    )
    parser.add_argument("--max-gpu-hours", metavar="N", help="short for --tune.max_gpu_hours")
    parser.add_argument("--max-wall-time", metavar="TIME", help="30m, 8h: for --tune.max_wall_minutes")
    cli.add_dry_run(parser)


def _with_shorts(config: Config, given: argparse.Namespace) -> Config:
    values = config.to_json()
    for name, value in (("space", given.space), ("max_gpu_hours", given.max_gpu_hours)):
        if value is not None:
            values["tune"][name] = value
    if given.max_wall_time is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)", given.max_wall_time)
        if found is None:
            raise UserError(f"--max-wall-time '{given.max_wall_time}' is no time; write 30m or 8h")
        values["tune"]["max_wall_minutes"] = float(found[1]) * {"s": 1 / 60, "m": 1, "h": 60, "d": 1440}[found[2]]
    return validate(values)


def main() -> None:
    config, given = cli.parse(str(__doc__), preset=["demo", "dmat"], add=_arguments)
    config = _with_shorts(config, given)
    local_output(config, "jobs/tune.py")
    prepare_environment(config)
    from dmat_ray import dry_run
    from dmat_ray.cluster import champion, jobs, search_plan, tune
    from dmat_ray.cluster.session import EVALUATE, TRAIN, connected
    from dmat_ray.reports import search_result, trials_table

    if given.dry_run:
        plan = search_plan.Plan(config, print)
        models = champion.MOST + 2 * config.tune.confirm_seeds if config.tune.evaluate else 0
        corners = list(plan.space.corners(plan.base, config.tune.epochs))
        print(dry_run.text(config, dry_run.stages(config, trials=plan.trials, corners=corners, models=models)))
        print("not counted: the suites of tune.suites, which run after every epoch and, for the best models, on test images")
        print(plan.told())
        return
    say = jobs.Speaker().stage("tune")
    plan = search_plan.Plan(config, say)  # what is wrong ends here, before Ray starts
    found = tune.already(plan, say, resume=given.resume)
    if found is None:
        with connected(config.cluster, config.output, say, (TRAIN, EVALUATE)):
            found = tune.search(plan, say, resume=given.resume)
    print(trials_table.text(found.trials, found.objective))
    print(search_result.summary(found))
    print(f"\nreport: {search_plan.search_folder(config) / champion.PAGE}")
    print(f"MLflow: {jobs.ui_command(config)}")


if __name__ == "__main__":
    cli.run(main)
