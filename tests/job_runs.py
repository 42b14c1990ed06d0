"""A job run in this process, as its command line would."""

import runpy
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parent.parent / "jobs"


def run_job(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Its exit status."""
    monkeypatch.setattr(sys, "argv", [str(JOBS / name), *map(str, arguments)])
    try:
        runpy.run_path(str(JOBS / name), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
