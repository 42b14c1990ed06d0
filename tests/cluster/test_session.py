"""What a local Ray opens and where output may go."""

import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from PIL import Image
from ray._private.runtime_env import packaging
from small import ROOT, settings

from dmat_ray.cluster import encoder, environment, evaluate, gan, jobs, one_training, session, train
from dmat_ray.cluster.environment import is_own, prepare_environment
from dmat_ray.cluster.session import connected
from dmat_ray.config import ClusterConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation.units import Unit
from dmat_ray.storage import at
from dmat_ray.training import trained_models

pytestmark = pytest.mark.cluster


@pytest.mark.usefixtures("ray_session")
def test_ray_listens_on_loopback_only():
    listening = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            listening += [c.laddr.ip for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:  # Ray's pool of idle workers comes and goes
            continue
    assert len(listening) >= 4
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


OUTLIVES_A_TERM = """
import os, signal, ray
from dmat_ray.cluster.session import connected
from dmat_ray.config import ClusterConfig
asked = []
with connected(ClusterConfig(), say=lambda line: None):
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    print("ready", flush=True)
    while not asked:
        signal.sigtimedwait([signal.SIGUSR2], 0.1)
    print(ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
    while True:
        signal.pause()
"""


@pytest.mark.parametrize(
    "leader", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["in a terminal", "under timeout"]
)
def test_a_signal_to_all_of_a_job_leaves_its_ray_at_work(leader):
    """Which has the last checkpoint to write; and a Ray whose driver is killed is gone, in whatever group."""
    above = [] if leader else ["timeout", "300"]
    job = subprocess.Popen([*above, sys.executable, "-c", OUTLIVES_A_TERM], stdout=subprocess.PIPE, text=True, process_group=0)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    driver = psutil.Process(job.pid) if leader else psutil.Process(job.pid).children()[0]
    try:
        below = psutil.Process(job.pid).children(recursive=True)
        servers = [process for process in below if process.name() in ("gcs_server", "raylet")]
        assert len(servers) == 2
        os.killpg(job.pid, signal.SIGTERM)
        assert job.stdout.readline() == "42\n"
    finally:
        driver.kill()
        job.wait()
    _, left = psutil.wait_procs(servers, timeout=30)
    assert left == []  # their helpers see it a minute later


def test_no_usage_is_told_to_the_makers_of_packages(monkeypatch):
    """Nor anything fetched from them; who wants it says so."""
    from mlflow.telemetry import utils

    names = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert [os.environ[name] for name in names] == ["0", "true"]
    assert utils.is_telemetry_disabled()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    prepare_environment()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_relative_output_of_a_submitted_job_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    prepare_environment(settings(tmp_path))
    with pytest.raises(UserError, match="output 'runs/demo' is relative"):
        prepare_environment(settings("runs/demo"))
    prepare_environment(settings(tmp_path, "--manifold_set", "s3://bucket/set"))
    with pytest.raises(UserError, match=r"manifold_set 'sets/mine' is relative.*--manifold_set an absolute path"):
        prepare_environment(settings(tmp_path, "--manifold_set", "sets/mine"))
    with pytest.raises(UserError, match=r"to 'labels\.parquet' is relative"):
        prepare_environment(settings(tmp_path), places={"to": "labels.parquet"})


def test_images_in_the_copied_working_directory_of_a_submitted_job_are_refused(monkeypatch, tmp_path):
    copy = packaging.get_local_dir_from_uri(
        packaging.get_uri_for_directory(str(tmp_path), include_gitignore=True), str(tmp_path / "files")
    )
    for folder in (copy / "photos", tmp_path / "photos"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    prepare_environment(settings(tmp_path, "--data.source", tmp_path / "photos"), images=True)
    monkeypatch.chdir(copy)
    prepare_environment(settings(tmp_path, "--data.source", "photos"))  # of a job that makes nothing of them
    with pytest.raises(UserError, match=r"data\.source '/.*/photos' lies in the job's temporary copy"):
        prepare_environment(settings(tmp_path, "--data.source", "photos"), images=True)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    prepare_environment(settings(tmp_path, "--data.source", "photos"), images=True)


def test_what_the_documented_servers_leave_here_does_not_travel_with_a_job(tmp_path):
    """Nor are their users' passwords sent to all machines. Told by Ray's own walk, of our ignore files."""
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path)
    left = ("basic_auth.db", "mlflow.db", "artifacts/1/a", "mlartifacts/1/a", "mlruns/1/a", "runs/demo/set", ".venv/bin/python")
    for name in (*left, "jobs/train.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    packed = tmp_path.parent / "packed.zip"
    packaging.create_package(str(tmp_path), packed, include_gitignore=True, include_parent_dir=False)
    with zipfile.ZipFile(packed) as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == {".gitignore", ".rayignore", "jobs/train.py"}


@pytest.mark.parametrize(("exported", "asked", "own"), [
    (None, None, True), ("local", None, True), ("10.0.0.1:6379", "local", True), ("10.0.0.1:6379", None, False)
])  # fmt: skip
def test_a_ray_of_ones_own_stays_on_loopback(monkeypatch, exported, asked, own):
    """Whatever cluster the shell knows of."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if exported:
        monkeypatch.setenv("RAY_ADDRESS", exported)
    cluster = ClusterConfig(address=asked)
    prepare_environment(cluster=cluster)
    assert is_own(cluster) == own
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if own else None)


def test_an_output_in_an_object_store_needs_an_mlflow_server():
    with pytest.raises(UserError, match=r"'s3://bucket/x' is in an object store, .* MLflow server as --tracking\.uri"):
        prepare_environment(settings("s3://bucket/x"))
    prepare_environment(settings("s3://bucket/x"), tracked=False)
    prepare_environment(settings("s3://bucket/x", "--tracking.uri", "http://127.0.0.1:5000"))


def test_only_a_training_that_may_go_on_with_fewer_starts_soon_without_the_rest(monkeypatch, tmp_path):
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    elastic = settings(tmp_path, "--cluster.train_workers", 2, "--cluster.train_workers_min", 1)
    for config, options, seconds in ((settings(tmp_path), {}, "300"), (elastic, {}, "60"), (elastic, {"elastic": False}, "300")):
        monkeypatch.delenv(name, raising=False)
        prepare_environment(config, **options)
        assert os.environ[name] == seconds


class _StartedError(Exception):
    pass


@pytest.fixture
def one_gpu(monkeypatch) -> None:
    """A machine that has one, and on which Ray gets as far as its start."""

    def start(**_):
        raise _StartedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)


ONE_WORKER = ("--cluster.gpus_per_worker", "1", "--cluster.train_workers", "1")


@pytest.mark.usefixtures("one_gpu")
def test_a_stage_asks_a_machine_for_gpus_of_its_own_workers_alone(monkeypatch, tmp_path):
    """Both numbers of actors are 2 by default, and a training starts no actors."""
    config = settings(tmp_path, *ONE_WORKER, "--cluster.projection_actors", 2, "--cluster.evaluation_actors", 2)
    monkeypatch.setattr(trained_models, "untrained", lambda configs, say: configs)
    with pytest.raises(_StartedError):
        jobs.train([config], print)
    script = Path(__file__).parents[2] / "jobs" / "train_generator.py"
    monkeypatch.setattr(sys, "argv", [str(script), *ONE_WORKER, "--data.train_limit", "200", "--output", str(tmp_path)])
    with pytest.raises(_StartedError):
        runpy.run_path(str(script))["main"]()
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(
        UserError, match=r"2 workers .* need 2 GPUs, this machine has 1; lower cluster\.evaluation_actors, or set"
    ):
        jobs.predict(config, tmp_path, str(tmp_path), tmp_path, print)
    lower = r"lower cluster\.train_workers and cluster\.projection_actors and cluster\.evaluation_actors, or set"
    with pytest.raises(UserError, match=lower), connected(config.cluster):
        pass


@pytest.mark.usefixtures("one_gpu")
def test_workers_of_a_training_do_not_share_a_gpu(monkeypatch):
    """Ray would let them, and NCCL would fail as often as the training may."""
    monkeypatch.delenv(environment.LOGICAL, raising=False)
    half = ClusterConfig(gpus_per_worker=0.5)
    with pytest.raises(UserError, match=r"gpus_per_worker 0\.5 lets 2 DDP workers share a GPU"), connected(half):
        pass
    for one, counts in ((half, (session.PROJECT,)), (half.model_copy(update={"train_workers": 1}), (session.TRAIN,))):
        with pytest.raises(_StartedError), connected(one, counts=counts):
            pass


def test_every_stage_waits_for_a_machine_no_longer_than_it_is_told(monkeypatch, tmp_path):
    """Projection, prediction and search have tests of their own. Nothing is started here."""

    def await_machines(cluster, say, count=1, *, streamed=0):
        raise UserError(f"no nodes for {count} workers came")

    monkeypatch.setattr(session, "await_machines", await_machines)
    monkeypatch.setattr(session, "connected", lambda *_: contextlib.nullcontext())
    for stage in (one_training, train):
        monkeypatch.setattr(stage, "listen", lambda *_: contextlib.nullcontext("mailbox"))
        monkeypatch.setattr(stage, "heed_stop", lambda: contextlib.nullcontext(threading.Event()))
        monkeypatch.setattr(stage.tracking, "tracked", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(stage.workers, "fit", None)
    monkeypatch.setattr(train, "training_folder", lambda todo: at(tmp_path) / "train" / "dmat")
    monkeypatch.setattr(train, "is_trained", lambda config: False)
    monkeypatch.setattr(train, "_key", lambda config: "")
    monkeypatch.setattr(train, "read_manifest", lambda place: {"data": {}})
    monkeypatch.setattr(gan, "check", lambda config, storage: gan.ImageCache(tmp_path / "images", "0" * 64, {}))
    config = settings(tmp_path)
    place = at(tmp_path) / "made"
    with pytest.raises(UserError, match="no nodes for 2 workers came"):
        train.train_models([config], print)
    with pytest.raises(UserError, match="no nodes for 2 workers came"):
        gan.train(config, tmp_path / "generator", "", print)
    with pytest.raises(UserError, match="no nodes for 2 workers came"):
        encoder.train(config, place, "", print)
    with pytest.raises(UserError, match="no nodes for 1 workers came"):
        evaluate._run_all(SimpleNamespace(config=config, run=None), [Unit("dmat", "natural", "clean", (0,))], "", print)
