"""Head nodes on loopback as `ray start` makes them, with a dashboard that takes jobs; their machines may be the autoscaler's."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.autoscaler._private.util import prepare_config
from small import ROOT, free_ports, processes_below, wait_until_answers

RAY = str(Path(sys.executable).parent / "ray")
OF_RAY = {"Component", "JobId", "NodeAddress", "SessionName", "Version", "WorkerId", "ClusterName", "Source", "NodeId"}
HEAD_ID = "f" * 51 + "00000"  # as Ray's provider of machines for tests counts them


def shipped_cluster(cpus: int, idle_seconds: int, **most: int) -> dict[str, Any]:
    """ray_cluster.yaml with other machines: small ones, `most` of each type, that go after so many seconds without work."""
    cluster = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()) | {"file_mounts": {}})
    types = cluster["available_node_types"]
    for name, kind in types.items():
        kind |= {"node_config": {}, "max_workers": most.get(name, 0), "idle_timeout_s": idle_seconds}
        if kind["resources"]["CPU"]:
            kind["resources"]["CPU"] = cpus
    types["ray.head.default"] = types.pop(cluster["head_node_type"])  # the name that the provider has for it
    return cluster | {"head_node_type": "ray.head.default", "idle_timeout_minutes": idle_seconds / 60}


def kill_all(pids: Sequence[int]) -> None:
    """These processes, and all below them, at once."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [process := psutil.Process(pid), *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


def _mentions(process: psutil.Process, text: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(text in word for word in process.cmdline())
    return False


class Head:
    """A head node that lets in only who has its token, started on entering and killed on leaving.

    With `cluster`, a cluster file's content, its autoscaler starts machines: processes of this machine, made by the provider that
    Ray tests its autoscaler with.
    """

    def __init__(self, folder: Path, cpus: int = 0, cluster: dict[str, Any] | None = None, **variables: str) -> None:
        self.folder, self.cpus, self.cluster = folder, cpus, cluster
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **variables}
        self.environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def __enter__(self) -> "Head":
        for left in (2, 1, 0):
            try:
                self._start()
                break
            except AssertionError:  # Ray gives its processes 30 s to start, which may be too few on a busy machine
                if not left:
                    raise
        return self

    def _start(self) -> None:
        gcs, dashboard, client, agent, metrics = free_ports(5)
        # the folder of Ray's sockets must have a short path
        self._sockets = Path("/tmp") / f"dmat_{os.getpid()}_{gcs}"
        command = [RAY, "start", "--head", "--block", f"--num-cpus={self.cpus}", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={self._sockets}"]
        # the agent's usual port is taken by the Ray that the other tests share
        command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
        command += [f"--metrics-export-port={metrics}"]
        self._metrics = f"http://127.0.0.1:{metrics}/metrics"
        environment = self.environment
        if self.cluster is not None:
            module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
            provider = {"type": "external", "module": module, "gcs_address": f"127.0.0.1:{gcs}", "head_node_id": HEAD_ID}
            provider |= {"launch_multiple": True, "disable_node_updaters": True}
            file = self.folder / "autoscaler.json"
            file.write_text(json.dumps({**self.cluster, "provider": provider}))
            command += [f"--autoscaling-config={file}"]
            environment = environment | {
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.url = f"http://127.0.0.1:{dashboard}"
        self.address = f"127.0.0.1:{gcs}"
        self.environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.url}
        try:
            wait_until_answers(f"{self.url}/api/gcs_healthz", self.process, self.log)
            self._wait_for_agent()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """With all of its machines; asked to end it would take half a minute."""
        kill_all([self.process.pid])
        self.process.wait()
        # what it started and left, if it had ended by itself
        kill_all([p.pid for p in psutil.process_iter() if _mentions(p, str(self._sockets))])
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _wait_for_agent(self) -> None:
        """The dashboard answers before the node's agent takes jobs."""
        for _ in range(40):
            done = self.ray("job", "submit", "--no-wait", "--", "true")
            if done.returncode == 0:
                return
            time.sleep(1)
        raise AssertionError(done.stdout + done.stderr)

    @staticmethod
    def command(*words: str, options: Sequence[str] = ()) -> list[str]:
        """`ray job submit --working-dir . -- python ...`, as the README says it."""
        return [RAY, "job", "submit", "--working-dir", ".", *options, "--", sys.executable, *words]

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Any command of Ray's."""
        return subprocess.run([RAY, *words], env=self.environment, capture_output=True, text=True, timeout=400, check=False)

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Submit a script of this project and wait for its end."""
        environment = {**self.environment, **variables}
        return subprocess.run(
            self.command(*words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000, check=False
        )

    def start(self, output: Path, *words: str, name: str) -> "subprocess.Popen[str]":
        """Submit a script of this project as a job of this name, whose lines go to the file `output`."""
        with output.open("w") as log:
            return subprocess.Popen(
                self.command(*words, options=["--submission-id", name]),
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    @contextlib.contextmanager
    def scraped(self) -> Iterator[dict[str, dict[str, list[tuple[float, float]]]]]:
        """What Prometheus would see of the head every second: name -> labels but for Ray's own -> when, and the value."""
        seen: dict[str, dict[str, list[tuple[float, float]]]] = {}
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(1):
                with contextlib.suppress(OSError), urllib.request.urlopen(self._metrics, timeout=10) as answer:
                    for family in text_string_to_metric_families(answer.read().decode()):
                        for sample in family.samples:
                            labels = ", ".join(
                                v for k, v in sorted(sample.labels.items()) if k not in OF_RAY and not k.startswith("otel_")
                            )
                            seen.setdefault(sample.name, {}).setdefault(labels, []).append((time.monotonic(), sample.value))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            stop.set()
            thread.join()

    def hosts(self, title: str) -> dict[str, psutil.Process]:
        """Those of its machines that have a process of this title."""
        return {node: raylet for node, raylet in self.machines().items() if processes_below(raylet.pid, title)}

    def machines(self) -> dict[str, psutil.Process]:
        """The raylets of its machines that are alive, without the head's, by node id, in the order of their start."""
        found = {}
        if self.process.poll() is not None:
            return found
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "raylet" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                    node = process.environ()["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
                    if node != HEAD_ID:
                        found[node] = process
            except (psutil.NoSuchProcess, KeyError):
                continue
        return dict(sorted(found.items()))
