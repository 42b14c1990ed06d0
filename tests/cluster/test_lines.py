"""The folders of a trial that population based training moves from one trial's weights to another's. Needs no session."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dmat_ray.cluster.trial import _Line, line_folders

pytestmark = pytest.mark.cluster


def test_the_newest_of_very_many_lines_is_the_newest(tmp_path: Path) -> None:
    """A population that is disturbed often has trials with more than a hundred."""
    config = SimpleNamespace(name="one", training=SimpleNamespace(epochs=2))
    work = SimpleNamespace(objectives=[], trial_folder=lambda name: tmp_path / name)
    other = {"trial": "two", "folder": str(tmp_path / "two" / "line_00" / "checkpoint_000000"), "epoch": 1}
    made = [_Line(work, config, None).folder, *(_Line(work, config, other).folder for _ in range(101))]
    assert len(set(made)) == 102
    assert line_folders(tmp_path / "one") == made[::-1]
    assert _Line(work, config, None).folder == made[-1]
    own = {"trial": "one", "folder": str(made[98] / "checkpoint_000000"), "epoch": 1}
    assert _Line(work, config, own).folder == made[98]
    assert line_folders(tmp_path / "one") == made[98::-1], "what came after it is gone, what came before is there"
