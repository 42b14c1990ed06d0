"""Evaluation on a real Ray: killed and taken up again, extended, damaged, transferred, by groups."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from galleries import gallery_here
from small import settings, start_job, wait_for

from dmat_ray.cluster import evaluate as stage
from dmat_ray.cluster import jobs
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluated, evaluation
from dmat_ray.evaluation.units import Unit
from dmat_ray.reports import report
from dmat_ray.storage import at, files
from dmat_ray.storage.lease import FILE, exclusive

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session", "impatient")]

ATTACKS = """
evaluation:
  suites: []
  check_examples: 10
  attacks:
    - {threat: clean, name: clean}
    - {threat: image, name: PGD, eps: 0.1, steps: 8, curve: [0.02, 0.3]}
    - {threat: latent, name: OM-PGD, eps: 0.06, steps: 4}
    - {threat: image, name: CE, eps: 0.05, steps: 5, method: apgd, group: APGD}
    - {threat: image, name: DLR, eps: 0.05, steps: 5, method: apgd, loss: dlr, group: APGD}
  summaries:
    - {name: worst, of: [PGD, APGD]}
  transfer: [PGD]
"""
BATCHES = ["--evaluation.batch_size", "5", "--evaluation.check_examples", "5"]  # two of each attack
MORE = ATTACKS.replace("  summaries:", "    - {threat: fog, name: fog, eps: 0.2, steps: 2}\n  summaries:")


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """The attacks as a user's settings file."""
    path = tmp_path_factory.mktemp("suite") / "attacks.yaml"
    path.write_text(ATTACKS)
    return path


def units(output: Path) -> dict[str, int]:
    """The files of finished units, and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in (output / "evaluation" / "units").glob("[!.]*")}


def without_time(rows: pa.Table) -> list[dict[str, Any]]:
    return rows.drop_columns(["seconds"]).to_pylist()


@pytest.fixture(scope="module")
def undisturbed(finished, impatient, suite, tmp_path_factory):
    """The suite's rows, its findings, and the folder."""
    output = tmp_path_factory.mktemp("undisturbed")
    finished.copy_set(output)
    lines: list[str] = []
    results, findings = jobs.evaluate(settings(output, *BATCHES, preset=("demo", str(suite))), finished.models, lines.append)
    return output, results, findings, lines


def test_rows_and_columns_are_whole(finished, undisturbed):
    output, results, findings, lines = undisturbed
    rows = pq.read_table(output / "evaluation" / "rows.parquet").to_pylist()
    keys = [(r["model"], r["source"], r["set"], r["attack"], r["id"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert {r["attack"] for r in rows if r["set"] == "natural"} == {"clean", "PGD", "PGD @ 0.02", "PGD @ 0.3", "CE", "DLR"}
    assert {r["attack"] for r in rows if r["model"] != r["source"]} == {"PGD"}
    assert results.columns("on_manifold") == ["clean", "PGD", "OM-PGD", "APGD", "worst"]
    for model in finished.models:
        right = {
            a: {
                r["id"]
                for r in rows
                if r["model"] == r["source"] == model and r["set"] == "natural" and r["attack"] == a and r["correct"]
            }
            for a in ("clean", "PGD", "CE", "DLR")
        }
        met = {r["id"] for r in rows if r["model"] == model and r["set"] == "natural" and r["attack"] == "DLR"}
        assert met == right["clean"] & right["CE"]
        assert results.accuracy(model, "natural", "worst").value == len(right["PGD"] & right["DLR"]) / 10
    assert all(r["seconds"] > 0 for r in rows)
    measurements, kept = evaluated.read_checks(output / "evaluation")
    assert {m["model"] for m in measurements} == set(finished.models)
    assert kept == findings
    assert any(line.startswith("round 3 of 3") for line in lines)
    assert [line for line in lines if "no w" in line] == ["on natural images, which have no w, there is no OM-PGD"]


def test_a_killed_evaluation_goes_on_where_it_was(finished, suite, undisturbed, tmp_path, say, lines):
    finished.copy_set(tmp_path)
    names = [str(path) for path in finished.models.values()]
    address = ray.get_runtime_context().gcs_address
    options = ("--models", *names, "--preset", "demo", str(suite), "--cluster.address", address, *BATCHES)
    process = start_job("evaluate.py", tmp_path, *options)
    wait_for(lambda: len(units(tmp_path)) >= 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = units(tmp_path)
    results, findings = jobs.evaluate(settings(tmp_path, *BATCHES, preset=("demo", str(suite))), finished.models, say)
    after = units(tmp_path)
    assert len(before) < len(after)
    assert {name: after[name] for name in before} == before
    assert any("batches are there" in line for line in lines)
    _, expected, expected_findings, _ = undisturbed
    assert without_time(results.rows) == without_time(expected.rows)
    assert findings == expected_findings


def test_rows_of_a_model_that_was_replaced_on_the_way_are_not_taken_for_whole(
    finished, undisturbed, suite, tmp_path, monkeypatch, say
):
    folder = at(shutil.copytree(undisturbed[0] / "evaluation", tmp_path / "evaluation"))
    page = at(tmp_path / "report.html")
    page.write_bytes(b"of the rows that are there")
    files_of_it = (page, *(folder / name for name in (evaluated.ROWS, evaluated.CHECKS, evaluated.DONE)))
    kept = {place: place.read_bytes() for place in files_of_it}
    config, place = settings(tmp_path, *BATCHES, preset=("demo", str(suite))), at(undisturbed[0] / "on_manifold_set")
    work = stage.Work(config, place, finished.models, folder)
    monkeypatch.setattr(stage, "fingerprint", lambda *_: {"models": "others"})
    with pytest.raises(UserError, match="a model was replaced while it was evaluated"):
        stage.evaluate(work, say, of_rows=[page])
    assert {place: place.read_bytes() for place in kept} == kept, "the earlier evaluation is whole"
    monkeypatch.undo()
    stage.evaluate(work, say, of_rows=[page])
    assert not page.is_file(), "a page that is of other rows must not pass for one of these"


def test_an_evaluation_that_was_taken_over_publishes_nothing(finished, undisturbed, suite, tmp_path, say):
    folder = at(shutil.copytree(undisturbed[0] / "evaluation", tmp_path / "evaluation"))
    (folder / evaluated.ROWS).write_bytes(b"the successor's")
    config, place = settings(tmp_path, *BATCHES, preset=("demo", str(suite))), at(undisturbed[0] / "on_manifold_set")
    work = stage.Work(config, place, finished.models, folder)
    with exclusive(folder, 0.05) as lease:
        mine = (folder / FILE).read_json()
        (folder / FILE).write_json({**mine, "owner": "the successor"})
        time.sleep(1)
        with pytest.raises(UserError, match="another run has taken over"):
            stage.evaluate(work, say, lease)
    assert (folder / evaluated.ROWS).read_bytes() == b"the successor's"


def test_a_finished_evaluation_is_known_whether_or_not_it_says_which_images_it_leaves_out(finished, undisturbed, suite, tmp_path):
    folder, place = at(undisturbed[0] / "evaluation"), at(undisturbed[0] / "on_manifold_set")
    made_for = stage.fingerprint(settings(tmp_path, *BATCHES, preset=("demo", str(suite))), place, finished.models)
    done = (folder / evaluated.DONE).read_json()
    assert evaluated.is_evaluated(made_for, folder)
    assert done.pop("left_out") == ""
    (at(tmp_path) / evaluated.DONE).write_json(done)
    assert evaluated.is_evaluated(made_for, at(tmp_path))


def test_images_of_the_report_are_made_by_workers(finished, undisturbed, suite, tmp_path, say, lines, monkeypatch):
    """And are those that one process makes; also where the rows are there and they are not."""
    output = shutil.copytree(undisturbed[0], tmp_path / "out")
    config, page = settings(output, *BATCHES, preset=("demo", str(suite))), output / "report.html"
    checked, found = evaluated.read_checks(output / "evaluation"), undisturbed[1]
    shown = gallery_here(config, output / "on_manifold_set", finished.models)
    report.write(config, output / "on_manifold_set", finished.models, found, checked, tmp_path / "here.html", shown)
    images = {place: re.findall(r'src="(data:image/png[^"]+)"', place.read_text()) for place in (page, tmp_path / "here.html")}
    assert images[page] == images[tmp_path / "here.html"]
    classes = min(8, len(set(found.rows["label"].to_pylist())))
    assert len(images[page]) == 2 * classes * (2 + 3 * 2)  # of models, test sets, and attacks with what they change

    page.unlink()
    drawn = [file for file in (output / "evaluation" / "units").glob("*.json") if "images" in json.loads(file.read_text())]
    assert len(drawn) == 2 * (2 + 3)
    for file in drawn:
        file.unlink()

    def never(*_: Any) -> None:
        raise AssertionError("attacked by the driver")

    monkeypatch.setattr(evaluation.Evaluator, "attacked", never)
    jobs.evaluate(config, finished.models, say)
    assert any(line.startswith("images of the report: 10/10 batches") for line in lines)
    assert re.findall(r'src="(data:image/png[^"]+)"', page.read_text()) == images[tmp_path / "here.html"]


def test_files_that_a_shared_disk_shows_late_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "VISIBLE_S", 4.0)
    work = object.__new__(stage.Work)
    work.files, work.name = at(tmp_path), lambda unit: f"{unit.attack}.json"
    done = [Unit("model", "natural", name, (0,), checks=True) for name in ("early", "late")]

    def write(unit: Unit) -> None:
        (tmp_path / work.name(unit)).write_text(json.dumps({"of": unit.attack}))

    write(done[0])
    late = threading.Timer(1.5, write, [done[1]])
    late.start()
    assert work.all_of(done, work.values) == [{"of": "early"}, {"of": "late"}]
    late.join()
    with pytest.raises(UserError, match=r"1 files that were written cannot be seen in '.*': output must be a folder that all"):
        work.all_of([*done, Unit("model", "natural", "never", (0,), checks=True)], work.values)


def test_only_what_is_new_or_damaged_runs(finished, undisturbed, tmp_path, say, lines):
    output, expected, _, _ = undisturbed
    before = units(output)
    damaged = sorted(name for name in before if name.endswith(".parquet"))[0]
    path = output / "evaluation" / "units" / damaged
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "more.yaml").write_text(MORE)
    results, _ = jobs.evaluate(settings(output, *BATCHES, preset=("demo", str(tmp_path / "more.yaml"))), finished.models, say)
    after = units(output)
    again = {name for name in before if after[name] != before[name]}
    assert again == {damaged}
    fog = 2 * 2 * 2  # models, sets, batches
    assert len(after) == len(before) + fog + 2 + 2  # and what is measured and drawn of it on both models
    old = [row for row in without_time(results.rows) if row["attack"] != "fog"]
    assert old == without_time(expected.rows)
