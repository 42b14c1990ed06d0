"""Ray Train's workers, as every stage that trains asks for them."""

from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch

from dmat_ray.cluster import environment, session
from dmat_ray.cluster.context import stored_checkpoints
from dmat_ray.config import ClusterConfig
from dmat_ray.errors import UserError
from dmat_ray.models.checkpoint import is_whole
from dmat_ray.storage import Location, Place, at
from dmat_ray.storage.folders import fetched

SNAPSHOT = "checkpoint_manager_snapshot.json"  # in which Ray Train notes the checkpoints that it knows


def fit(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    folder: Place,
    say: Callable[[str], None],
    *,
    keep: int | None,
    elastic: bool = False,
) -> ray.train.Result:
    """Run `worker(settings)` on `cluster.train_workers` workers, anew after a failure; checkpoints in `folder`, `keep` of them.

    After so many failures as `cluster.max_failures` says it ends only if none of them has left a newer checkpoint: spot machines
    are taken away again and again. With `elastic` fewer workers will do, if `cluster.train_workers_min` says so. Ray must be
    connected.
    """
    place = at(folder)
    while True:
        before = stored_checkpoints(place)[:1]
        _mend(place, keep)
        try:
            return _fit(worker, settings, cluster, place, keep, elastic)
        except ray.train.TrainingFailedError:
            told = ray.get(ray.get_actor(settings["mailbox"]).get_user_error.remote())
            if cluster.max_failures == 0 or told is not None or stored_checkpoints(place)[:1] == before:
                raise
            say(f"workers failed {cluster.max_failures + 1} times, and have come further: going on")


def _mend(place: Location, keep: int | None) -> None:
    """Remove Ray Train's snapshot if it would not begin with it: one that is half written, or names a checkpoint that is gone.

    Nothing needs it: workers look for the checkpoints themselves. Those that Ray then does not know of, and so would keep, are
    removed but for the newest, of which `keep` are whole.
    """
    try:
        known = (place / SNAPSHOT).read_json()
        names = {result["checkpoint_dir_name"] for result in known["checkpoint_results"]}
        if known["ray_version"] == ray.__version__ and names <= {found.name for found in stored_checkpoints(place)}:
            return
    except (FileNotFoundError, UserError, KeyError, TypeError):
        pass
    (place / SNAPSHOT).unlink()
    whole = 0
    for found in [] if keep is None else stored_checkpoints(place):
        if whole == keep:
            found.remove()
        else:
            whole += is_whole(fetched(found))


def _fit(
    worker: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    cluster: ClusterConfig,
    place: Location,
    keep: int | None,
    elastic: bool,
) -> ray.train.Result:
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(backend="gloo" if session.has_no_device(cluster) else None),
        scaling_config=ray.train.ScalingConfig(
            num_workers=environment.worker_count(cluster) if elastic else cluster.train_workers,
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
    )
    # Ray Train's handler of Ctrl-C swallows the first two, stays when the training is over, and ends the process with exit code 0
    trainer._register_sigint_handler = lambda controller: None
    return trainer.fit()
