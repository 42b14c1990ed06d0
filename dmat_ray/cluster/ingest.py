"""Training batches streamed through Ray Data, for sets that are too large for every worker's memory.

Each epoch reads the shards anew, shuffles all of their rows (an all-to-all exchange through the object store, which spills
to disk), and splits the result equally among the workers. The order depends on (seed, epoch, number of workers).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.collective
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from torch import Tensor

from dmat_ray.cluster.room import of_nodes, takes_all
from dmat_ray.cluster.shard_tasks import read_examples
from dmat_ray.config import ClusterConfig, TrainingConfig
from dmat_ray.data import manifold_set, set_format, set_reader
from dmat_ray.data.epochs import NOTHING, Done, held_out_positions
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.data.pixels import to_unit
from dmat_ray.errors import UserError
from dmat_ray.rng import derive
from dmat_ray.storage.files import awaited
from dmat_ray.types import Batch

BLOCKS = 256  # that are shuffled: the exchange makes as many objects as the square of them


def await_a_cpu(workers: int, cluster: ClusterConfig, say: Callable[[str], None], is_stopping: Callable[[], bool]) -> None:
    """Wait until there is a CPU that is none of the workers', and ask an autoscaler for it. Ray Train may have taken all that a
    lost machine has left, and Ray Data would wait for one for ever, and in silence.

    Raises UserError if none comes within `wait_minutes`, or before the job `is_stopping`.
    """

    def is_there() -> bool:
        return not takes_all(of_nodes(), workers, {"CPU": cluster.threads_per_worker})

    if is_there():
        return
    taken = f"the workers ({workers}, with {cluster.threads_per_worker} CPU each) take all CPUs, and training.loader stream"
    say(f"{taken} needs another: asking the autoscaler, and waiting {cluster.wait_minutes:g} minutes for a node")
    asked = placement_group([{"CPU": 1}])
    try:
        if awaited(lambda: is_there() or is_stopping() or None, 60 * cluster.wait_minutes) is None:
            raise UserError(
                f"{taken} reads and shuffles on another, which did not come within {cluster.wait_minutes:g} minutes; start "
                "another node, lower cluster.threads_per_worker or cluster.train_workers, or give training.loader memory"
            )
        if not is_there():
            raise UserError(f"{taken} needs another; asked to stop while it waited, the same command goes on")
    finally:
        remove_placement_group(asked)


class Streamed:
    """An EpochSource (see `dmat_ray.data.epochs`) inside a Ray Train worker, which may `say` what it waits for, and must know
    whether the job `is_stopping`.
    """

    def __init__(
        self,
        place: str,
        config: TrainingConfig,
        cluster: ClusterConfig,
        say: Callable[[str], None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._place, self._config, self._cluster, self._say, self._is_stopping = place, config, cluster, say, is_stopping
        self._manifest = set_reader.read_manifest(place)
        ids = np.array(manifold_set.usable(place, "train")["id"].to_pylist(), dtype=object)
        train, held_out = held_out_positions(len(ids), config)
        self._ids, self._held_out_ids = ids[train], ids[held_out].tolist()  # in the order of ids
        self._seen_N = np.zeros(len(self._ids), bool)

    @property
    def manifest(self) -> dict[str, Any]:
        """See EpochSource."""
        return self._manifest

    @property
    def size(self) -> int:
        """See EpochSource."""
        return len(self._ids)

    def held_out(self, rank: int, world_size: int) -> ManifoldSet | None:
        """See EpochSource."""
        if not self._held_out_ids:
            return None
        mine = self._held_out_ids[rank::world_size]
        found = manifold_set.open_set(self._place, "train", only=mine or self._held_out_ids[:1])
        return found.take(np.arange(len(mine)))

    def seen(self) -> Tensor:
        """See EpochSource."""
        return torch.from_numpy(self._seen_N.astype(np.float32))

    def batches(self, epoch: int, rank: int, world_size: int, done: Done = NOTHING) -> Iterator[Batch]:
        """See EpochSource: after another number of workers the rest of the epoch is shuffled and dealt anew."""
        # as in memory: batches as equal as can be, each topped up so that all workers have equal parts of it
        steps = manifold_set.steps_per_epoch(self.size, self._config.batch_size)
        if done.steps >= steps:  # a checkpoint of an epoch's last step: nothing is left to be dealt
            self._seen_N = np.full(self.size, rank == 0)
            return iter(())
        again = done.steps == 0 or done.world_size == world_size  # the same order is dealt again, and its beginning is left out
        left = np.ones(self.size, bool) if again or done.seen_N is None else done.seen_N.numpy() == 0
        parts = np.array_split(np.arange(left.sum()), steps if again else steps - done.steps)
        sizes = [math.ceil(len(part) / world_size) for part in parts]
        short = sum(sizes) * world_size - int(left.sum())
        splits = self._splits(epoch, world_size, short, left) if rank == 0 else None
        mine = ray.train.collective.broadcast_from_rank_zero(splits)[rank]
        tables = mine.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        self._seen_N = np.zeros(self.size, bool) if rank else ~left
        return self._cut(tables, sizes, done.steps if again else 0)

    def _splits(self, epoch: int, world_size: int, short: int, left: np.ndarray) -> list[Any]:
        await_a_cpu(world_size, self._cluster, self._say, self._is_stopping)
        seed = self._config.seed
        order = np.random.default_rng([seed, epoch, 2]).permutation(self._ids[left])
        twice = np.resize(order, short).tolist()
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True  # what reaches the shuffle first must not depend on who was fastest
        context.enable_progress_bars = False
        names = sorted(self._manifest["shards"])
        groups = [part.tolist() for part in np.array_split(names, min(len(names), BLOCKS))]
        shards = ray.data.from_items([{"shards": group} for group in groups], override_num_blocks=len(groups))
        examples = shards.map_batches(
            read_examples,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={
                "place": self._place,
                "images": self._config.images,
                "manifest": {key: self._manifest[key] for key in ("shapes", "data")},
                "without": [*self._held_out_ids, *self._ids[~left].tolist()],
                "twice": twice,
            },
        )
        shuffled = examples.random_shuffle(seed=derive(seed, "epoch", epoch) % 2**31)
        return list(shuffled.streaming_split(world_size, equal=True))

    def _cut(self, tables: Iterator[pa.Table], sizes: list[int], skip: int) -> Iterator[Batch]:
        waiting: list[pa.Table] = []
        have = 0
        todo = iter(sizes)
        size = next(todo, 0)
        for table in tables:
            waiting.append(table)
            have += table.num_rows
            while size and have >= size:
                joined = pa.concat_tables(waiting)
                self._note(joined["id"].slice(0, size))
                if skip == 0:
                    yield self._batch(joined.slice(0, size))
                skip = max(0, skip - 1)
                waiting, have = [joined.slice(size)], have - size
                size = next(todo, 0)
        if size:
            raise RuntimeError(f"an epoch of {sum(sizes)} examples a worker ended with {have} left for a batch of {size}")

    def _note(self, ids: pa.ChunkedArray) -> None:
        self._seen_N[np.searchsorted(self._ids, np.array(ids.to_pylist(), dtype=object))] = True

    def _batch(self, table: pa.Table) -> Batch:
        pixels = set_format.from_lists(table["pixels"], self._manifest["shapes"]["on_manifold"])
        w = None
        if "w" in table.column_names:
            w = torch.from_numpy(set_format.from_lists(table["w"], self._manifest["shapes"]["w"]).copy())
        label = torch.from_numpy(table["label"].to_numpy().copy())
        return Batch(table["id"].to_pylist(), to_unit(pixels), label, w)
