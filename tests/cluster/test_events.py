"""What a driver hears of its workers."""

import os
import signal
import threading
import time

import pytest
import ray

from dmat_ray.cluster import events
from dmat_ray.errors import StorageError, UserError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def comes_true(condition) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def work(mailbox: str) -> None:
    with events.no_retry_of_user_errors(mailbox) as go:
        assert go
        assert comes_true(lambda: ray.get(ray.get_actor(mailbox).hears.remote()))
        raise UserError("wrong")


def listened(told: list) -> None:
    with events.listen(told.append) as mailbox:
        assert not ray.get(ray.get_actor(mailbox).hears.remote()), "nobody has begun"
        before = threading.active_count()
        with pytest.raises(UserError, match="wrong"):
            work(mailbox)
        assert comes_true(lambda: threading.active_count() <= before), "nor any longer"
        with events.no_retry_of_user_errors(mailbox) as go:
            assert not go


def test_a_worker_is_heard_while_it_asks_nothing(monkeypatch):
    """Asked to stop while a worker validates, a job that took it for dead would lose the epoch."""
    monkeypatch.setattr(events, "BEAT_S", 0.05)
    with pytest.raises(UserError, match="wrong"):
        listened([])


def test_what_a_store_does_not_give_is_tried_again():
    """All else that only a user can mend is not: see above."""

    def attempt(mailbox: str) -> None:
        with events.no_retry_of_user_errors(mailbox) as go:
            assert go
            raise StorageError("slow down")

    with events.listen(print) as mailbox:
        for _ in range(2):
            with pytest.raises(StorageError, match="slow down"):
                attempt(mailbox)


def test_that_no_worker_comes_is_told_again_and_again(monkeypatch):
    monkeypatch.setattr(events, "SILENCE_S", 0.2)
    said: list[str] = []
    with events.heed_stop() as asked, events.listen(lambda event: said.append(event["text"]), asked, 0.05) as mailbox:
        assert comes_true(lambda: len(said) >= 2)
        with events.no_retry_of_user_errors(mailbox):
            assert comes_true(lambda: ray.get(ray.get_actor(mailbox).hears.remote()))
            time.sleep(0.1)
            told = len(said)
            time.sleep(0.6)
            assert len(said) == told, "one is at work"
    assert set(said) == {"no worker is at work: waiting for machines, or for what runs on them (see `ray status`)"}


@pytest.mark.parametrize(("number", "ended_by_ray"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_job_without_workers_stops_at_once(monkeypatch, number, ended_by_ray):
    """It sends itself the second signal, which counts although the first was only just now; also where Ray handles it."""
    got, said = [], []
    monkeypatch.setattr(events, "TWICE_S", 1.0)
    before = signal.getsignal(number)

    def note(number, frame):
        got.append(number)
        if ended_by_ray:
            before(number, frame)

    signal.signal(number, note)

    def told_while_nobody_works() -> None:
        with events.heed_stop() as asked, events.listen(lambda event: said.append(event["text"]), asked):
            os.kill(os.getpid(), number)
            assert comes_true(lambda: bool(got))

    try:
        with pytest.raises(SystemExit) as ended:
            told_while_nobody_works()
    finally:
        signal.signal(number, before)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    asked = f"asked to stop ({name}): writing a checkpoint first; a second {name} stops at once"
    assert said == [asked, "no worker is at work: stopping at once"]
    assert (ended.value.code, set(got)) == (128 + number, {number})


def test_workers_are_told_to_stop_though_nobody_reads_the_lines(monkeypatch):
    """`job | tee log`, of which both are sent SIGTERM: the pipe breaks."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def read_no_more(event: dict) -> None:
        raise BrokenPipeError

    def told() -> None:
        with (
            events.heed_stop() as asked,
            events.listen(read_no_more, asked) as mailbox,
            events.no_retry_of_user_errors(mailbox),
        ):
            assert comes_true(lambda: ray.get(ray.get_actor(mailbox).hears.remote()))
            os.kill(os.getpid(), signal.SIGTERM)
            assert comes_true(lambda: events.is_stopping(mailbox))

    try:
        with pytest.raises(SystemExit):
            told()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_at_once_unless_it_is_the_first_once_more(monkeypatch):
    """As `timeout` sends it to a process and to all of its group, in one breath."""
    got: list[int] = []
    monkeypatch.setattr(events, "TWICE_S", 0.2)
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))

    def told_twice_and_once_more() -> None:
        with events.heed_stop() as asked:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            assert asked.is_set()
            assert got == []
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == [signal.SIGTERM]

    try:
        with pytest.raises(SystemExit) as ended:
            told_twice_and_once_more()
        assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
