"""What a search goes on from when a kill has cut off a file of Ray Tune's: without a Ray, from files as Tune writes them."""

import json
import os
import resource
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ray import cloudpickle
from ray.tune.experiment.trial import Trial as TuneTrial

from dmat_ray.cluster import tune_state
from dmat_ray.errors import UserError

pytestmark = pytest.mark.slow
FILES = {
    "tuner.pkl": cloudpickle.dumps({"a": 1}),
    "experiment_state-2026-01-01_00-00-00.json": json.dumps({"trial_data": []}).encode(),
    "search_gen_state-2026-01-01_00-00-00.json": cloudpickle.dumps({"b": 2}),
    "searcher-state-2026-01-01_00-00-00.pkl": cloudpickle.dumps({"c": list(range(1000))}),
}

NEXT = "experiment_state-2026-01-02_00-00-00.json"


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


@pytest.mark.parametrize("later", [(NEXT,), (NEXT, NEXT.replace("02_", "03_"), "search_gen_state-2026-01-02_00-00-00.json")])
@pytest.mark.parametrize("with_tuner", [True, False])
def test_a_session_that_was_cut_off_before_its_first_copy_is_as_if_it_had_not_been(
    folder: Path, later: tuple[str, ...], with_tuner: bool
) -> None:
    """On a full disk: its own file is empty, and Tune's copy of the others ends where it found no more space."""
    file = copy_of(folder)
    if not with_tuner:  # a copy of before it was in there
        with zipfile.ZipFile(file, "w") as archive:
            for name in [name for name in FILES if name != "tuner.pkl"]:
                archive.write(folder / "ray_tune" / name, name)
    for name in FILES if with_tuner else [name for name in FILES if name != "tuner.pkl"]:
        os.truncate(folder / "ray_tune" / name, 5)
    for name in later:
        (folder / "ray_tune" / name).touch()
    said: list[str] = []
    assert tune_state.goes_on(folder, said.append)
    assert content(folder) == FILES
    assert not any((folder / "ray_tune" / name).exists() for name in later)
    assert len(said) == 1
    assert tune_state.goes_on(folder, said.append)
    assert len(said) == 1


def test_a_later_session_that_is_whole_stays_whatever_was_cut_off_of_others(folder: Path) -> None:
    copy_of(folder)
    (folder / "ray_tune" / NEXT).write_bytes(json.dumps({"trial_data": [1]}).encode())
    os.truncate(folder / "ray_tune" / "tuner.pkl", 5)
    assert tune_state.goes_on(folder, print)
    assert content(folder) == FILES
    assert json.loads((folder / "ray_tune" / NEXT).read_bytes()) == {"trial_data": [1]}


def renewed(folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(folder / "ray_tune.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def trials(folder: Path) -> list[TuneTrial]:
    """One, of which Tune writes its files into a folder of the driver's machine: all but the tuner's."""
    here = folder / "of the driver"
    here.mkdir()
    for name in FILES:
        if name != "tuner.pkl":
            (here / name).write_bytes(FILES[name])
            (folder / "ray_tune" / name).unlink()
    # what a trial with a storage says needs a Ray that runs
    return [cast("TuneTrial", SimpleNamespace(storage=here, local_experiment_path=str(here)))]


def test_a_copy_is_of_the_files_that_tune_writes_and_of_the_tuners(folder: Path, trials: list[TuneTrial]) -> None:
    tune_state.Copies(folder).renew([])
    tune_state.Copies(folder).renew([TuneTrial("stub", stub=True)])
    assert not (folder / "ray_tune.zip").exists()
    tune_state.Copies(folder).renew(trials)
    assert renewed(folder) == FILES
    (Path(trials[0].local_experiment_path) / "tuner.pkl").write_bytes(FILES["tuner.pkl"])  # as in a session that goes on
    os.truncate(folder / "ray_tune" / "tuner.pkl", 5)  # as there Tune writes it again and again
    tune_state.Copies(folder).renew(trials)
    assert renewed(folder) == FILES


def test_a_copy_is_made_anew_once_a_second_if_something_has_changed(
    folder: Path, trials: list[TuneTrial], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(tune_state.time, "monotonic", lambda: now[0])
    copies, copy = tune_state.Copies(folder), folder / "ray_tune.zip"
    state = max(Path(trials[0].local_experiment_path).glob("experiment_state-*"))
    written = state.stat().st_mtime_ns

    def change(text: bytes) -> None:
        nonlocal written
        written += 10**9
        state.write_bytes(text)
        os.utime(state, ns=(written, written))

    change(b"[]")  # later than the others
    copies.renew(trials)
    change(b"[1]")
    now[0] += 0.9
    copies.renew(trials)
    assert renewed(folder)[state.name] == b"[]", "within a second"
    copies.renew(trials, last=True)
    assert renewed(folder)[state.name] == b"[1]"
    copy.unlink()
    now[0] += 1.1
    copies.renew(trials)
    assert not copy.exists(), "nothing has changed"
    change(b"[2]")
    copies.renew(trials)
    assert renewed(folder)[state.name] == b"[2]"


def test_where_a_copy_cannot_be_written_the_one_before_stays_and_it_is_tried_again(folder: Path, trials: list[TuneTrial]) -> None:
    copies = tune_state.Copies(folder)
    copies.renew(trials)
    state = max(Path(trials[0].local_experiment_path).glob("experiment_state-*"))
    state.write_bytes(b"[1]")
    os.utime(state, ns=(time.time_ns() + 10**9,) * 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write of more fails
    try:
        copies.renew(trials, last=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert renewed(folder) == FILES
    copies.renew(trials, last=True)
    assert renewed(folder)[state.name] == b"[1]"


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
