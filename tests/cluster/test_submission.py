"""`ray job submit` against a head node on loopback, which lets in only who has its token."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small import SMALL, free_ports, wait_until_answers

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def wait_for_agent(environment: dict[str, str]) -> None:
    """The dashboard answers before the node's agent takes jobs."""
    for _ in range(40):
        done = subprocess.run(
            [RAY, "job", "submit", "--no-wait", "--", "true"], env=environment, capture_output=True, check=False
        )
        if done.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(done.stdout.decode() + done.stderr.decode())


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A head node with its dashboard; yields the environment in which `ray job` finds it."""
    gcs, dashboard, client, agent = free_ports(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    secret = tmp_path_factory.mktemp("secret") / "token"
    secret.write_text(secrets.token_hex(32))
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    # the folder of Ray's sockets must have a short path
    folder = Path("/tmp") / f"dmat_{os.getpid()}"
    command = [RAY, "start", "--head", "--block", "--num-cpus=6", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    # the agent's usual port is taken by the Ray that the other tests share
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    log = (tmp_path_factory.mktemp("head") / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_answers(f"{url}/api/gcs_healthz", process, Path(log.name))
        wait_for_agent({**environment, "RAY_API_SERVER_ADDRESS": url})
        yield {**environment, "RAY_API_SERVER_ADDRESS": url}
    finally:
        # asked to end it would take half a minute
        ours = [process, *psutil.Process(process.pid).children(recursive=True)]
        for one in ours:
            one.kill()
        process.wait(timeout=400)
        shutil.rmtree(folder, ignore_errors=True)


def status(url: str, headers: dict[str, str]) -> int:
    """What the dashboard says to a request for all jobs."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_who_has_no_token_is_refused(head):
    """By the dashboard, and so by the command line that asks it."""
    jobs = f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    token = Path(head["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert status(jobs, {}) == 401
    assert status(jobs, {"Authorization": f"Bearer {secrets.token_hex(32)}"}) == 403
    assert status(jobs, {"Authorization": f"Bearer {token}"}) == 200
    wrong = {k: v for k, v in head.items() if k != "RAY_AUTH_TOKEN_PATH"} | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = submit(wrong, "-c", "print('inside')")
    assert refused.returncode != 0
    assert "inside" not in refused.stdout
    assert "token" in (refused.stdout + refused.stderr).lower()


def submit(head: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- python ...`, as the README says it."""
    full = [RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, *command]
    return subprocess.run(full, cwd=ROOT, env=head, capture_output=True, text=True, timeout=500, check=False)


def test_submitted_jobs_train_and_fail_as_they_should(head, finished, tmp_path):
    finished.copy_set(tmp_path)
    done = submit(
        head, "jobs/train.py", "--preset", "demo", "dmat", "--output", str(tmp_path), *SMALL, "--cluster.train_workers", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo_dmat: epoch 2/2" in done.stdout
    run = json.loads((tmp_path / "models" / "demo_dmat" / "run.json").read_text())
    assert run["epoch"] == 2
    failed = submit(head, "jobs/train.py", "--output", str(tmp_path / "nothing"), *SMALL)
    assert failed.returncode != 0
    assert "there is no on-manifold set" in failed.stdout
