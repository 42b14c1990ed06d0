"""Ray Train's workers, as every stage that trains asks for them."""

from collections.abc import Callable
from typing import Any

import ray.train
import ray.train.torch

from dmat_ray.cluster import session
from dmat_ray.config import ClusterConfig
from dmat_ray.storage import Place, at


def fit(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    folder: Place,
    *,
    keep: int | None,
    elastic: bool = False,
) -> ray.train.Result:
    """Run `worker(settings)` on `cluster.train_workers` workers, anew after a failure; checkpoints in `folder`, `keep` of them.

    With `elastic` fewer will do, if `cluster.train_workers_min` says so. Ray must be connected.
    """
    place = at(folder)
    return ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(backend="gloo" if session.has_no_device(cluster) else None),
        scaling_config=ray.train.ScalingConfig(
            num_workers=session.worker_count(cluster) if elastic else cluster.train_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=session.worker_resources(cluster),
            **({"elastic_resize_monitor_interval_s": cluster.resize_seconds} if elastic else {}),
        ),
        run_config=ray.train.RunConfig(
            name=place.name,
            storage_path=place.parent.key,
            storage_filesystem=None if place.local else place.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=keep),
        ),
    ).fit()
