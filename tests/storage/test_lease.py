"""One writer at a time, with real processes that are refused, killed, suspended and set against each other."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmat_ray.errors import UserError
from dmat_ray.storage import at, lease
from dmat_ray.storage.lease import all_sole, exclusive, sole
from dmat_ray.storage.location import Location

pytestmark = pytest.mark.slow

# holds the folder until its input ends; says what happens
HOLDER = """
import sys, time
from dmat_ray.storage import lease
from dmat_ray.storage import at

machine, interval = sys.argv[2], float(sys.argv[3])
if machine:
    lease.machine = lambda: machine
try:
    with lease.exclusive(at(sys.argv[1]), interval) as held:
        print("held", flush=True)
        for line in sys.stdin:
            held.check()
            print("still held", flush=True)
except lease.UserError as error:
    print(f"refused: {error}", flush=True)
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """hold(machine=, interval_s=) starts a process that tries to hold tmp_path; all are killed in the end."""
    started: list[subprocess.Popen[str]] = []

    def start(machine: str = "", interval_s: float = 60.0) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", HOLDER, str(tmp_path), machine, str(interval_s)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def says(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return says(process)


def test_a_second_writer_is_refused_and_told_of_the_first(hold: Hold, tmp_path: Path) -> None:
    first = hold()
    assert says(first) == "held"
    for second in (hold(), hold()):
        answer = says(second)
        assert answer.startswith("refused: ")
        assert f"is being written by process {first.pid} on " in answer
        assert "give another --output" in answer
    assert ask(first) == "still held"
    first.communicate()
    assert list(tmp_path.iterdir()) == []
    assert says(hold()) == "held"


def test_a_killed_writer_is_followed_at_once(hold: Hold) -> None:
    """Its beats are a minute apart: whoever waited for them would run into the test's time limit."""
    first = hold()
    assert says(first) == "held"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert says(hold()) == "held"


def test_a_writer_elsewhere_that_lives_is_seen_by_its_beat(hold: Hold) -> None:
    assert says(hold(machine="elsewhere", interval_s=0.2)) == "held"
    assert "on elsewhere" in says(hold(interval_s=0.2))


def test_a_writer_elsewhere_that_died_is_followed_after_its_silence(hold: Hold) -> None:
    first = hold(machine="elsewhere", interval_s=0.2)
    assert says(first) == "held"
    os.kill(first.pid, signal.SIGKILL)
    assert says(hold(interval_s=0.2)) == "held"


def test_who_asks_after_a_loss_is_told_of_it_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    with exclusive(at(tmp_path), interval_s=0.05) as mine:
        mine.when_lost(lambda: told.append("before"))
        file = tmp_path / "writer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "owner": "another"}))
        end = time.monotonic() + 30
        while not told and time.monotonic() < end:
            time.sleep(0.01)
        mine.when_lost(lambda: told.append("after"))
    assert told == ["before", "after"]


def test_a_suspended_writer_that_was_followed_ends(hold: Hold) -> None:
    first = hold(machine="elsewhere", interval_s=0.2)
    assert says(first) == "held"
    os.kill(first.pid, signal.SIGSTOP)
    second = hold(interval_s=0.2)
    assert says(second) == "held"
    os.kill(first.pid, signal.SIGCONT)
    time.sleep(1)  # its next beat
    assert "another run has taken over" in ask(first)
    assert ask(second) == "still held"
    first.wait()
    assert ask(second) == "still held", "the first must not have removed the second's file"


@pytest.mark.parametrize("dead", [False, True], ids=["empty folder", "after a killed writer"])
def test_of_many_at_once_one_goes_on(hold: Hold, dead: bool) -> None:
    if dead:
        process = hold()
        assert says(process) == "held"
        process.kill()
        process.wait()
    answers = [says(process) for process in [hold(interval_s=0.2) for _ in range(4)]]
    assert sorted(a.split(":")[0] for a in answers) == ["held", "refused", "refused", "refused"]


def test_within_one_process(tmp_path: Path) -> None:
    folder = at(tmp_path)
    with exclusive(folder) as lease:
        with pytest.raises(UserError, match="is being written by process"), exclusive(folder):
            pass
        lease.check()
    with pytest.raises(KeyError), exclusive(folder):
        raise KeyError
    with exclusive(folder):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [json.dumps(["mine"]), "", '{"owner": 1', "[" * 100_000])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "writer.json").write_text(content)
    with pytest.raises(UserError, match="is not what a run writes there; remove it if no run"), exclusive(at(tmp_path)):
        pass
    assert (tmp_path / "writer.json").read_text() == content


def test_a_folder_whose_lease_lies_beside_it_may_be_removed(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with sole(folder) as held:
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="is being written by process"), sole(folder):
            pass
        held.check()
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_what_was_made_for_a_lease_alone_goes_with_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), sole(tmp_path / "runs" / "one" / "generator"):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with sole(tmp_path / "runs" / "one" / "generator"):
        (tmp_path / "runs" / "one" / "log").touch()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs" / "one", tmp_path / "runs" / "one" / "log"]
    with sole(tmp_path / "runs" / "two" / "generator"):
        pass
    assert (tmp_path / "runs").is_dir(), "which was there before"


def test_several_folders_are_held_together_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "train"
    with all_sole(place, ["a", "b", "c"]) as leases:
        assert len(leases) == 3
        for name in "abc":
            with (
                pytest.raises(UserError, match=rf"\.{name}\.lease' is being written by process {os.getpid()}"),
                sole(place / name),
            ):
                pass
    assert list(tmp_path.iterdir()) == []
    with sole(place / "b"):
        with pytest.raises(UserError, match=r"\.b\.lease' is being written"), all_sole(place, ["a", "b", "c"]):
            pass
        with all_sole(place, ["a", "c"]):
            pass
    assert list(tmp_path.iterdir()) == []


def test_of_several_dead_writers_the_silence_is_waited_for_once(hold: Hold, tmp_path: Path) -> None:
    """Of those that died elsewhere; each is silent for four of its beats before it counts as dead."""
    first = hold(machine="elsewhere", interval_s=0.5)
    assert says(first) == "held"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    names = [f"model{number}" for number in range(6)]
    for name in names:
        (tmp_path / f".{name}.lease").mkdir()
        shutil.copy(tmp_path / "writer.json", tmp_path / f".{name}.lease")
    began = time.monotonic()
    with all_sole(tmp_path, names):
        assert time.monotonic() - began < 3 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["writer.json"]


def test_a_process_that_has_ended_unnoticed_holds_nothing(tmp_path: Path) -> None:
    """Killed, and its parent has not asked for it: a zombie, which the system still lists."""
    folder = at(tmp_path / "work")
    code = "import sys, time; from dmat_ray.storage import at, lease\n"
    code += "with lease.exclusive(at(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with exclusive(folder):
        pass
    process.wait()


@pytest.mark.parametrize("late", [35.0, None], ids=["slow", "dead"])
def test_a_writer_elsewhere_is_dead_after_four_beats_of_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: float | None
) -> None:
    file, now = tmp_path / "writer.json", [0.0]
    held = {"owner": "a", "machine": "elsewhere", "pid": 1, "started": None, "since": "then", "interval_s": 10.0, "beat": 3}
    file.write_text(json.dumps(held))

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if late is not None and now[0] >= late:
            file.write_text(json.dumps({**held, "beat": 4}))

    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    if late is None:
        with exclusive(at(tmp_path), 60.0):
            assert 40 <= now[0] < 45
    else:
        with pytest.raises(UserError, match="is being written by process 1 on elsewhere"), exclusive(at(tmp_path), 60.0):
            pass


def test_a_writer_goes_on_beating_after_its_storage_was_away_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, away = Location.read_bytes, list[int]()

    def failing(self: Location) -> bytes:
        if self.name == lease.FILE and away:
            away.pop()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(self)

    def beat() -> int:
        return int(json.loads((tmp_path / lease.FILE).read_text())["beat"])

    def wait_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        assert condition()

    monkeypatch.setattr(Location, "read_bytes", failing)
    with exclusive(at(tmp_path), 0.02):
        away += [1, 1]
        wait_until(lambda: not away)
        before = beat()
        wait_until(lambda: beat() > before)
