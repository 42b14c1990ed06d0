"""Connecting to Ray, and what its processes must know before they start."""

import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from dmat_ray.cluster import nodes
from dmat_ray.cluster.environment import LOGICAL, cluster_address, prepare_environment
from dmat_ray.cluster.room import fits, of_nodes, takes_all
from dmat_ray.config import ClusterConfig
from dmat_ray.errors import UserError, first_line
from dmat_ray.storage import at

if TYPE_CHECKING:
    import torch

TRAIN, PROJECT, EVALUATE = "train_workers", "projection_actors", "evaluation_actors"  # how many a stage starts, by setting


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
    from ray.util.placement_group import placement_group, remove_placement_group

    need = worker_resources(config)

    def room() -> int:
        """For how many workers."""
        return sum(fits(node, need) for node in of_nodes())

    def is_full() -> bool:
        """Whether the workers take all CPUs, and what they wait for has none."""
        return bool(streamed) and takes_all(of_nodes(), min(streamed, room()), need)

    if room() >= count and not is_full():
        return
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    lacking = f"no node has {wanted}" if count == 1 else f"the nodes have room for {room()} of {count} workers with {wanted} each"
    if room() >= count:
        lacking = "the workers take all CPUs, and training.loader stream needs another"
    say(f"{lacking}: asking the autoscaler, and waiting {config.wait_minutes:g} minutes for {'one' if count == 1 else 'more'}")
    # of what is streamed as many as there may be, which else would fit what is there
    asked = [placement_group([need]) for _ in range(max(count, min(streamed, room())))]
    asked += [placement_group([{"CPU": 1}])] * bool(streamed)
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
    address, before = cluster_address(config), signal.getsignal(signal.SIGTERM)
    told = nodes.expectation(output) if address is not None or (output is not None and at(output).local is None) else ""
    if address is None:
        say("starting Ray on this machine")
        _start(config, counts)
    else:
        _join(address, told)
    ray.data.DataContext.get_current().enable_progress_bars = False  # jobs print their own lines
    try:
        with _ended_by_sigterm(before):
            if address is not None:
                nodes.look_at_all(told, say)
            say("Ray is up")
            yield
    finally:
        ray.shutdown()


@contextmanager
def _ended_by_sigterm(before: Any) -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does, with its own number; afterwards `before`, what it did before there was a Ray.

    The handler that Ray sets exits amid the work of its threads: in a projection or an evaluation that ends in an abort and a
    trace of pages.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: of no Python code


def _start(config: ClusterConfig, counts: Sequence[str]) -> None:
    import ray

    cpus = _local_cpus(config, counts)
    try:
        with _native_stderr_held(), _groups_of_their_own():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **COMMON)
    except Exception as error:  # Ray has no kind of its own for a start that takes too long
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not come up on this machine in half a minute: it is busy with other work, or short of memory; give the same "
            "command again when it is less so"
        ) from error


def _join(address: str, told: str) -> None:
    import ray

    try:
        with _native_stderr_held():
            ray.init(address=address, runtime_env={"env_vars": {nodes.EXPECTED: told}}, **COMMON)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(f"the cluster at '{address}' does not let us in: {first_line(error)}") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cluster.address '{address}' cannot be reached: {first_line(error)}") from None
