"""All stages: project, train every method, evaluate, report. Stages whose output is whole and unchanged are skipped."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dmat_ray import cli, presets
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.config import Config, ObjectiveConfig
from dmat_ray.errors import UserError
from dmat_ray.validated import validate

WEIGHT = re.compile(r"objective\..*weight")
APART = "is what tells methods apart; give it in a preset of your own, and that one's path in --methods"


def main() -> None:
    config, given = cli.parse(str(__doc__), preset=["demo"], add=cli.add_dry_run)
    if weights := sorted(name for name, value in vars(given).items() if value is not None and WEIGHT.fullmatch(name)):
        raise UserError(f"{weights[0]} {APART}")
    if getattr(given, "name", None) is not None:
        raise UserError(
            "--name is of one model, and a pipeline trains several, called after their presets; give `name` in a preset of your "
            "own, and that one's path in --methods, or keep models apart by another --output"
        )
    configs = [_method(name) for name in config.methods]
    names = [method.name for method in configs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two of methods = {', '.join(config.methods)} are models of the name '{twice}'; give one another `name`")
    if given.dry_run:
        from dmat_ray import dry_run

        print(dry_run.text(config, dry_run.stages(config, project=True, train=configs, models=len(configs))))
        return
    methods = {c.name: c for c in configs}
    prepare_environment(config, images=True)
    from dmat_ray.cluster import jobs, tracking
    from dmat_ray.cluster.session import connected
    from dmat_ray.data.set_format import MANIFEST
    from dmat_ray.evaluation import evaluation
    from dmat_ray.manifold import set_maker
    from dmat_ray.reports import terminal
    from dmat_ray.storage import set_folder
    from dmat_ray.training import trained_models

    speaker = jobs.Speaker()
    say = speaker.stage("pipeline")
    limits = {"training": config.data.train_limit, "test": config.data.test_limit}
    taken = " and ".join(f"{most} {split}" for split, most in limits.items() if most is not None)
    subset = f", a subset: at most {taken} images" if taken else ""
    say(f"data {config.data.source}{subset}; output in {config.output}")
    # before Ray is started, and before hours of other stages: what the set will not allow
    listing = set_maker.prepare(config, speaker.stage("project"))
    manifest = set_maker.promised(config, listing)
    untrained = [c for c in configs if not trained_models.is_trained(c)]
    trained_models.require_fit(untrained, manifest)
    evaluation.require_suite(config.evaluation, manifest)
    # one Ray for all stages; what a rerun finds done needs none
    needs_ray = untrained or not (set_folder(config) / MANIFEST).is_file()
    with ExitStack() as stack:
        stack.enter_context(jobs.sole_pipeline(config))
        if needs_ray:
            stack.enter_context(connected(config.cluster, config.output, say))
        run = stack.enter_context(tracking.tracked(config, "", "pipeline"))
        jobs.project(config, speaker.stage("project"), run, listing)
        folders = jobs.train(list(methods.values()), speaker.stage("train"), run)
        trained = dict(zip(methods, folders, strict=True))
        results, findings = jobs.evaluate(config, trained, speaker.stage("evaluate"), run)
        page = jobs.report_page(config)
        run.artifact(page)
        say("done")
    print(terminal.of_evaluation(results, trained, findings))
    print(f"\nreport: {page}")
    print(f"MLflow: {jobs.ui_command(config)}")


def _method(name: str, argv: Sequence[str] | None = None) -> Config:
    """The pipeline's settings with those of a method's preset between its presets and its options.

    Raises UserError for a weight that does not come of the method's preset.
    """
    config, _ = cli.parse(str(__doc__), argv, preset=["demo"], over=[name], add=cli.add_dry_run)
    own = presets.load([name])
    _require_own_weights(name, config.objective, own.get("objective", {}))
    return validate({**config.to_json(), "name": own.get("name", Path(name).stem)})


def _require_own_weights(method: str, objective: ObjectiveConfig, own: dict[str, Any]) -> None:
    """Raise UserError for a term that is trained on and whose weight `own`, of the method's preset, does not set."""
    for name, term in objective.adversarial.items():
        where, said = (f"more.{name}", own.get("more", {})) if name in objective.more else (name, own)
        if term.weight > 0 and "weight" not in said.get(name, {}):
            raise UserError(f"objective.{where}.weight {APART} ('{method}' sets none, and would have another's {term.weight:g})")


if __name__ == "__main__":
    cli.run(main)
