"""The example for clusters, as its reader runs it."""

import runpy
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive, pytest.mark.usefixtures("ray_session")]


@pytest.mark.timeout(1800)
def test_the_platform_engineers_example(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "examples" / "on_a_cluster.py"))
    said = capsys.readouterr().out
    assert set(names["runs"]) == {"pipeline", "project", "train: standard", "train: dmat", "evaluate"}
    assert all(run.info.status == "FINISHED" for run in names["runs"].values())
    assert "dmat: image weight 0.5, loss " in said
    assert "in 4 epochs" in said
    rows = pq.read_table(tmp_path / "runs" / "on_a_cluster" / "evaluation" / "rows.parquet")
    assert rows.equals(names["results"].rows)
    told = names["runs"]["evaluate"].data.metrics
    right = rows.filter((pc.field("attack") == "clean") & (pc.field("model") == "dmat") & (pc.field("set") == "natural"))
    assert told["dmat/natural/clean"] == pytest.approx(sum(right["correct"].to_pylist()) / right.num_rows)
    assert "natural test images" in said
