"""`ray job submit` against a head node on loopback, which lets in only who has its token."""

import json
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heads import Head
from small import DMAT, ROOT, SMALL, history, same_training, wait_for

from dmat_ray.cluster import gauges

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_metrics_report_interval_ms": "1000"}
    with Head(tmp_path_factory.mktemp("head"), cpus=6, **variables) as running:
        yield running


def status(url: str, headers: dict[str, str]) -> int:
    """What the dashboard says to a request for all jobs."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_who_has_no_token_is_refused(head):
    """By the dashboard, and so by the command line that asks it."""
    jobs = f"{head.url}/api/jobs/"
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert status(jobs, {}) == 401
    assert status(jobs, {"Authorization": f"Bearer {secrets.token_hex(32)}"}) == 403
    assert status(jobs, {"Authorization": f"Bearer {token}"}) == 200
    refused = head.run("-c", "print('inside')", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_AUTH_TOKEN_PATH="")
    assert refused.returncode != 0
    assert "inside" not in refused.stdout
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_a_training_that_is_stopped_goes_on_within_its_epoch(head, finished, tmp_path):
    """`ray job stop` sends SIGTERM. Submitted again it ends where an undisturbed training does; its exit codes are told."""
    finished.copy_set(tmp_path)
    with head.scraped() as seen:
        stop_and_go_on(head, finished, tmp_path)
    assert_watched(seen, tmp_path)


def stop_and_go_on(head: Head, finished: Any, tmp_path: Path) -> None:
    script = ["jobs/train.py", "--preset", "demo", "dmat", "--name", "dmat", "--output", str(tmp_path), *SMALL, *DMAT]
    first = head.start(tmp_path / "first", *script, name="first")
    wait_for(lambda: "epoch 1/3" in (tmp_path / "first").read_text(), first)
    head.ray("job", "stop", "first")
    first.wait(timeout=400)
    said = (tmp_path / "first").read_text()
    assert "asked to stop (SIGTERM)" in said
    assert "stopped; the same command goes on from the checkpoint" in said
    assert not (tmp_path / "models").exists()

    second = head.run(*script)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.search(r"going on with epoch \d, after step \d", second.stdout), second.stdout
    assert "epoch 1/3" not in second.stdout
    same_training(tmp_path, finished.output)


def assert_watched(seen: dict[str, dict[str, set[float]]], output: Path) -> None:
    """Prometheus saw the training's numbers, and the dashboard draws nothing that is not there."""
    epochs = history(output)
    for name, key in (("loss", "train_loss"), ("learning_rate", "lr"), ("epoch", "epoch")):
        values = seen[f"ray_dmat_ray_{name}"]["dmat"]
        assert all(any(value == pytest.approx(e[key], rel=1e-4) for e in epochs) for value in values)
    assert seen["ray_dmat_ray_accuracy"].keys() >= {"dmat, held out, clean", "dmat, training, image"}
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    drawn = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"\bray_\w+", t["expr"])}
    ours = {f"ray_{name}" for name in gauges.GAUGES} | {f"ray_{name}_total" for name in gauges.COUNTERS}
    assert ours <= drawn
    assert drawn - ours <= seen.keys()


def test_a_job_that_fails_says_so(head, tmp_path):
    failed = head.run("jobs/train.py", "--output", str(tmp_path / "nothing"), *SMALL)
    assert failed.returncode != 0
    assert "there is no on-manifold set" in failed.stdout
