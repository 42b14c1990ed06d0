"""What a job prints: help, usage, and one line for an error that the user can mend."""

import argparse

import pytest
from command_lines import parsed

from dmat_ray import cli, presets
from dmat_ray.config import Config
from dmat_ray.errors import UserError


def test_help_lists_every_section_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith("usage:")
    assert "A job." in text
    missing = [name for name in Config.model_fields if f"--{name}" not in text and f"{name}" not in text.split()]
    assert missing == []
    deep = ["--objective.image.eps", "--objective.latent.scale", "--gan.architecture.w_dim", "--cluster.train_workers"]
    assert [option for option in [*deep, *presets.names()] if option not in text] == []
    assert "(default: none)" in " ".join(text.split())
    with pytest.raises(SystemExit):
        cli.parse("A job.", ["--help"], preset=["demo"])
    assert "(default: demo, whose values take the place of the defaults below)" in " ".join(capsys.readouterr().out.split())


def test_usage_shows_what_a_job_needs(capsys: pytest.CaptureFixture[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", required=True, metavar="NAME")
        parser.add_argument("--images", required=True, metavar="FOLDER")
        parser.add_argument("--to", metavar="FILE")
        parser.add_argument("study")

    with pytest.raises(SystemExit):
        cli.parse("A job.", ["--help"], add=add)
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.endswith(" --models NAME --images FOLDER study [--preset NAME ...] [--SECTION.FIELD VALUE ...]")


@pytest.mark.parametrize("line", [line for line in cli.EPILOG.splitlines() if " --" in line])
def test_examples_of_help_may_be_copied(line: str) -> None:
    """And leave the learning rate its whole schedule."""
    training = parsed("--preset", "demo", *line.partition(": ")[2].split()).training
    assert training.lr_epochs[-1] == training.epochs


def test_run_prints_one_line_for_what_the_user_can_fix(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        cli.parse("A job.", ["--training.epochs", "0"])

    with pytest.raises(SystemExit) as stopped:
        cli.run(job)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: training.epochs")
    assert captured.err.count("\n") == 1


def test_run_keeps_the_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> None:
        raise UserError("wrong")

    monkeypatch.setenv("DMAT_RAY_TRACEBACK", "1")
    with pytest.raises(UserError, match="wrong"):
        cli.run(job)


def test_run_does_not_hide_other_errors() -> None:
    def job() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        cli.run(job)


def test_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(job)
    assert stopped.value.code == 130
    assert "give the same command again" in capsys.readouterr().err


def test_error_in_a_worker_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class WorkerGroupError(RuntimeError):
        """As Ray Train brings errors back: a mapping of rank to exception, each with its cause."""

        def __init__(self) -> None:
            super().__init__("training failed")
            failed = RuntimeError("task failed")
            failed.cause = UserError("the loss is nan")
            self.worker_failures = {0: failed}

    def main() -> None:
        raise RuntimeError("outer") from WorkerGroupError()

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the loss is nan\n"
