"""What an evaluation's rows take of the driver's memory and time: read, sorted, judged and put into tables.

    python benchmarks/evaluation_rows.py [--images 5000] [--models 4] [--suite digits_full] [--classes 1000]

Nothing is attacked and Ray is not started: each batch's file is made of random answers, as an actor writes it, and then as the
driver of `jobs/evaluate.py` holds it. Memory is this process's at its peak, above what it had before the first file.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from dmat_ray import cli
from dmat_ray.cluster import evaluate
from dmat_ray.config import EvaluationConfig
from dmat_ray.evaluation import checks, evaluation, units
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.row_order import in_order, pieces
from dmat_ray.reports import report_values


def answers(unit: units.Unit, ids: np.ndarray, labels: np.ndarray, classes: int, rng: np.random.Generator) -> pa.Table:
    """The rows of a unit, half of them right."""
    at = np.array(unit.positions)
    label, count = labels[at], len(at)
    right = rng.random(count) < 0.5
    prediction = np.where(right, label, (label + rng.integers(1, classes, count)) % classes)
    columns: dict[str, Any] = {name: [getattr(unit, name)] * count for name in ("model", "set", "attack")}
    columns |= {"source": columns["model"], "id": ids[at], "label": label, "prediction": prediction, "correct": right}
    columns |= {"clean_prediction": label, "seed": np.zeros(count, int), "lpips": [None] * count}
    noise = {name: rng.random(count).astype(np.float32) for name in evaluation.SCHEMA.names if name not in columns}
    return pa.table({name: {**columns, **noise}[name] for name in evaluation.SCHEMA.names}, schema=evaluation.SCHEMA)


def files(config: EvaluationConfig, work: list[units.Unit], images: int, classes: int) -> Iterator[pa.Table]:
    """What the driver reads, a file a unit."""
    rng = np.random.default_rng(0)
    ids, labels = np.array([f"test/{i:08d}.png" for i in range(images)], dtype=object), rng.integers(0, classes, images)
    for unit in work:
        content = evaluate._as_parquet(answers(unit, ids, labels, classes, rng))
        yield pq.read_table(pa.BufferReader(content)).cast(evaluation.SCHEMA)


def shown(results: Results, classes: int) -> None:
    """What the page computes of the rows."""
    for table in report_values.tables(results, results.models):
        report_values.differences(results, table)
        report_values.confusions(results, table, [str(k) for k in range(classes)])


def timed(what: str, function: Callable[[], Any]) -> Any:
    """What a function returns; its seconds are told."""
    began = time.monotonic()
    found = function()
    print(f"{what}: {time.monotonic() - began:.1f} s, {peak() / 2**20:.0f} MiB at most so far", flush=True)
    return found


def peak() -> int:
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--suite", default="digits_full")
    parser.add_argument("--classes", type=int, default=1000)
    given = parser.parse_args()

    config = cli.settings("demo", evaluation={"suites": [given.suite]}).evaluation
    names, every = [f"model-{k}" for k in range(given.models)], np.arange(given.images)
    work = units.units(names, list(units.rows_to_run(config)), config, lambda *of: every)
    before = psutil.Process().memory_info().rss
    rows = timed("files made and read", lambda: pa.concat_tables(pieces(files(config, work, given.images, given.classes))))
    count = rows.num_rows
    print(f"{count:,} rows of {len(work):,} files, {rows.nbytes / count:.0f} bytes each")
    rows = timed("sorted", lambda: in_order(rows))
    results = Results(rows, config)
    timed("judged", lambda: checks.judge(results, []))
    timed("tables, differences and confusions", lambda: shown(results, given.classes))
    timed("written", lambda: evaluate._as_parquet(rows))
    print(f"{(peak() - before) / count:.0f} bytes a row at most")


if __name__ == "__main__":
    main()
