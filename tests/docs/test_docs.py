"""What the documents say of settings is what the settings are. `python docs/tables.py` writes the tables anew."""

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import pytest

from dmat_ray import build_threat, settings
from dmat_ray.config import AttackRow, Config, Section
from dmat_ray.config.attacks import AdversarialTerm
from dmat_ray.models import trained_settings
from dmat_ray.reports.trials import Trial
from dmat_ray.types import Measured, RunContext

ROOT = Path(__file__).parents[2]
WRITER = runpy.run_path(str(ROOT / "docs" / "tables.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = ROOT / "docs" / "configuration.md"


@pytest.mark.parametrize(("document", "name"), [(d, name) for d, tables in WRITER["TABLES"].items() for name in tables])
def test_tables_are_what_the_settings_say(document: str, name: str) -> None:
    between = WRITER["parts"]((ROOT / "docs" / document).read_text(encoding="utf-8"), name)[1]
    assert between == WRITER["TABLES"][document][name](), "python docs/tables.py"


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting under a section, by its dotted name."""
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from fields(inner, f"{prefix}{name}.")
        elif name != "threat":
            yield f"{prefix}{name}", info


def test_every_setting_has_a_row_with_its_default() -> None:
    rows = re.findall(r"^\| `(?:--)?([\w.]+)` \| (.+?) \| (.*?) \| .+ \|$", SETTINGS.read_text(encoding="utf-8"), re.MULTILINE)
    found = {name: (taken, default) for name, taken, default in rows}
    assert {name for name, _ in fields(Config)} <= found.keys()
    # by hand
    assert found["training.epochs"] == ("whole number, 1 or more", "`20`")
    assert found["objective.image.eps"] == ("number or fraction, 0 or more", "`4/255`")
    assert found["data.channels"] == ("`1`, `3`", "`1`")
    assert found["training.lr_values"] == ("list of numbers", "`0,0.4,0.04,0.004,0.0004,0.0001`")
    assert found["training.attack_precision"] == ("`float32`, `bf16`, or `null`", "`null`")
    assert found["evaluation.sets"] == ("list of `on_manifold`, `natural`", "`on_manifold,natural`")
    assert found["data.test_share"] == ("number, above 0, below 1", "`0.2`")


def test_every_setting_is_described() -> None:
    rows = get_args(get_args(AttackRow)[0])
    terms = get_args(get_args(AdversarialTerm)[0])
    for section in (Config, *rows, *terms):
        for name, info in fields(section):
            assert len(str(info.description or "").split()) >= 2, f"{section.__name__}.{name}"
            if get_origin(info.annotation) is not dict and type(None) in get_args(info.annotation):
                assert "null = " in info.description or "null: " in info.description, (
                    f"{section.__name__}.{name}: what null means"
                )


def test_variables_of_the_environment_are_ones_that_are_read() -> None:
    """By our code, or by that of the packages that they belong to."""
    table = SETTINGS.read_text(encoding="utf-8").split("## Environment")[1].split("<!--")[0]
    named = re.findall(r"`([A-Z_0-9]+)`", table)
    ours = "".join(path.read_text() for path in (ROOT / "dmat_ray").rglob("*.py"))
    theirs = ("AWS_", "GOOGLE_", "RAY_AUTH_")
    assert [name for name in named if name not in ours and not name.startswith(theirs) and name != "TMPDIR"] == []
    assert {"DMAT_RAY_TRACEBACK", "AWS_ENDPOINT_URL", "TORCH_HOME"} <= set(named)
    assert "tempfile" in (ROOT / "dmat_ray" / "storage" / "folders.py").read_text()


def test_the_writer_runs_as_a_script(tmp_path: Path) -> None:
    """From any folder; it changes nothing where nothing has changed."""
    before = SETTINGS.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py")], cwd=tmp_path, check=True, env=environment)
    assert SETTINGS.read_bytes() == before


def names_in(document: str, pattern: str) -> set[str]:
    """What stands between backticks in the part of a document that a pattern's only group takes, wherever lines break."""
    (found,) = re.findall(pattern.replace(" ", r"\s"), (ROOT / "docs" / document).read_text(encoding="utf-8"), re.DOTALL)
    return set(re.findall(r"`(.+?)`", found))


def test_threats_that_some_methods_do_not_search_are_named() -> None:
    refused = set()
    for name in (row.model_fields["threat"].default for row in get_args(get_args(AttackRow)[0])):
        if name not in ("clean", "corruption", "autoattack"):
            generator = "mnist32" if name in ("latent", "joint") else None
            more = {"weights": "random"} if name == "perceptual" else {}
            refused |= set() if isinstance(build_threat(name, generator=generator, **more), Measured) else {name}
    assert names_in("guide.md", "Neither works for (.+?)\\.") == refused


def test_jobs_that_are_runs_in_mlflow_are_named() -> None:
    text = {path.name: path.read_text() for path in (ROOT / "jobs").glob("*.py")}
    tracked = {name for name, code in text.items() if re.search(r"prepare_environment\(config(?!.*tracked=False)", code)}
    assert names_in("guide.md", "## Tracking\n\n(.+?) are runs in MLflow") == tracked


def test_settings_with_which_a_training_goes_on_are_named() -> None:
    """All but the name, under which its checkpoints are found."""
    may_differ = names_in("training.md", "do not change what is trained may differ: (.+?): a training takes")
    assert may_differ == {*trained_settings.HARMLESS} - {"name"}


def test_packages_are_those_of_the_project() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Dependencies, and what each is for\n")[1]
    table, for_tests = page.split("For tests only: ")
    rows = re.findall(r"^\| ([\w-].*?) \| .+ \|$", table, re.MULTILINE)
    named = {name for row in rows[1:] if "(extra" not in row for name in re.sub(r"\[.*\]", "", row).split(", ")}
    needed = {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]}
    assert named == needed
    listed = re.sub(r"\(.*?\)", "", for_tests.split(". ")[0], flags=re.DOTALL)
    assert not needed & set(re.findall(r"[\w-]+", listed))


@pytest.mark.slow
def test_what_a_server_needs_beyond_this_package_is_named() -> None:
    """Its artifacts lie at s3:// in the command there, which MLflow reaches by boto3."""
    from mlflow.store.artifact import s3_artifact_repo

    needed = names_in("search.md", "for artifacts at `s3://` also (.+?), which this package does not install")
    assert {name for name in needed if f"import {name}\n" in inspect.getsource(s3_artifact_repo)} == needed != set()
    assert not needed & {re.split(r"\W", line)[0] for line in PROJECT["dependencies"]}


@pytest.mark.slow
def test_models_that_a_search_trains_anew_are_listed() -> None:
    from dmat_ray.cluster import champion

    config = settings("demo", "dmat", tune={"confirm_seeds": 1})
    search = SimpleNamespace(config=config, base=config.to_json(), folder=Path("NAME"), space=SimpleNamespace(constants={}))
    made = champion.anew(search, Trial("NAME_001", "finished", {}, 1, 0.0, {}))
    rows = re.findall(r"^\| `models/(\S+?)` \|", (ROOT / "docs" / "search.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {re.sub(r"\d$", "K", name) for kind in made.values() for name in kind} <= set(rows)


@pytest.mark.slow
def test_how_often_a_store_is_asked_again_is_what_is_done() -> None:
    from dmat_ray.cluster import context, pools

    page = " ".join((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split())
    often = {2: "twice", 3: "three times"}

    def told(pauses: tuple[float, ...]) -> str:
        *first, last = (f"{pause:.0f}" for pause in pauses)
        return f"{often[len(pauses)]} more, after {', '.join(first)} and {last} seconds"

    assert f"A checkpoint that the store does not take is tried {told(context.UPLOAD_PAUSES_S)}. " in page
    assert f"when it starts, and the store does not give, is asked for {told(pools.START_PAUSES_S)}." in page


@pytest.mark.exhaustive
def test_the_hours_of_mixed10_are_those_that_are_counted() -> None:
    command = [sys.executable, "benchmarks/mixed10_hours.py", "--tflops", "60"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.strip() in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_plans_are_those_of_the_measured_rates() -> None:
    told = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--price", "3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rates = {row["stage"]: row for row in json.loads((ROOT / "benchmarks" / "rates_h100.json").read_text())["rows"]}
    days = 1_300_000 / rates["project paper, fast"]["images_per_second"] / 86_400
    assert f"| 1,300,000 | projection, preset `paper` (1,000 steps) | {days:.0f} d |" in told.stdout


def test_every_place_where_a_training_loop_runs_is_named() -> None:
    """Classes that have all methods of RunContext, wherever they are."""
    methods = {name for name in vars(RunContext) if not name.startswith("_")}
    found = set()
    for path in sorted((ROOT / "dmat_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and methods <= {
                part.name for part in node.body if isinstance(part, ast.FunctionDef)
            }:
                found.add(".".join([*path.relative_to(ROOT / "dmat_ray").with_suffix("").parts, node.name]))
    assert "types.RunContext" in found
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"knows a `RunContext` and no more.+?are the three there are\.", text, re.DOTALL)
    assert set(re.findall(r"`([a-z_.]+\.\w+Context)`", told)) == found - {"types.RunContext"}
