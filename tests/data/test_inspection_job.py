"""The job that inspects a set: what it prints, and its exit code."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from damaged_sets import manifest_of, with_value
from set_pages import Page
from set_rows import MakeSet

from dmat_ray.data.inspection import CHECKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "inspect_set.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def job_here(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same in this process, which is sooner ready."""
    monkeypatch.setattr(sys, "argv", ["inspect_set.py", *arguments])
    code: Any = 0
    try:
        runpy.run_path(str(ROOT / "jobs" / "inspect_set.py"), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)


def refused(*arguments: str, **here: Any) -> str:
    """What the job prints where it inspects nothing."""
    done = job_here(*arguments, **here)
    assert (done.returncode, done.stdout) == (2, "")
    return str(done.stderr)


def test_job_says_what_it_found_by_its_exit_code(
    make_set: MakeSet, generator_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_set()
    base = ["--output", str(folder.parent), "--generator.path", str(generator_folder)]
    done = job(*base)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-3]] == [["ok", name] for name in CHECKS]
    usable = manifest_of(folder)["usable"]
    assert done.stdout.splitlines()[-2:] == [
        f"{sum(usable.values())} of 36 images are usable, the others poor", "the set is sound"
    ]  # fmt: skip
    here: Any = {"capsys": capsys, "monkeypatch": monkeypatch}
    done = job_here(*base, "--no-render", "--page", str(folder / "afile" / "p.html"), **here)
    assert done.stdout.splitlines()[-1] == "the set is sound, as far as it was checked"
    assert Page((folder.parent / "inspection.html").read_text()).tables
    with_value("label", 7)(folder)
    elsewhere = ["--manifold_set", str(folder), "--output", str(folder.parent), "--page", str(folder.parent / "p.html")]
    done = job_here(*elsewhere, "--no-render", **here)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^ +- part-000001.parquet: label of 'example-\d+' is 7$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^not made +rendering", done.stdout, flags=re.MULTILINE)
    assert (folder.parent / "p.html").is_file()
    assert "there is no on-manifold set at" in refused(*base[2:], "--output", str(folder / "absent"), **here)
    told = refused("--manifold_set", str(folder.parent), "--output", str(folder / "absent"), **here)
    assert f"holds no on-manifold set; give --manifold_set {folder}" in told
    assert not (folder / "absent").exists()
    assert "'-1' is not a number of images" in refused(*base, "--samples", "-1", **here)
