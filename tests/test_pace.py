"""When a training loop looks up, by a clock that the test turns."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dmat_ray import pace
from dmat_ray.local import LocalContext


def test_minutes_between_checkpoints_are_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found, due = pace.Pace(LocalContext(tmp_path), 2.0), []
    for second, saved in ((119, False), (121, True), (200, False), (240, False), (242, False)):
        now[0] = second
        found.looks()
        due.append(found.wants_checkpoint()[0])
        if saved:
            found.saved()
    assert due == [False, True, False, False, True]
