"""What does Ray Train cost beside the same loop in one process?

    python benchmarks/train_overhead.py [--steps 200] [--batch 16] [--repeats 2] [--device cuda] [--json FILE]

Both sides train the small network of the demo, with the shipped generator, on digits projected in one step: in this process with
`LocalContext`, and with one worker on Ray Train, in turns, the other one first each time. A time is that from the end of one step
to the end of the next, with all that comes in between; medians and means over an epoch without its first steps. The process's own
processor time, which the load of other processes disturbs less, has in it what Ray does in the worker, but not what its other
processes take from it.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generator import prepared, quartiles, record
from torch import Tensor

from dmat_ray import cli
from dmat_ray.cluster.environment import prepare_environment
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.training.step import TrainingStep

RAY_GOAL = 1.05
SKIPPED = 20  # first steps of an epoch


@contextlib.contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Inside, every step of a training notes when it ended, by the wall clock and the process's; afterwards that is in `file`."""
    plain, moments = TrainingStep.__call__, list[tuple[float, float]]()

    def noted(self: TrainingStep, *args: Any) -> dict[str, Tensor]:
        metrics = plain(self, *args)
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append((time.perf_counter(), time.process_time()))
        return metrics

    TrainingStep.__call__ = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingStep.__call__ = plain  # type: ignore[method-assign]
        np.savetxt(file, moments, fmt="%.9f")


def train_here(config: Config, file: Path) -> None:
    """A training in this process."""
    from dmat_ray.data import manifold_set
    from dmat_ray.manifold import generators
    from dmat_ray.training.trainer import train

    context = LocalContext(file.with_suffix(""))
    context.device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    data = manifold_set.open_set(Path(config.output) / "on_manifold_set", "train")
    generator = generators.load_configured(config.generator, context.device)
    with recorded(file):
        train(config, data, generator, generators.fingerprint(config.generator.path), context)


def train_on_ray(config: Config, file: Path) -> None:
    """The same on Ray Train, as the job does it."""
    from dmat_ray.cluster import jobs
    from dmat_ray.cluster import train as stage

    plain = stage.worker

    def worker(settings: dict[str, Any]) -> None:
        with recorded(file):
            plain(settings)

    stage.worker = worker
    try:
        jobs.train([config], lambda line: None)
    finally:
        stage.worker = plain


def compare_with_ray(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every training, printed."""
    from dmat_ray.cluster import jobs

    count, size = arguments.steps, str(arguments.batch)
    if count <= SKIPPED:
        raise UserError(f"--steps {count}: the first {SKIPPED} are not counted")
    options = [
        *("--data.train_limit", count * int(size), "--data.test_limit", 20, "--generator.precision", "fast"),
        *("--projection.steps", 1, "--projection.lpips", 0, "--projection.start", "mean", "--projection.poor_l1", 1),
        *("--projection.shard_size", 400, "--cluster.projection_actors", 1, "--cluster.train_workers", 1),
        *("--training.epochs", 1, "--training.batch_size", size, "--training.val_examples", 0),
        *("--cluster.gpus_per_worker", 1 if arguments.device == "cuda" else 0),
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:

        def config_of(name: str) -> Config:
            return cli.parse("", ["--preset", "demo", "dmat", "--output", root, "--name", name, *map(str, options)])[0]

        jobs.project(config_of("set"), lambda line: None)
        print(f"\nDMAT steps of digits_cnn and mnist32, 32x32, batch {size}: {count} steps, the first {SKIPPED} not counted")
        for repeat in range(arguments.repeats):
            turns = [("local", train_here), ("ray", train_on_ray)]
            for name, train in turns if repeat % 2 == 0 else turns[::-1]:
                file = Path(root) / f"{name}{repeat}.moments"
                train(config_of(f"{name}{repeat}"), file)
                times, own = np.diff(np.loadtxt(file), axis=0)[SKIPPED - 1 :].T
                row = {"side": name, "repeat": repeat, "steps": len(times), "median": float(np.median(times))}
                row |= {"mean": float(times.mean()), "processor": float(np.median(own)), "quartiles": quartiles(times)}
                rows.append(row)
                print(
                    f"{name:6} {row['median'] * 1000:7.2f} ms a step (median), {row['mean'] * 1000:7.2f} (mean); "
                    f"{row['processor'] * 1000:7.2f} of the processor (median)",
                    flush=True,
                )
    for statistic in ("median", "mean", "processor"):
        here, there = (np.array([row[statistic] for row in rows if row["side"] == name]) for name in ("local", "ray"))
        ratio = float(np.median(there / here))
        print(f"ray to local, by {statistic}: {ratio:.3f} ({', '.join(f'{r:.3f}' for r in there / here)})")
        if statistic == "median":
            print(f"goal: at most {RAY_GOAL}: {'reached' if ratio <= RAY_GOAL else 'missed'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of a training")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--repeats", type=int, default=2, help="trainings of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    arguments = parser.parse_args()
    prepared(arguments)
    prepare_environment()
    record(arguments, compare_with_ray(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
