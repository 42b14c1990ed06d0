"""What the scripts in jobs/ call: projection, training, evaluation and prediction, each with its session, its lines and, but for
prediction, its MLflow run."""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dmat_ray.cluster import tracking
from dmat_ray.cluster.session import EVALUATE, PROJECT, TRAIN, connected
from dmat_ray.config import Config
from dmat_ray.storage import Location, Place, at, set_folder, tracking_uri
from dmat_ray.storage.files import text_digest

if TYPE_CHECKING:
    from dmat_ray.data.sources import Listing
    from dmat_ray.evaluation.checks import Finding
    from dmat_ray.evaluation.metrics import Results
    from dmat_ray.storage.lease import Lease


class Speaker:
    """Prints one line per event, with the seconds since the start and the stage's name."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def stage(self, name: str) -> Callable[[str], None]:
        """A function that prints a line of this stage."""

        def say(line: str) -> None:
            print(f"[{time.monotonic() - self._began:5.0f} s] {name:<9} {line}", flush=True)

        return say


def sole_pipeline(config: Config) -> "contextlib.AbstractContextManager[Lease]":
    """Inside, no other pipeline of these settings has this output: it would go on in this one's run, and end it as failed."""
    from dmat_ray.storage.lease import sole

    return sole(at(config.output) / f"pipeline-{text_digest(tracking.identity(config))[:12]}")


def project(
    config: Config, say: Callable[[str], None], parent: "tracking.Run | None" = None, listing: "Listing | None" = None
) -> dict[str, Any]:
    """Projection, tracked, of the images that `set_maker.prepare` has listed, if it was called. Returns the manifest."""
    from dmat_ray.cluster import project as stage
    from dmat_ray.data.set_format import MANIFEST
    from dmat_ray.data.set_reader import read_manifest
    from dmat_ray.manifold import set_maker

    folder = set_folder(config)
    with contextlib.ExitStack() as stack:
        # before Ray is started: a second writer, other settings and a full disk show at once
        work = stack.enter_context(set_maker.begun(config, say, listing))
        if work is None:
            return read_manifest(folder)
        stack.enter_context(connected(config.cluster, config.output, say, (PROJECT,)))
        run = stack.enter_context(tracking.tracked(config, "", "project", parent))
        manifest = stage.project(config, work, say)
        run.metrics({f"mean_{k}": v for k, v in manifest["means"].items()} | {"images": manifest["count"]}, step=0)
        run.text(MANIFEST, (folder / MANIFEST).read_bytes().decode())
    set_maker.tell(manifest, folder, say)
    return manifest


def train(configs: list[Config], say: Callable[[str], None], parent: "tracking.Run | None" = None) -> list[Location]:
    """Training, tracked. Returns the folders of the models."""
    from dmat_ray.cluster import leftovers
    from dmat_ray.cluster import train as stage
    from dmat_ray.training import trained_models

    todo = trained_models.untrained(configs, say)
    leftovers.sweep(at(configs[0].output) / "train", [c for c in configs if c not in todo])
    if todo:
        with connected(configs[0].cluster, configs[0].output, say, (TRAIN,)):
            stage.train_models(todo, say, parent)
    return [trained_models.model_folder(c) for c in configs]


def evaluate(
    config: Config, models: Mapping[str, Place], say: Callable[[str], None], parent: "tracking.Run | None" = None
) -> "tuple[Results, list[Finding]]":
    """Evaluation and report, tracked. Returns the rows, and what the checks found."""
    from dmat_ray.cluster import evaluate as stage
    from dmat_ray.cluster import gauges
    from dmat_ray.evaluation import evaluated
    from dmat_ray.evaluation.metrics import Results
    from dmat_ray.reports import report
    from dmat_ray.storage.lease import exclusive

    folder, page = at(config.output) / "evaluation", report_page(config)
    made_for = stage.fingerprint(config, set_folder(config), models)
    if not evaluated.is_evaluated(made_for, folder):  # what was evaluated may be of rows that a later version refuses
        stage.check(config, set_folder(config), models)
    if evaluated.is_evaluated(made_for, folder) and page.is_file():
        say("the rows and the report are there and unchanged, nothing to do")
        return Results(evaluated.read_rows(folder), config.evaluation), evaluated.read_checks(folder)[1]
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(exclusive(folder))  # two evaluations must not mix their rows
        # a run that was killed after its last row, and one whose page was removed, are gone on with as the same one
        key = f"evaluate/{tracking.identity(config)}/{text_digest(json.dumps(made_for, sort_keys=True))}"
        work = stage.Work(config, set_folder(config), models, folder, made_for)
        if evaluated.is_evaluated(made_for, folder):
            say("the rows are there and unchanged")
            if stage.lacks_pictures(work):
                stack.enter_context(connected(config.cluster, config.output, say, (EVALUATE,)))
            run = stack.enter_context(tracking.tracked(config, "", "evaluate", parent, key=key))
            rows, findings = evaluated.read_rows(folder), evaluated.read_checks(folder)[1]
        else:
            stack.enter_context(connected(config.cluster, config.output, say, (EVALUATE,)))
            run = stack.enter_context(tracking.tracked(config, "", "evaluate", parent, key=key))
            told = (page, *report.siblings(page))
            if page.is_file():
                say(f"'{page}' will be replaced by that of this evaluation when it is done")
            rows, findings = stage.evaluate(work, say, lease, pictures=True, of_rows=told)
        results = Results(rows, config.evaluation)
        found = results.accuracies()
        called = tracking.names(map("/".join, found))
        for (model, set_name, column), accuracy in found.items():
            # each by itself: a name that MLflow refuses must not take the others with it
            run.metrics({called[f"{model}/{set_name}/{column}"]: accuracy.value}, step=0)
            gauges.tested(model, set_name, column, accuracy.value)
        lease.check()
        say("writing the report")
        shown = stage.read_pictures(work, say)
        report.write(config, set_folder(config), models, results, evaluated.read_checks(folder), page, shown)
        for file in (folder / evaluated.ROWS, folder / evaluated.CHECKS, page, *report.siblings(page)):
            run.artifact(file)
    return results, findings


def report_page(config: Config) -> Location:
    """Where the report goes."""
    return at(config.output) / "report.html"


def predict(config: Config, model: Location, images: str, target: Location, say: Callable[[str], None]) -> Any:
    """Predictions for a folder of images, written to `target`. Returns their table."""
    from dmat_ray.cluster import predict as stage
    from dmat_ray.models import prediction

    listing, ignored = prediction.list_images(images)
    if ignored:
        say(f"not taken: {ignored}")
    with connected(config.cluster, config.output, say, (EVALUATE,)):
        return stage.predict(config, model, images, listing, target, say)


def ui_command(config: Config) -> str:
    """The command that opens MLflow's pages on this machine."""
    uri = tracking_uri(config)
    if uri.lower().startswith(("http://", "https://", "databricks")):
        return f"open {uri}"
    # the working directory of a submitted job is nobody's but Ray's, and may be gone by now
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    python = sys.executable if submitted else os.path.relpath(sys.executable)
    return f"{python} -m mlflow ui --backend-store-uri {shlex.quote(uri)}"
