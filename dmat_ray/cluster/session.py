"""Connecting to Ray, and what its processes must know before they start."""

import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmat_ray.cluster import nodes
from dmat_ray.config import ClusterConfig, Config
from dmat_ray.errors import UserError
from dmat_ray.storage import at, tracking_uri

if TYPE_CHECKING:
    import torch

# Read by Ray and MLflow when they are imported or when a process starts; a user's own value wins.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks until it is polled, 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # two workers on two busy cores need more than the usual 60 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the C++ side writes advice for Ray's developers to the driver's terminal
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what a search has learned must not be lost with the last 10 s
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # which lets a search that was interrupted pass for one that has ended
    "RAY_AIR_NEW_OUTPUT": "0",  # which prints even when it is told to be silent
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}

# For a Ray of this machine and this job alone. The first makes all of Ray's processes listen on loopback only, which is
# otherwise so on macOS and Windows and not on Linux; the others leave out helpers of Ray Train that a single node has no
# use for, each of which would be one more process to start.
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}

LOGICAL = "DMAT_RAY_LOGICAL_GPUS"
PACKAGE = "_ray_pkg_"  # what Ray calls the folder of a copied working directory, with a digest of its files
TRAIN, PROJECT, EVALUATE = "train_workers", "projection_actors", "evaluation_actors"  # how many a stage starts, by setting


def prepare_environment(
    config: Config | None = None,
    cluster: ClusterConfig | None = None,
    *,
    tracked: bool = True,
    elastic: bool = True,
    places: Mapping[str, str | None] | None = None,
) -> None:
    """Set what is not set, for the cluster of `config`, or for `cluster`. Call it before ray is imported.

    `elastic` is False for a job whose trainings have all of their workers or none, whatever `train_workers_min` says.
    Raises UserError for an output (or one of the job's own `places` to write to, by option) that would be lost, since a
    submitted job runs in a copy of its working directory, for images that lie in that copy, and for an output that cannot hold
    the database of a job that is `tracked`.
    """
    if config is not None and tracked:
        tracking_uri(config)
    if config is not None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        for name, place in {"output": config.output, "manifold_set": config.manifold_set, **(places or {})}.items():
            if place is not None and "://" not in place and not Path(place).is_absolute():
                raise UserError(
                    f"{name} '{place}' is relative, but a submitted job runs in a temporary copy of its working directory; "
                    f"give --{name} an absolute path that all nodes share"
                )
        if any(part.startswith(PACKAGE) for part in Path(config.data.source).parts):
            raise UserError(
                f"data.source '{config.data.source}' lies in the job's temporary copy of its working directory, which has "
                "another name when any of its files has changed, so that no later job could go on with this set; give an "
                "absolute path that all nodes share, or a URL"
            )
    if elastic and config is not None and worker_count(config.cluster) != config.cluster.train_workers:
        # after a machine is lost Ray Train may count on it for so long, before it starts with those that are left
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    cluster = cluster if config is None else config.cluster
    for key, value in {**ENVIRONMENT, **(LOCAL_ENVIRONMENT if is_own(cluster or ClusterConfig()) else {})}.items():
        os.environ.setdefault(key, value)


def cluster_address(config: ClusterConfig) -> str | None:
    """The configured address, or that of the Ray job that this process is the driver of."""
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def is_own(config: ClusterConfig) -> bool:
    """True if the job starts a Ray of its own on this machine."""
    return cluster_address(config) is None


def worker_count(config: ClusterConfig) -> int | tuple[int, int]:
    """Workers of a training as Ray Train takes it: a number, or the least and the most."""
    least = config.train_workers_min
    return config.train_workers if least in (None, config.train_workers) else (least, config.train_workers)


def worker_resources(config: ClusterConfig) -> dict[str, float]:
    """What Ray sets aside for one worker or actor."""
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker > 0 else {}
    return {"CPU": config.threads_per_worker, **gpus}


def has_no_device(config: ClusterConfig) -> bool:
    """Whether workers compute on the CPU, though Ray may say that it gave them a GPU (see `device_of_actor`)."""
    return config.gpus_per_worker == 0 or os.environ.get(LOGICAL) == "1"


def require_a_gpu_each(config: ClusterConfig) -> None:
    """Raise UserError if DDP workers would share a GPU: NCCL takes but one on each, and Ray Train would try again and again."""
    if 0 < config.gpus_per_worker < 1 and config.train_workers > 1 and not has_no_device(config):
        raise UserError(
            f"cluster.gpus_per_worker {config.gpus_per_worker:g} lets {config.train_workers} DDP workers share a GPU, which they "
            "cannot; give --cluster.train_workers 1, or --cluster.gpus_per_worker 1"
        )


def await_machines(config: ClusterConfig, say: Callable[[str], None], count: int = 1, *, streamed: int = 0) -> None:
    """Wait until the nodes are large enough for `count` workers, whoever uses them now, for which an autoscaler may first have to
    start some: Ray Train would wait for them for ever, and in silence. Ray must be connected.

    Of a training that is `streamed`, to so many workers at most, until a CPU is left for the tasks that read and shuffle.

    It is asked by placement groups, which are this job's and go with it: what `request_resources` asks for stays when a job is
    killed, and is taken back by another job's asking, Ray Data's among them.

    Raises UserError if they do not come within `wait_minutes`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    need = {name: amount for name, amount in worker_resources(config).items() if amount}

    def resources() -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room() -> int:
        """For how many workers."""
        # rounded, because 0.3 is 2.9999999999999996 times 0.1
        return sum(min(int(round(node.get(name, 0) / amount, 6)) for name, amount in need.items()) for node in resources())

    def is_full() -> bool:
        """Whether the workers take all CPUs, and what they wait for has none."""
        held = min(streamed, room()) * need["CPU"]
        return bool(streamed) and sum(node.get("CPU", 0) for node in resources()) - held < 1

    if room() >= count and not is_full():
        return
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    lacking = f"no node has {wanted}" if count == 1 else f"the nodes have room for {room()} of {count} workers with {wanted} each"
    if room() >= count:
        lacking = "the workers take all CPUs, and training.loader stream needs another"
    say(f"{lacking}: asking the autoscaler, and waiting {config.wait_minutes:g} minutes for {'one' if count == 1 else 'more'}")
    asked = [placement_group([need]) for _ in range(count)] + [placement_group([{"CPU": 1}])] * bool(streamed)
    try:
        end = time.monotonic() + 60 * config.wait_minutes
        while (found := room()) < count or is_full():
            if time.monotonic() > end:
                if found >= count:
                    raise UserError(
                        f"no CPU beside the workers' came within {config.wait_minutes:g} minutes, and training.loader stream "
                        "reads and shuffles there; start another node, lower cluster.threads_per_worker or "
                        "cluster.train_workers, or give training.loader memory"
                    )
                other = "lower cluster.gpus_per_worker (0 = CPU) or cluster.threads_per_worker, or raise cluster.wait_minutes"
                if count == 1:
                    raise UserError(f"no node with {wanted} came within {config.wait_minutes:g} minutes; start one, {other}")
                raise UserError(
                    f"room for only {found} of {count} workers with {wanted} each came within {config.wait_minutes:g} minutes; "
                    f"start more nodes, lower cluster.train_workers or cluster.train_workers_min, {other}"
                )
            time.sleep(1.0)
    finally:
        for one in asked:
            remove_placement_group(one)  # from now on the work itself says what it needs


def _local_cpus(config: ClusterConfig, counts: Sequence[str]) -> int:
    """Logical CPUs of a local Ray: the workers', as many as there are in a search, and some for Ray Data and small helpers.

    Raises UserError if the machine has not what the settings ask for; Ray would wait for it for ever.
    """
    workers = max(getattr(config, name) for name in counts)
    need = workers * config.threads_per_worker + 2
    if config.num_cpus is not None and config.num_cpus < need:
        raise UserError(f"cluster.num_cpus is {config.num_cpus}, but {workers} workers and Ray's helpers need {need}")
    if config.gpus_per_worker > 0:
        import torch

        found = torch.cuda.device_count()
        if found < workers * config.gpus_per_worker:
            raise UserError(
                f"{workers} workers with cluster.gpus_per_worker {config.gpus_per_worker:g} need "
                f"{workers * config.gpus_per_worker:g} GPUs, this machine has {found}; "
                + (f"lower {' and '.join(f'cluster.{name}' for name in counts)}, or " if found else "")
                + "set cluster.gpus_per_worker 0 to compute on CPUs"
            )
    return config.num_cpus or max(6, need, (os.cpu_count() or 1) + 2)


def device_of_actor() -> "torch.device":
    """The GPU that Ray gave this actor, or the CPU if none was asked for.

    Raises UserError if torch cannot use the GPU: a cluster that is paid for its GPUs must not compute on CPUs unnoticed.
    `DMAT_RAY_LOGICAL_GPUS=1` allows it, for clusters whose GPUs are only said to be there.
    """
    import ray
    import torch

    nodes.require_like_driver()
    if not ray.get_gpu_ids():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get(LOGICAL) == "1":
        return torch.device("cpu")
    raise UserError(
        f"Ray gave this actor on {platform.node()} a GPU, but torch {torch.__version__} finds none there (driver, or a torch "
        "without CUDA?); set cluster.gpus_per_worker 0 to compute on CPUs"
    )


def quiet_loggers() -> None:
    """Leave the terminal to the job's own lines; Ray's full logs stay in its session folder."""
    for name in ("ray.data", "ray.train", "ray.tune", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _native_stderr_held() -> Iterator[None]:
    """Holds back what C++ writes to file descriptor 2, and lets it through only if the body raises."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


@contextmanager
def _groups_of_their_own() -> Iterator[None]:
    """Processes that are started inside lead groups of their own: a terminal and `timeout` send signals to all of a job's group.

    Ray's servers end at SIGTERM, and without them the driver could have no last checkpoint written. They end with it all the
    same: on Linux the kernel sees to that, which is why nothing is done elsewhere. What stops the driver for a while (Ctrl-Z)
    leaves them at work.
    """
    if sys.platform != "linux":
        yield
        return
    start = subprocess.Popen.__init__

    def start_apart(self: subprocess.Popen[Any], *arguments: Any, **how: Any) -> None:
        start(self, *arguments, **how if how.get("start_new_session") else {"process_group": 0, **how})

    subprocess.Popen.__init__ = start_apart  # type: ignore[method-assign]  # Ray has no setting for it
    try:
        yield
    finally:
        subprocess.Popen.__init__ = start  # type: ignore[method-assign]


COMMON: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}


@contextmanager
def connected(
    config: ClusterConfig,
    output: str | None = None,
    say: Callable[[str], None] = print,
    counts: Sequence[str] = (TRAIN, PROJECT, EVALUATE),
) -> Iterator[None]:
    """Inside, Ray is connected: to `config.address`, to the submitted job's cluster, or to a Ray of its own.

    A Ray of its own has room for as many workers as the largest of `counts` says, the settings that what runs inside goes by.
    All machines of a cluster must have the driver's packages and, if it is given, its output folder; raises UserError if one
    has not, and for DDP workers that would share a GPU.
    """
    if TRAIN in counts:
        require_a_gpu_each(config)
    prepare_environment(cluster=config)
    import ray
    import ray.data

    quiet_loggers()
    if ray.is_initialized():
        yield
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    address = cluster_address(config)
    told = nodes.expectation(output) if address is not None or (output is not None and at(output).local is None) else ""
    if address is None:
        say("starting Ray on this machine")
        _start(config, counts)
    else:
        _join(address, told)
    ray.data.DataContext.get_current().enable_progress_bars = False  # jobs print their own lines
    try:
        if address is not None:
            nodes.look_at_all(told, say)
        say("Ray is up")
        yield
    finally:
        ray.shutdown()


def _start(config: ClusterConfig, counts: Sequence[str]) -> None:
    import ray

    cpus = _local_cpus(config, counts)
    with _native_stderr_held(), _groups_of_their_own():
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **COMMON)


def _join(address: str, told: str) -> None:
    import ray

    try:
        with _native_stderr_held():
            ray.init(address=address, runtime_env={"env_vars": {nodes.EXPECTED: told}}, **COMMON)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"the cluster at '{address}' does not let us in: {str(error).splitlines()[0]}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cluster.address '{address}' cannot be reached: {str(error).splitlines()[0]}") from None
