"""Lines in a silence: by the clock alone."""

import itertools
import time

import pytest
import ray

from dmat_ray.cluster import silence

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]


def test_a_silence_is_broken_at_growing_intervals_until_something_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "FIRST_S", 0.5)
    monkeypatch.setattr(silence, "LONG_S", 1.0)
    said: list[tuple[float, str]] = []
    began = time.monotonic()
    with silence.breaking_silence("shard", lambda text: said.append((time.monotonic() - began, text))) as heard:
        time.sleep(4.2)
        heard()
        alone = len(said)
        time.sleep(0.9)
        heard()
    times = [when for when, _ in said[:alone]]
    assert 3 <= alone <= 4, "after 0.5, 1.5, 2.5 and perhaps 3.5 seconds, a little late each"
    assert times[0] >= 0.5
    assert all(0.99 <= later - sooner < 2.0 for sooner, later in itertools.pairwise(times))
    assert all(text.startswith("no shard was finished in the last ") for _, text in said)
    assert "cluster" not in said[0][1]
    assert all(
        f"; Ray counts {ray.cluster_resources()['CPU']:g} CPUs and 0 GPUs in the cluster" in text for _, text in said[1:alone]
    )
    assert len(said) == alone + 1, "and anew"
    assert "cluster" not in said[-1][1]
    before = len(said)
    time.sleep(1.0)
    assert len(said) == before, "it ends with the work"
