"""The main path on a real Ray: project, train with two DDP workers, evaluate, report, MLflow in sqlite."""

import json
import shutil
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from small import DMAT, settings

from dmat_ray.cluster import jobs, tracking
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import rows_to_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def read_set(output: Path) -> dict[str, list]:
    """All rows of a set, by plain pyarrow, sorted by id."""
    return pq.read_table(output / "on_manifold_set" / "shards").sort_by("id").to_pydict()


def test_set_is_whole_and_opens_in_plain_pyarrow(finished):
    table, listing = read_set(finished.output), list_examples(finished.config.data)
    assert table["id"] == listing.table["id"].to_pylist()
    assert table["label"] == listing.table["label"].to_pylist()
    assert sorted(set(table["split"])) == ["test", "train"]
    manifest = json.loads((finished.output / "on_manifold_set" / "manifest.json").read_text())
    assert manifest["count"] == 80
    assert manifest["splits"] == {"test": 20, "train": 60}
    assert not manifest["lpips_is_perceptual"]
    w = np.array(table["w"], dtype=np.float32)
    assert w.shape == (80, np.prod(manifest["shapes"]["w"]))
    assert np.isfinite(w).all()


def test_set_renders_again_from_w(finished):
    import torch

    from dmat_ray.data.manifold_set import open_set
    from dmat_ray.manifold.generators import load_generator

    data = open_set(finished.output / "on_manifold_set", "test")
    generator = load_generator(finished.config.generator.path)
    x = generator.synthesis(torch.from_numpy(data.w)).numpy() * 255
    assert np.abs(x - data.on_manifold).max() <= 0.51


def test_random_lpips_is_said_so(tmp_path, say, lines):
    config = settings(tmp_path, "--projection.lpips", 1, "--data.source", tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        jobs.project(config, say)
    assert any("not perceptual" in line for line in lines)


def test_second_run_has_nothing_to_do(finished, say, lines):
    before = {p: p.stat().st_mtime_ns for p in finished.output.rglob("*.parquet")}
    jobs.project(finished.config, say)
    options = {"standard": (), "dmat": DMAT}
    jobs.train([settings(finished.output, "--name", m, *options[m], preset=("demo", m)) for m in options], say)
    jobs.evaluate(finished.config, finished.models, say)
    assert sum("nothing to do" in line for line in lines) == 4
    assert before == {p: p.stat().st_mtime_ns for p in finished.output.rglob("*.parquet")}


def evaluation_run(output: Path) -> Run:
    """The one run that an evaluation left in MLflow."""
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, filter_string="tags.`dmat_ray.stage` = 'evaluate'")
    return found


def test_an_evaluation_that_was_killed_after_its_last_row_is_told_and_tracked_to_the_end(finished, say, lines):
    """As such a kill leaves it: no page, and a run without artifacts that has not ended. It stays one run."""
    client, run = MlflowClient(f"sqlite:///{finished.output / 'mlflow.db'}"), evaluation_run(finished.output)
    client.update_run(run.info.run_id, status="RUNNING")
    artifacts = Path(url2pathname(urlparse(run.info.artifact_uri).path))
    names = sorted(path.name for path in artifacts.iterdir())
    shutil.rmtree(artifacts)
    page, folder = finished.output / "report.html", finished.output / "evaluation"
    done = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    content = page.read_text()
    page.unlink()
    jobs.evaluate(finished.config, finished.models, say)
    assert page.read_text() == content
    assert "writing the report" in lines[-1]
    assert not any("batches for" in line for line in lines)
    after = evaluation_run(finished.output)
    assert (after.info.run_id, after.info.status) == (run.info.run_id, "FINISHED")
    assert after.data.metrics == run.data.metrics
    assert sorted(path.name for path in artifacts.iterdir()) == names
    assert {"report.html", "rows.parquet"} <= set(names)
    page.unlink()  # of a run that has ended
    jobs.evaluate(finished.config, finished.models, say)
    assert evaluation_run(finished.output).info.run_id == run.info.run_id
    assert done == {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}


def test_rows_are_one_per_example_and_attack(finished):
    rows = pq.read_table(finished.output / "evaluation" / "rows.parquet")
    names = list(rows_to_run(finished.config.evaluation))
    assert {"clean", "PGD-20 @ 0.05", "OM-PGD-20"} < set(names)
    natural = [n for n in names if not n.startswith("OM-")]
    assert rows.num_rows == 2 * 10 * (len(names) + len(natural))
    keys = list(zip(*(rows[c].to_pylist() for c in ("model", "set", "attack", "id")), strict=True))
    assert len(set(keys)) == len(keys)
    budget = {row.name: getattr(row, "eps", 0.0) for row in finished.config.evaluation.attacks}
    for row in rows.to_pylist():
        assert row["correct"] == (row["prediction"] == row["label"])
        if row["attack"] in ("FGSM", "PGD-20"):
            assert row["linf"] <= budget[row["attack"]] + 1e-6
        if row["attack"] == "PGD-20 L2":
            assert row["l2"] <= budget["PGD-20 L2"] + 1e-4


@pytest.mark.exhaustive
def test_rows_do_not_depend_on_the_number_of_actors(finished, tmp_path, say):
    finished.copy_set(tmp_path)
    one = {"dmat": finished.models["dmat"]}
    results, _ = jobs.evaluate(settings(tmp_path, "--cluster.evaluation_actors", 2), one, say)
    rows = pq.read_table(finished.output / "evaluation" / "rows.parquet").drop_columns(["seconds"])
    expected = rows.filter(pc.equal(rows["model"], "dmat"))
    assert results.rows.num_rows > 100
    assert results.rows.drop_columns(["seconds"]).equals(expected)


def test_mlflow_holds_every_stage(finished):
    config = finished.config
    client = MlflowClient(tracking.tracking_uri(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    runs = {r.data.tags["mlflow.runName"]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"pipeline", "project", "train: standard", "train: dmat", "evaluate"}
    assert all(r.info.status == "FINISHED" for r in runs.values())
    parent = runs["pipeline"].info.run_id
    assert all(r.data.tags["mlflow.parentRunId"] == parent for n, r in runs.items() if n != "pipeline")
    dmat = runs["train: dmat"]
    assert dmat.data.params["objective.image.weight"] == "0.5"
    assert float(dmat.data.params["objective.image.eps"]) == config.objective.image.eps
    assert 0 <= dmat.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert dmat.data.metrics["system/system_memory_usage_megabytes"] > 100
    losses = client.get_metric_history(dmat.info.run_id, "train_loss")
    assert [m.step for m in losses] == [1, 2, 3]
    stored = [a.path for a in client.list_artifacts(dmat.info.run_id, "checkpoint")]
    assert sorted(stored) == ["checkpoint/model.safetensors", "checkpoint/run.json"]
    kept = {a.path for a in client.list_artifacts(runs["evaluate"].info.run_id)}
    assert kept == {"report.html", "report.md", "report.csv", "rows.parquet", "checks.json"}
    rows = pq.read_table(Path(config.output) / "evaluation" / "rows.parquet")
    for (model, set_name, attack), accuracy in Results(rows, config.evaluation).accuracies().items():
        assert runs["evaluate"].data.metrics[f"{model}/{set_name}/{attack}"] == pytest.approx(accuracy.value)
