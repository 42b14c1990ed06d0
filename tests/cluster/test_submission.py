"""`ray job submit` against a head node on loopback, which lets in only who has its token."""

import contextlib
import json
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import Head
from small import ROOT, SMALL, history, processes_below, torchrun, wait_for

from dmat_ray.cluster import gauges

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_metrics_report_interval_ms": "1000"}
    with Head(tmp_path_factory.mktemp("head"), cpus=3, **variables) as running:
        yield running


def status(url: str, headers: dict[str, str], method: str = "GET") -> int:
    """What the dashboard says to a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=30) as answer:
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


@pytest.mark.timeout(2400)
def test_a_training_that_is_stopped_and_whose_worker_is_killed_goes_on_within_its_epoch(head, finished, tmp_path):
    """`ray job stop` sends SIGTERM. Submitted again, and a worker killed, it ends where torchrun does undisturbed."""
    finished.copy_set(tmp_path)
    slow = ["--training.epochs", "2", "--training.batch_size", "4", "--objective.latent.steps", "20"]
    options = ["--name", "dmat", *slow, "--training.checkpoint_minutes", "0.001", "--cluster.train_workers", "2"]
    script = ["jobs/train.py", "--preset", "demo", "dmat", "--output", str(tmp_path), *SMALL, *options]
    first = head.start(tmp_path / "first", *script, name="first")
    wait_for(lambda: steps_of_checkpoints(tmp_path) != [], first)
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert status(f"{head.url}/api/jobs/first/stop", {"Authorization": f"Bearer {token}"}, method="POST") == 200
    first.wait(timeout=800)
    said = (tmp_path / "first").read_text()
    assert "asked to stop (SIGTERM)" in said
    assert "stopped; the same command goes on from the checkpoint" in said
    assert not (tmp_path / "models").exists()

    before = max(steps_of_checkpoints(tmp_path))
    with head.scraped() as seen:
        second = head.start(tmp_path / "second", *script, name="second")
        # when the second is there the first is registered
        wait_for(lambda: len([step for step in steps_of_checkpoints(tmp_path) if step > before]) > 1, second)
        processes_below(head.process.pid, "RayTrainWorker")[0].kill()
        second.wait(timeout=800)
    said = (tmp_path / "second").read_text()
    assert second.returncode == 0, said
    assert len(re.findall(r"going on with epoch \d", said)) == 2, said
    # one of the two may have come between the epochs
    assert re.search(r"going on with epoch \d, after step \d", said), said
    torchrun(tmp_path / "calm", tmp_path / "on_manifold_set", "--name", "dmat", *slow)
    calm = history(tmp_path / "calm")
    assert history(tmp_path) == [pytest.approx(epoch, rel=1e-3, abs=1e-5) for epoch in calm]
    for name, key in (("loss", "train_loss"), ("learning_rate", "lr"), ("epoch", "epoch")):
        values = {value for _, value in seen[f"ray_dmat_ray_{name}"]["dmat"]}
        assert all(any(value == pytest.approx(epoch[key], rel=1e-3) for epoch in calm) for value in values)


def steps_of_checkpoints(output: Path) -> list[int]:
    """How far those that are there have come, with ten steps an epoch."""
    found = []
    for path in (output / "train").glob("*/checkpoint_*/run.json"):  # and not in what is being written
        with contextlib.suppress(FileNotFoundError):  # an older one, which has gone meanwhile
            run = json.loads(path.read_text())
            found.append(10 * run["epoch"] + run["step"])
    return found


NUMBERS = """
import time, ray
from dmat_ray.cluster import gauges
ray.init()
epoch = {"epoch": 1.0, "train_loss": 2.5, "lr": 0.1, "examples_per_second": 7.0, "val_clean": 0.75, "train_image_accuracy": 0.5}
gauges.training("mine", epoch, {gauges.GPU_MEMORY: 3.0})
gauges.tested("mine", "natural", "fog", 0.25)
gauges.trial("search", "search_000", {"worst": 0.125})
gauges.projected(20, 1)
gauges.evaluated("mine")
time.sleep(12)
"""


@pytest.mark.exhaustive
def test_prometheus_sees_the_work_and_the_dashboard_draws_it(head):
    """A number stays while its job is at work, though it is told once an epoch: Ray's endpoint drops it after two reports."""
    with head.scraped() as seen:
        done = head.run("-c", NUMBERS)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = {name for name in seen if name.startswith("ray_dmat_ray_")}
    assert ours == {f"ray_{name}" for name in gauges.GAUGES} | {f"ray_{name}_total" for name in gauges.COUNTERS}
    expected = {
        "loss": {"mine": 2.5},
        "accuracy": {"mine, held out, clean": 0.75, "mine, training, image": 0.5},
        "gpu_memory_bytes": {"mine": 3e6},
        "test_accuracy": {"fog, mine, natural": 0.25},
        "trial_objective": {"worst, search, search_000": 0.125},
        "images_projected_total": {"": 20},
        "images_rejected_total": {"": 1},
        "batches_evaluated_total": {"mine": 1},
    }
    for name, values in expected.items():
        found = seen[f"ray_dmat_ray_{name}"]
        assert {labels: {value for _, value in samples} for labels, samples in found.items()} == {
            k: {v} for k, v in values.items()
        }
    (times,) = ([when for when, _ in samples] for samples in seen["ray_dmat_ray_loss"].values())
    assert times[-1] - times[0] > 7
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    drawn = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"\bray_\w+", t["expr"])}
    assert ours <= drawn <= seen.keys()


@pytest.mark.exhaustive
def test_a_job_that_fails_says_so(head, tmp_path):
    failed = head.run("jobs/train.py", "--output", str(tmp_path / "nothing"), *SMALL)
    assert failed.returncode != 0
    assert "there is no on-manifold set" in failed.stdout
