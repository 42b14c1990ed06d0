"""Predictions on Ray Data: tasks read and decode, actors hold the model, rows come back to the driver."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch

from dmat_ray.cluster import pools, session, shard_tasks
from dmat_ray.cluster.forecast import progress
from dmat_ray.cluster.shard_tasks import read_pictures, unpack
from dmat_ray.config import Config
from dmat_ray.data import set_format
from dmat_ray.errors import UserError
from dmat_ray.models import checkpoint, prediction
from dmat_ray.storage import Location
from dmat_ray.wording import number_of

UNREADABLE_SAID = 20  # files that lines name; the rows name all


class Predictor:
    """An actor with the model, which is read once."""

    @pools.patient_start
    def __init__(self, threads: int, model: str) -> None:
        torch.set_num_threads(threads)
        self.device = session.device_of_actor()
        self.network, self.run = checkpoint.load_classifier(model, self.device)

    def __call__(self, row: pa.Table) -> pa.Table:
        _, table, rejected = unpack(row)
        shape = (self.run["channels"], self.run["resolution"], self.run["resolution"])
        pixels = set_format.from_lists(table["pixels"], shape)
        found = prediction.predict(self.network, self.run["class_names"], table["id"].to_pylist(), pixels, self.device)
        return pa.concat_tables([found, prediction.unreadable(rejected)])


def predict(
    config: Config, model: Location, images: str, listing: pa.Table, target: Location, say: Callable[[str], None]
) -> pa.Table:
    """One row of `prediction.SCHEMA` for each image of a listing, in its order; also written to `target`, as Parquet.

    Ray must be connected. Raises UserError for a model or storage that cannot be read, or a target that cannot be written.
    """
    run = checkpoint.read_run(model)
    if unseen := prediction.warning_of_unseen(run):
        say(unseen)
    data = prediction.read_as(run, config.data, images)
    session.await_machines(config.cluster, say)
    parts = _parts(listing, config.evaluation.batch_size)
    actors = min(config.cluster.evaluation_actors, len(parts))
    say(f"starting {number_of(actors, 'actor')} for {number_of(listing.num_rows, 'image')}")
    with pools.patient():
        predicted = (
            ray.data.from_items(parts, override_num_blocks=len(parts))
            .map_batches(read_pictures, batch_size=1, batch_format="pyarrow", fn_kwargs={"data": data.model_dump(mode="json")})
            .map_batches(
                Predictor,
                fn_constructor_kwargs={"threads": config.cluster.threads_per_worker, "model": str(model)},
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=config.cluster.threads_per_worker,
                num_gpus=config.cluster.gpus_per_worker or None,
                compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors, initial_size=actors),
            )
        )
    found = _collected(predicted, listing, actors, say)
    sink = pa.BufferOutputStream()
    pq.write_table(found, sink, compression="zstd")
    try:
        target.write_bytes(sink.getvalue())
    except OSError as error:
        raise UserError(f"'{target}' cannot be written: {error.strerror or error}; give another --to") from None
    return found


def _parts(listing: pa.Table, size: int) -> list[dict[str, Any]]:
    """The listing cut into rows of work."""
    starts = range(0, listing.num_rows, size)
    return [shard_tasks.work(str(k), listing.slice(start, size)) for k, start in enumerate(starts)]


def _collected(predicted: ray.data.Dataset, listing: pa.Table, actors: int, say: Callable[[str], None]) -> pa.Table:
    """All rows, in the order of the listing; says how far they are."""
    tables, done, bad = [], 0, 0
    with progress(listing.num_rows, actors, "batch", say) as far:
        for table in predicted.iter_batches(batch_format="pyarrow", batch_size=None):
            tables.append(table.cast(prediction.SCHEMA))
            done += table.num_rows
            for row in table.filter(pc.is_valid(table["reason"])).to_pylist():
                bad += 1
                if bad <= UNREADABLE_SAID:
                    say(f"unreadable: '{row['path']}' {row['reason']}")
            if far.done(table.num_rows):
                unreadable = f", {bad} could not be read" if bad else ""
                say(f"predicted {done - bad} of {listing.num_rows} images{unreadable}, {far.seconds:.0f} s{far.to_go()}")
    rows = pa.concat_tables(tables)
    assert rows.num_rows == listing.num_rows, "rows are missing"
    return rows.take(pc.index_in(listing["id"], value_set=rows["path"].combine_chunks()))
