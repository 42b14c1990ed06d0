"""`make results` in small: benchmarks/results.sh from nothing to the page, README's table and the released models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dmat_ray.models import checkpoint
from dmat_ray.storage import at

ROOT = Path(__file__).parents[2]
SMALLER = {
    "data": {"train_limit": 60, "test_limit": 20},
    "projection": {"steps": 3, "lpips": 0, "poor_l1": 1, "candidates": 100, "shard_size": 40},
    "gan": {"kimg": 0.5},
    # as many knots as the methods' own
    "training": {"epochs": 1, "lr_epochs": [0, 0.2, 0.6, 1]},
    "evaluation": {"limit": 4},
}
PARTS = ("benchmarks", "dmat_ray", "docs", "jobs", "README.md", "pyproject.toml")


def results(root: Path, smaller: Path) -> str:
    """What the script prints, run on a copy of the project with one training of each method."""
    environment = {**os.environ, "PYTHON": sys.executable, "SEEDS": "1", "PYTHONPATH": str(root)}
    script = [str(root / "benchmarks" / "results.sh"), str(smaller)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def shares(rows: Path, attack: str, images: int) -> dict[str, float]:
    """Of a file of rows, the share of on-manifold images that each method's model is right on."""
    right: dict[str, list[bool]] = {}
    for row in pq.read_table(rows).to_pylist():
        if (row["set"], row["attack"]) == ("on_manifold", attack):
            right.setdefault(row["model"].removesuffix("-0"), []).append(row["correct"])
    assert {len(every) for every in right.values()} == {images}
    return {name: float(np.mean(every)) for name, every in right.items()}


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_the_study_is_made_from_nothing_and_once(tmp_path: Path) -> None:
    root, smaller = tmp_path / "project", tmp_path / "smaller.yaml"
    for part in PARTS:
        source = ROOT / part
        shutil.copytree(source, root / part) if source.is_dir() else shutil.copy(source, root / part)
    packed, page = root / "benchmarks" / "results" / "mnist", root / "docs" / "results" / "mnist.md"
    shutil.rmtree(packed)
    page.unlink()
    smaller.write_text(yaml.safe_dump(SMALLER))
    said = results(root, smaller)
    trained = re.findall(r"(\w+-0): trained in", said)
    assert len(trained) == len(set(trained)) > 20

    right = {
        "clean": shares(packed / "clean" / "all.parquet", "clean", 20),
        "PGD-50": shares(packed / "rows" / "all.parquet", "PGD-50", 4),
    }
    assert len(set(right["clean"].values())) > 1
    for text in (page.read_text(), (root / "README.md").read_text().split("<!-- study: begin -->")[1]):
        lines = text[text.index("| method | models |") :].split("\n\n")[0].splitlines()
        head, _, *table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
        assert len(table) == 13
        for column, of_models in right.items():
            shown = {cells[0]: float(cells[head.index(column)].split(" ")[0]) for cells in table}
            assert shown == {name: pytest.approx(100 * of_models[name], abs=0.05) for name in shown}
    released = {path.parent.name for path in (root / "models" / "mnist").glob("*/config.json")}
    assert released == {"standard", "at_eps_20", "dmat_eps_20"}
    for name in released:
        run = checkpoint.read_run(at(root / "runs" / "study" / "mnist" / "models" / f"{name}-0"))
        assert json.loads((root / "models" / "mnist" / name / "config.json").read_text())["class_names"] == run["class_names"]

    before = page.read_text(), (packed / "rows" / "all.parquet").read_bytes()
    again = results(root, smaller)
    assert ": trained in" not in again
    assert ": evaluated in" not in again
    assert (page.read_text(), (packed / "rows" / "all.parquet").read_bytes()) == before
