"""What a search goes on from when a kill has cut off a file of Ray Tune's: without a Ray, from files as Tune writes them."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from ray import cloudpickle

from dmat_ray.cluster import tune_state
from dmat_ray.errors import UserError

pytestmark = pytest.mark.slow
FILES = {
    "tuner.pkl": cloudpickle.dumps({"a": 1}),
    "experiment_state-2026-01-01_00-00-00.json": json.dumps({"trial_data": []}).encode(),
    "search_gen_state-2026-01-01_00-00-00.json": cloudpickle.dumps({"b": 2}),
    "searcher-state-2026-01-01_00-00-00.pkl": cloudpickle.dumps({"c": list(range(1000))}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a search, which has trained something."""
    state = tmp_path / "ray_tune"
    state.mkdir()
    for name, content in FILES.items():
        (state / name).write_bytes(content)
    (state / "experiment_state-2025-12-31_00-00-00.json").write_bytes(b"half")  # of the session before: nobody reads it
    # what Tune's copy of a folder may catch of files that are being written
    (state / "tmp-search_gen_state-2026-01-01_00-00-00.json").write_bytes(b"half")
    (state / ".1234-tmp-searcher-state-2026-01-01_00-00-00.pkl").write_bytes(b"half")
    (tmp_path / "trials" / "x_000" / "line_00" / "checkpoint_000000").mkdir(parents=True)
    (tmp_path / ".0123456789abcdef.partial").write_bytes(b"half of a copy")
    return tmp_path


def copy_of(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "ray_tune.zip", "w") as archive:
        for name in FILES:
            archive.write(folder / "ray_tune" / name, name)
    return folder / "ray_tune.zip"


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "ray_tune" / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", ["", *FILES])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_was_cut_off_is_that_of_the_copy(folder: Path, name: str, share: float) -> None:
    said: list[str] = []
    assert tune_state.goes_on(folder, said.append), "an older search, which has none"
    copy_of(folder)
    if name:
        os.truncate(folder / "ray_tune" / name, round(share * len(FILES[name])))
    assert tune_state.goes_on(folder, said.append)
    assert content(folder) == FILES
    assert [line.split(" is damaged (")[0] for line in said] == ([f"'{folder / 'ray_tune' / name}'"] if name else [])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_made_whole_is_told_in_a_line_that_says_what_to_do(folder: Path, name: str) -> None:
    os.truncate(folder / "ray_tune" / name, 1)
    told = rf"^the search in '{folder}' cannot go on: '.*{name}' is damaged \(.+\); give it another name by --tune\.name, or"
    for copied in (False, True):
        if copied:
            copy_of(folder)  # of what is damaged
        with pytest.raises(UserError, match=told) as raised:
            tune_state.goes_on(folder, print)
        assert "\n" not in str(raised.value)


def test_a_search_that_has_trained_nothing_begins(folder: Path) -> None:
    """Killed in its first second, or before Tune had written anything."""
    (folder / "trials" / "x_000" / "line_00" / "checkpoint_000000").rmdir()
    assert tune_state.goes_on(folder, print)
    os.truncate(folder / "ray_tune" / "experiment_state-2026-01-01_00-00-00.json", 0)
    assert not tune_state.goes_on(folder, print)
    (folder / "ray_tune" / "experiment_state-2026-01-01_00-00-00.json").unlink()
    assert not tune_state.goes_on(folder, print)
