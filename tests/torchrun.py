"""Runs a script of this folder in two processes over the loopback device."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_workers(script: str, *arguments: str) -> None:
    """torchrun with two workers; fails with what they said unless both succeed."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [*torchrun, *address, str(Path(__file__).with_name(script)), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
