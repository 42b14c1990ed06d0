"""Lines in a silence: by the clock alone."""

import time

import pytest

from dmat_ray.cluster import silence


def test_a_silence_is_broken_at_growing_intervals_until_something_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "FIRST_S", 0.2)
    said: list[tuple[float, str]] = []
    began = time.monotonic()
    with silence.breaking_silence("shard", lambda text: said.append((time.monotonic() - began, text))) as heard:
        time.sleep(1.2)
        heard()
        alone = len(said)
        time.sleep(0.1)
        assert len(said) == alone
        time.sleep(0.4)
    assert 2 <= alone <= 3, "after 0.2 and 0.6 seconds, and perhaps at the end"
    assert said[1][0] - said[0][0] > 0.35
    assert len(said) == alone + 1, "and anew"
    assert all(text.startswith("no shard was finished in the last ") for _, text in said)
    assert said[0][1].endswith("; work goes on")
    before = len(said)
    time.sleep(0.5)
    assert len(said) == before, "it ends with the work"
