"""The environment variables that Ray, MLflow and PyTorch read when they are imported, and what a job needs to know of its cluster
to set them. Imports none of these.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dmat_ray.config import ClusterConfig, Config
from dmat_ray.errors import UserError
from dmat_ray.storage import RELATIVE_SQLITE, tracking_uri

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


def prepare_environment(
    config: Config | None = None,
    cluster: ClusterConfig | None = None,
    *,
    tracked: bool = True,
    elastic: bool = True,
    images: bool = False,
    places: Mapping[str, str | None] | None = None,
) -> None:
    """Set what is not set, for the cluster of `config`, or for `cluster`. Call it before ray is imported.

    `elastic` is False for a job whose trainings have all of their workers or none, whatever `train_workers_min` says.
    Raises UserError for an output, a database or one of the job's own `places` to write to, by option, that would be lost, since
    a submitted job runs in a copy of its working directory, for the `images` that a job makes a set or a generator of, if they
    lie in that copy, and for an output that cannot hold the database of a job that is `tracked`.
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
        if tracked and RELATIVE_SQLITE.fullmatch(config.tracking.uri or ""):
            raise UserError(
                f"tracking.uri '{config.tracking.uri}' is relative, but a submitted job runs in a temporary copy of its working "
                "directory; give --tracking.uri sqlite:////FOLDER/mlflow.db, or the address of an MLflow server"
            )
        if images and any(part.startswith(PACKAGE) for part in Path(config.data.source).parts):
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
