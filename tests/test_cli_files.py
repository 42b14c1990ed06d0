"""Settings from files: what a file may say, and what is told of one that is wrong or cannot be read."""

from pathlib import Path
from typing import Any

import pytest
from command_lines import parsed

from dmat_ray import cli
from dmat_ray.config import Config
from dmat_ray.errors import UserError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {epoch: 3}", ["training.epoch", "no such setting"]),
        ("training: {epochs: 0, momentum: 2}", ["training.epochs", "training.momentum"]),
        ("- a list", ["list"]),
        ("training: {epochs: [", ["not valid YAML"]),
        ("name: a\ntraining: {epochs: 3}\ntraining: {seed: 1}", ["mine.yaml', line 3: 'training' is there already, in line 2"]),
        ("training:\n  epochs: 3\n  seed: 1\n  'epochs': 4", ["mine.yaml', line 4: 'epochs' is there already, in line 2"]),
        ("data:\n  classes:\n    yes: [a]\n    on: [b]", ["line 4: 'on' is there already, as 'yes' in line 3", "both as True"]),
        ("training:\n  1: 2\n  1.0: 2", ["line 3: '1.0' is there already, as '1' in line 2"]),
        ("data: {classes: {a: [7],\n  b: [010]}}", ["line 2: 010 is the number 8 in YAML; write 8, or '010'"]),
        ("training: {epochs: 12:30}", ["line 1: 12:30 is the number 750 in YAML; write 750, or '12:30'"]),
        ("data: {seed: 1_0}", ["1_0 is the number 10 in YAML"]),
        ("1: 2", ["mine.yaml': 1 is no section of settings"]),
        ("on: {epochs: 3}", ["mine.yaml': True is no section of settings (YAML reads on and yes as True)"]),
        ('data: {source: ""}', ["data.source: must not be empty (found '')"]),
        ('data: {source: "a\\0b"}', ["data.source: 'a\\x00b' holds a NUL"]),
        ("projection: {seed: 9223372036854775808}", ["projection.seed: must be 9223372036854775807 or less"]),
        ("training: 3", ["training", "3"]),
        ("evaluation: {attacks: [{threat: rain, name: a}]}", ["evaluation.attacks", "rain", "'fog'"]),
    ],
)
def test_wrong_files_are_described(tmp_path: Path, text: str, parts: list[str]) -> None:
    wrong_file(tmp_path, text.encode(), parts, "--preset")


@pytest.mark.parametrize(
    ("option", "content", "parts"),
    [
        ("--preset", "data: {source: Bäume}".encode("latin-1"), ["no UTF-8 text", "at byte 16); save it as UTF-8"]),
        ("--preset", b"name: 2024-13-01", ["not valid YAML: month must be in 1..12"]),
        ("--preset", b"a: " + b"[" * 5000, ["not valid YAML"]),
        ("--preset", b"include: [../folder/mine.yaml]", ["mine.yaml' includes itself"]),
        ("--evaluation.suites", "attacks: [{threat: ä}]".encode("latin-1"), ["no UTF-8 text"]),
        ("--evaluation.suites", b"include: [../folder/mine.yaml]", ["mine.yaml' includes itself"]),
        ("--evaluation.suites", b"attacks: 5", ["attacks is 5; give a list"]),
        ("--evaluation.suites", b"attacks: hello", ["attacks is 'hello'; give a list"]),
        ("--evaluation.suites", b"summaries: {name: a}", ["summaries is {'name': 'a'}; give a list"]),
        ("--evaluation.suites", b"include: [3]", ["include has 3; give names or paths of suites"]),
        ("--evaluation.suites", b"attacks: [{threat: image, name: [a]}]", ["attack '['a']': name: must be a text"]),
    ],
)
def test_files_that_cannot_be_read_are_described(tmp_path: Path, option: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    wrong_file(tmp_path / "folder", content, parts, option)


@pytest.mark.parametrize("training", [None, 3, "fast"])
def test_sections_that_are_none_are_described(training: Any) -> None:
    with pytest.raises(UserError, match=rf"^training: must be a table \(found {training!r}\)$"):
        cli.settings("demo", training=training)


def wrong_file(folder: Path, content: bytes, parts: list[str], option: str) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        parsed(option, str(path))
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "nothing.yaml"
    path.write_text("# only a comment\n")
    assert parsed("--preset", str(path), "--name", "x") == Config(name="x")


def test_numbers_of_files_may_be_grouped_and_of_another_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {max_pixels: 50_000_000, seed: 0x1F, train_limit: +5, classes: {'no': ['007', 10], a: [0]}}")
    data = parsed("--preset", str(path)).data
    assert (data.max_pixels, data.seed, data.train_limit) == (50_000_000, 31, 5)
    assert [(one.name, one.members) for one in data.classes] == [("no", (("007",), ("10",))), ("a", (("0",),))]


def test_mappings_of_files_may_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective:\n  image: &a {<<: {eps: 0.2, steps: 3}, steps: 5}\n  latent: {<<: *a, eps: 0.01}\n")
    objective = parsed("--preset", str(path)).objective
    assert (objective.image.eps, objective.image.steps) == (0.2, 5)
    assert (objective.latent.eps, objective.latent.steps) == (0.01, 5)
