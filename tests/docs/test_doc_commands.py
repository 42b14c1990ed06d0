"""Every command of README.md and docs/*.md is one that there is, with options and values that its own parser takes.

Scripts are run as far as to where they have understood their command line, and no further. Of other people's tools only the
name is known, which OTHERS lists.
"""

import argparse
import functools
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT, Block, blocks, commands, documents, spans
from pydantic import TypeAdapter

from dmat_ray import cli, presets, suites
from dmat_ray.config import AttackRow, Config

pytestmark = pytest.mark.slow

OTHERS = {
    "aws": "copies files to a bucket",
    "docker": "builds the image",
    "echo": "writes a file",
    "export": "sets variables of the shell",
    "git": "fetches the code",
    "kubectl": "speaks to Kubernetes",
    "mlflow": "MLflow's server and pages",
    "pip": "installs packages",
    "ray": "Ray's own commands; what `ray job submit` starts is checked",
    "uv": "installs packages",
}
"""Commands that are not checked beyond being known; files of ours that they name are there."""
MODULES = {
    "mlflow": OTHERS["mlflow"],
    "pytest": "tests that it names are there",
    "torch.distributed.run": "its script is checked",
}
PICTURES = ("accuracy (%)", "images -> Ray Data")
"""How blocks begin that show something and are no commands."""
FOREIGN = {"provider": "Google Cloud's part of a cluster file, which docs/cluster.md says no test holds"}
"""First keys of YAML that is not ours."""
JOBS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "jobs").glob("*.py"))
BENCHMARKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py") if "main()" in path.read_text())
SPOT_WATCH = "deploy/spot_watch.py"
ELSEWHERE = {"shade.yaml": "tests/docs/test_extending.py"}
"""Settings of what the package has not, but for in a test."""
PLACEHOLDER = "--SECTION.NAME"
"""What stands in the text for any option."""
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


class ParsedError(Exception):
    """A script has understood its command line."""

    def __init__(self, config: Config | None) -> None:
        self.config = config


@functools.cache
def script(path: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / path))


class Parsers:
    """Runs scripts until they have parsed their options, and keeps the parser."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.parser, self.inside = monkeypatch, argparse.ArgumentParser(), False
        parse, parse_args = cli.parse, argparse.ArgumentParser.parse_args

        def parsed(*args: Any, **kwargs: Any) -> Any:
            self.inside = True
            found = parse(*args, **kwargs)[0]
            raise ParsedError(found)

        def parsed_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            self.parser = parser
            found = parse_args(parser, *args, **kwargs)
            if self.inside:
                return found
            raise ParsedError(None)

        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        monkeypatch.setattr(cli, "parse", parsed)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_args)

    def __call__(self, path: str, arguments: list[str]) -> Config | None:
        """The settings that a script of ours makes of its command line; None for one that has none."""
        code = 0
        try:
            self._run(path, arguments)
        except ParsedError as found:
            return found.config
        except SystemExit as error:
            code = error.code
        assert "--help" in arguments, f"{path} {' '.join(arguments)} ends with {code}"
        return None

    def _run(self, path: str, arguments: list[str]) -> None:
        self.monkeypatch.setattr("sys.argv", [path, *arguments])
        self.inside = False
        script(path)["main"]()

    def options(self, path: str) -> dict[str, argparse.Action]:
        """A script's options."""
        with pytest.raises((ParsedError, SystemExit)):
            self._run(path, [])
        return {name: action for parser in below(self.parser) for name, action in parser._option_string_actions.items()}


def below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its own commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parsers:
    monkeypatch.chdir(tmp_path)
    return Parsers(monkeypatch)


def check(words: list[str], named: dict[str, Block], parse: Callable[[str, list[str]], Config | None]) -> None:
    """Raise AssertionError for a command that cannot be given as it stands in a document."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:3] == ["ray", "job", "submit"]:
        return check(words[words.index("--") + 1 :], named, parse)
    if words[0] == "make":
        assert {w for w in words[1:] if "=" not in w} <= set(TARGETS), words
        return None
    if words[0] == "python":
        return check_python([word for word in words[1:] if word != "..."], named, parse)
    assert words[0] in OTHERS, f"'{words[0]}' is neither ours nor in OTHERS"
    for word in words[1:]:
        assert not re.match(r"(deploy/|ray_cluster)", word) or (ROOT / word).is_file(), word
    return None


def check_python(words: list[str], named: dict[str, Block], parse: Callable[[str, list[str]], Config | None]) -> None:
    if words[0] == "-m":
        assert words[1] in MODULES, words
        if words[1] == "torch.distributed.run":
            return check_python(words[next(i for i, word in enumerate(words) if word.startswith("jobs/")) :], named, parse)
        for word in words[2:] if words[1] == "pytest" else ():
            assert word.startswith("-") or (ROOT / word.split("::")[0]).exists(), word
        return None
    if words[0] in named:
        return None  # a script of the document's own
    if words[0] not in (*JOBS, *BENCHMARKS, SPOT_WATCH):
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        assert len(words) == 1, "a script without options"
        return None
    config = parse(words[0], [word for word in words[1:] if word not in ELSEWHERE])
    if config is None:
        return None
    for name in config.methods:
        assert name in presets.names(), name
    space = words[words.index("--space") + 1] if "--space" in words else config.tune.space
    assert (ROOT / space).is_file() or space in named, f"there is no space {space}"
    return None


def written(document: Path, folder: Path) -> dict[str, Block]:
    """The files that a document shows, written where its commands look for them."""
    named = {block.name: block for block in blocks(document) if block.name and "/" not in block.name}
    for name, block in named.items():
        (folder / name).write_text(block.text)
    return named


def shell(document: Path) -> list[list[str]]:
    """All commands of a document's blocks. One that begins with dots goes on where the one before it does."""
    found: list[list[str]] = []
    for block in blocks(document, ""):
        if not block.text.startswith(PICTURES):
            for words in commands(block.text):
                found.append([*found[-1], *words[1:]] if words[0] == "..." else words)
    return found


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_commands_are_ones_that_there_are(document: Path, parse: Parsers, tmp_path: Path) -> None:
    named = written(document, tmp_path)
    for words in shell(document):
        if words[0].startswith("--"):
            check_options(words, benchmarks(document), parse)
        else:
            check(words, named, parse)


def benchmarks(document: Path) -> list[str]:
    """The scripts in benchmarks/ that a document's commands run."""
    return sorted({word for words in shell(document) for word in words if word in BENCHMARKS})


def check_options(words: list[str], used: list[str], parse: Parsers) -> None:
    """Options without a command are those of a job, or of a script used beside them; it takes their values, if they have some."""
    given = [word.split("=")[0] for word in words if word.startswith("--") and word != "--"]
    known = {path: options(path) for path in (*JOBS, *used)}
    takers = [path for path, names in known.items() if set(given) <= names.keys()]
    assert takers, f"no script has the options {' '.join(given)}"
    whole = all(
        known[takers[0]][word].nargs == 0 or (i + 1 < len(words) and not words[i + 1].startswith("--"))
        for i, word in enumerate(words)
        if word.startswith("--") and "=" not in word
    )
    alone = [path for path in takers if path in JOBS and not any(action.required for action in known[path].values())]
    if whole and alone and not any(re.fullmatch(r"[A-Z_]+|.*\.yaml", word) for word in words):
        parse(alone[0], words)


@functools.cache
def options(path: str) -> dict[str, argparse.Action]:
    with pytest.MonkeyPatch.context() as patch:
        return Parsers(patch).options(path)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_options_in_the_text_are_ones_that_there_are(document: Path, parse: Parsers, tmp_path: Path) -> None:
    named = written(document, tmp_path)
    for span in spans(document):
        if span.startswith("--") and not span.startswith(PLACEHOLDER):
            (words,) = commands(span)
            check_options(words, benchmarks(document), parse)
        elif re.match(r"(python|make) [\w-]", span):
            (words,) = commands(span)
            check(words, named, parse)
        elif re.match(r"(jobs|benchmarks|tests|deploy|tune_spaces|dmat_ray)/", span):
            path = span.split()[0].split("::")[0]
            assert any(ROOT.glob(path.rstrip("/"))), f"there is no {path}"


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_yaml_is_settings_or_a_suite(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(document, tmp_path)
    for block in blocks(document, "yaml"):
        values = yaml.safe_load(block.text)
        if block.name in ELSEWHERE:
            assert block.name in (ROOT / ELSEWHERE[block.name]).read_text()
        elif isinstance(values, list):
            for row in values:
                TypeAdapter(AttackRow).validate_python(row)
        elif values.keys() & suites.KEYS - {"include"}:
            cli.parse("A job.", ["--preset", "demo", "--evaluation.suites", block.name])
        elif next(iter(values)) not in FOREIGN:
            assert values.keys() <= {*Config.model_fields, "include"}, block.text
            cli.parse("A job.", ["--preset", "demo", block.name])


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_python_is_python(document: Path) -> None:
    for block in blocks(document, "python"):
        compile(block.text, block.name or document.name, "exec")


def test_jobs_that_have_a_dry_run_are_named() -> None:
    section = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split("## What it will cost\n")[1]
    named = re.findall(r"`(\w+\.py)`", section.split("take `--dry-run`")[0])
    assert sorted(f"jobs/{name}" for name in named) == [job for job in JOBS if "--dry-run" in options(job)]


def test_make_clean_leaves_results() -> None:
    command = ["make", "--dry-run", "--no-print-directory", "clean"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    removed = shlex.split(told)[2:]
    assert ".venv" in removed
    assert "runs" not in {path.split("/")[0] for path in removed}


def test_a_wrong_command_is_found(parse: Parsers) -> None:
    for text, message in {
        "make nonsense": "nonsense",
        "python jobs/nonsense.py": "there is no jobs/nonsense.py",
        "python jobs/train.py --training.epoch 3": "ends with 2",
        "ray job submit --working-dir . -- python jobs/tune.py --space tune_spaces/nonsense.py": "there is no space",
        "python benchmarks/plan.py --prices 3": "ends with 2",
        "python -m nonsense": "nonsense",
        "python -m pytest tests/test_nonsense.py": "nonsense",
        "kubectl apply -f deploy/nonsense.yaml": "nonsense",
        "nonsense": "neither ours nor in OTHERS",
    }.items():
        (words,) = commands(text)
        with pytest.raises(AssertionError, match=message):
            check(words, {}, parse)
    with pytest.raises(AssertionError, match="no script has the options --nonsense"):
        check_options(["--nonsense"], [], parse)
    with pytest.raises(ValueError, match="choose from"):
        check(["python", "jobs/train.py", "--preset", "nonsense"], {}, parse)
    with pytest.raises(ValueError, match="l7"):
        check(["python", "jobs/train.py", "--objective.image.norm", "l7"], {}, parse)
