"""Training batches streamed through Ray Data: every example once, in an order that covers the whole set."""

import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import ray.train
import ray.train.torch
import torch
from scipy.stats import spearmanr

from dmat_ray.cluster import ingest, shard_tasks
from dmat_ray.cluster.ingest import Streamed
from dmat_ray.config import ClusterConfig, TrainingConfig
from dmat_ray.data.epochs import Done, InMemory, held_out_positions
from dmat_ray.data.manifold_set import open_set

pytestmark = pytest.mark.cluster
# batches of 8, 8, 7, ... that two workers cannot share equally
TRAINING = TrainingConfig(batch_size=8, val_examples=11, lr_epochs=(0, 1), lr_values=(0.1, 0.1))
NATURAL = TRAINING.model_copy(update={"images": "natural"})


def collect(config: dict[str, Any]) -> None:
    """A worker: what it is given in two epochs, what it knows after two steps of the second, and of what its rest is made."""
    rank = ray.train.get_context().get_world_rank()
    ingest.BLOCKS = 7  # of twenty shards
    streamed = Streamed(config["place"], TRAINING, ClusterConfig(), print)
    found: dict[str, Any] = {"batches": [[list(b.id) for b in streamed.batches(0, rank, 2)]]}
    begun = iter(streamed.batches(1, rank, 2))
    one = next(begun)
    found["first"] = [list(one.id), list(next(begun).id)]
    found["seen"] = streamed.seen().tolist()
    found["whole"] = [*found["first"], *(list(b.id) for b in begun)]
    found["batches"].append(found["whole"])
    found["rest"] = [list(b.id) for b in streamed.batches(1, rank, 2, Done(2, 2))]
    found["seen at the end"] = streamed.seen().tolist()
    # another number of workers has had every third example, in two steps
    had = torch.arange(streamed.size) % 3 == 0
    found["taken up"] = [list(b.id) for b in streamed.batches(1, rank, 2, Done(2, 3, had))]
    assert one.w_BLD is not None
    rows = zip(one.id, one.x_BCHW, one.w_BLD, one.y_B, strict=True)
    found["example"] = {id: [x.sum().item(), w.sum().item(), int(y)] for id, x, w, y in rows}
    parts = {world_size: streamed.held_out(rank, world_size) for world_size in (2, 20)}
    found["held_out"] = {f"{size}": part.id if part is not None else None for size, part in parts.items()}
    late = streamed.held_out(rank + 18, 20)  # more workers than examples
    found["held_out"]["none"] = late.id if late is not None else None
    (Path(config["out"]) / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def place(ray_session, tmp_path_factory, write_any_set) -> Path:
    """A set of 70 training images, some of them poor, in 20 shards."""
    folder = write_any_set(tmp_path_factory.mktemp("set") / "on_manifold_set", train=70, test=30, shards=20, noise=46)
    assert 5 < json.loads((folder / "manifest.json").read_text())["status"]["poor"] < 30
    return folder


# workers do not have this file
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def workers(place, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two workers was given."""
    out = tmp_path_factory.mktemp("collected")
    ray.train.torch.TorchTrainer(
        collect,
        train_loop_config={"place": str(place), "out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="collect", storage_path=str(out / "train")),
    ).fit()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_every_example_comes_once_and_none_that_is_held_out(workers, place):
    memory = InMemory(open_set(place, "train"), TRAINING)
    for rank, worker in enumerate(workers):
        parts = [memory.held_out(rank, 2), memory.held_out(rank, 20), memory.held_out(rank + 18, 20)]
        assert list(worker["held_out"].values()) == [part.id for part in parts if part is not None]
    every = [id for worker in workers for id in worker["held_out"]["2"]]
    assert len(set(every)) == len(every) == TRAINING.val_examples
    for epoch in (0, 1):
        parts = [worker["batches"][epoch] for worker in workers]
        sizes = [[len(batch) for batch in part] for part in parts]
        assert sizes[0] == sizes[1] == [len(b) for b in memory.batches(epoch, 0, 2)], "DDP needs equal parts"
        given = Counter(chain(*parts[0], *parts[1]))
        train, _ = held_out_positions(len(memory.data), TRAINING)
        assert set(given) == {memory.data.id[i] for i in train}
        assert given.total() == sum(sizes[0]) * 2, "as many twice as fill the workers' parts"
        assert max(given.values()) <= 2


def ids_of(place: Path) -> list[str]:
    data = open_set(place, "train")
    return [data.id[i] for i in held_out_positions(len(data), TRAINING)[0]]


def test_the_rest_of_an_epoch_is_what_would_have_come(workers):
    for worker in workers:
        assert len(worker["rest"]) > 3
        assert worker["rest"] == worker["whole"][2:], "its order is the same again"


def test_what_was_seen_is_known_by_id(workers, place):
    ids = ids_of(place)
    for worker in workers:
        seen = {id for id, had in zip(ids, worker["seen"], strict=True) if had}
        assert seen == set(chain(*worker["first"]))
        assert {id for id, had in zip(ids, worker["seen at the end"], strict=True) if had} == set(chain(*worker["whole"]))


def test_other_workers_take_up_exactly_what_is_left(workers, place):
    ids = ids_of(place)
    left = [id for i, id in enumerate(ids) if i % 3]
    parts = [worker["taken up"] for worker in workers]
    assert [len(part) for part in parts] == [len(workers[0]["whole"]) - 2] * 2
    assert list(map(len, parts[0])) == list(map(len, parts[1]))
    given = Counter(chain(*parts[0], *parts[1]))
    assert set(given) == set(left)
    assert given.total() - len(left) <= len(parts[0]), "one more a step, where two workers cannot share"


@pytest.mark.parametrize("world_size", [1, 3])
def test_nothing_is_left_of_an_epoch_whose_last_step_has_a_checkpoint(workers, place, world_size):
    """Of two workers, whatever number goes on."""
    streamed, steps = Streamed(str(place), TRAINING, ClusterConfig(), print), len(workers[0]["whole"])
    for rank in range(world_size):
        assert list(streamed.batches(1, rank, world_size, Done(steps, 2, torch.ones(streamed.size)))) == []
        assert streamed.seen().tolist() == [float(rank == 0)] * streamed.size


def test_the_order_changes_with_the_epoch(workers):
    for worker in workers:
        assert worker["batches"][0] != worker["batches"][1]
        assert sorted(chain(*worker["batches"][0])) != sorted(chain(*worker["batches"][1])), "a worker keeps no part of the set"


def test_the_shuffle_covers_the_whole_set(workers, place):
    position = {}
    for path in sorted((place / "shards").glob("*.parquet")):
        for id in pq.read_table(path, columns=["id"])["id"].to_pylist():
            position[id] = len(position)
    for epoch in (0, 1):
        for worker in workers:
            order = [position[id] for batch in worker["batches"][epoch] for id in batch]
            correlation, _ = spearmanr(order, np.arange(len(order)))
            assert abs(correlation) < 0.5, "chance gives 0.19 on average, order 1"
            # neighbours in the epoch are a third of the set apart, as two random examples are
            assert np.abs(np.diff(order)).mean() > 100 / 3 / 2


def test_images_codes_and_labels_stay_together(workers, place):
    rows = pa.concat_tables(pq.read_table(p) for p in sorted((place / "shards").glob("*.parquet"))).to_pylist()
    memory = open_set(place, "train")
    by_id = {r["id"]: r for r in rows}
    for worker in workers:
        assert len(worker["example"]) >= 3
        for id, (x, w, y) in worker["example"].items():
            pixels = np.frombuffer(by_id[id]["on_manifold"]["bytes"][-64:], np.uint8)
            assert x == pytest.approx(pixels.sum() / 255, rel=1e-5)
            assert w == pytest.approx(np.sum(by_id[id]["w"]), rel=1e-3, abs=1e-3)
            assert y == by_id[id]["label"]
    # natural images, as the task reads them that all passes are made of
    streamed = Streamed(str(place), NATURAL, ClusterConfig(), print)
    names = sorted(streamed.manifest["shards"])
    without = [memory.id[0], memory.id[5]]
    table = shard_tasks.read_examples(
        pa.table({"shards": [names]}), place=str(place), images="natural", manifest=streamed.manifest, without=without, twice=[]
    )
    batch = streamed._batch(table)
    assert batch.w_BLD is None
    order = [memory.id.index(id) for id in batch.id]
    assert sorted(order) == sorted(set(range(len(memory))) - {0, 5})
    np.testing.assert_array_equal((batch.x_BCHW * 255).round().numpy(), memory.natural[order])
    assert batch.y_B.tolist() == memory.label[order].tolist()
