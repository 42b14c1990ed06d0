"""deploy/spot_watch.py against the clouds' metadata servers; tests/cluster/test_elastic.py has a real Ray that is told."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from spot_metadata import Metadata, metadata_server

SCRIPT = Path(__file__).parents[2] / "deploy" / "spot_watch.py"


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with metadata_server() as server:
        yield server


def wait(metadata: Metadata, asked: int) -> None:
    end = time.monotonic() + 60
    while metadata.asked < asked:
        assert time.monotonic() < end, "nobody asks"
        time.sleep(0.02)


@pytest.mark.parametrize(("cloud", "least", "most"), [("aws", 80, 100), ("gcp", 30, 30)])
def test_ray_is_told_once_the_cloud_has_told(metadata: Metadata, tmp_path: Path, cloud: str, least: int, most: int) -> None:
    """By a command of the name `ray` that writes down what it was given, and fails the first time."""
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/told\ntest $(wc -l < {tmp_path}/told) -gt 1\n')
    ray.chmod(0o755)
    command = [sys.executable, str(SCRIPT), cloud, "--metadata", metadata.url, "--every", "0.1", "--node-id", "abc"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "http_proxy": "http://127.0.0.1:9"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    wait(metadata, 3)
    assert process.poll() is None
    assert not (tmp_path / "told").exists()
    metadata.announce(100)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.count("this machine will be taken back in") == 2
    assert said.count("ray drain-node failed") == 1
    first, second = ((tmp_path / "told").read_text()).splitlines()
    for told in (first, second):
        words = told.split()
        assert words[0] == "drain-node"
        assert words[words.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
        assert least <= int(words[words.index("--deadline-remaining-seconds") + 1]) <= most
        assert words[-1] == "--node-id=abc"


def test_a_machine_without_such_a_server_says_so_once_and_asks_on() -> None:
    command = [sys.executable, str(SCRIPT), "aws", "--metadata", "http://127.0.0.1:9", "--every", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "does not answer as aws does, asking on" in process.stdout.readline()
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    assert process.stdout.read() == ""
