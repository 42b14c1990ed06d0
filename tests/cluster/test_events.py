"""What a driver hears of its workers. Needs no session."""

import time
from types import SimpleNamespace

import pytest

from dmat_ray.cluster import events
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster


def test_a_worker_is_heard_while_it_asks_nothing(monkeypatch):
    """Asked to stop while a worker validates, a job that took it for dead would lose the epoch."""
    mailbox = events._Mailbox()
    beats: list[float] = []

    def beat() -> None:
        mailbox.beat()
        beats.append(time.monotonic())

    methods = {"beat": beat, "get_user_error": mailbox.get_user_error, "put_user_error": mailbox.put_user_error}
    actor = SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})
    monkeypatch.setattr(events.ray, "get_actor", lambda name: actor)
    monkeypatch.setattr(events.ray, "get", lambda answer: answer)
    monkeypatch.setattr(events, "BEAT_S", 0.01)
    assert not mailbox.hears()

    def work() -> None:
        with events.no_retry_of_user_errors("mailbox") as go:
            assert go
            end = time.monotonic() + 60
            while len(beats) < 5 and time.monotonic() < end:
                time.sleep(0.01)
            assert len(beats) >= 5
            assert mailbox.hears()
            raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        work()
    time.sleep(0.1)
    ended = len(beats)
    time.sleep(0.2)
    assert len(beats) == ended, "nor any longer"
    mailbox.heard -= events.DEAF_S
    assert not mailbox.hears()
    with events.no_retry_of_user_errors("mailbox") as go:
        assert not go
    assert len(beats) == ended
