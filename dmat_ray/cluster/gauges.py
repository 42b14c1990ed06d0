"""The work in numbers for whoever watches a cluster: as Ray's own metrics, which Prometheus scrapes, and of machines for MLflow.

All of Ray's are set by the driver, so the head's endpoint has them; Ray puts `ray_` before their names. deploy/grafana.json draws
them.
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from functools import cache

import psutil
import ray
import torch
from ray.util.metrics import Counter, Gauge

# name: what it is, and its labels
GAUGES = {
    "dmat_ray_epoch": ("Epochs that a training has done.", ("model",)),
    "dmat_ray_loss": ("Mean loss of the last epoch.", ("model",)),
    "dmat_ray_accuracy": ("Share of images that were right in the last epoch, of training or held-out ones.", ("model", "of")),
    "dmat_ray_learning_rate": ("Learning rate of the last epoch.", ("model",)),
    "dmat_ray_examples_per_second": ("Training examples a second in the last epoch, all workers together.", ("model",)),
    "dmat_ray_gpu_memory_bytes": ("GPU memory in use on rank 0's GPU at the end of the last epoch.", ("model",)),
    "dmat_ray_test_accuracy": (
        "Share of test images that withstand an attack.",
        ("model", "set", "attack"),
    ),
    "dmat_ray_trial_objective": ("What a search raises, as of a trial's last epoch.", ("search", "trial", "objective")),
}
COUNTERS = {
    "dmat_ray_images_projected": ("Images of the on-manifold set that have been projected.", ()),
    "dmat_ray_images_rejected": ("Images that could not be.", ()),
    "dmat_ray_batches_evaluated": ("Batches, of one attack on one model, that have been evaluated.", ("model",)),
}
GPU_MEMORY = "system/gpu_0_memory_usage_megabytes"


AGAIN_S = 3.0

_values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}


@cache
def _gauge(name: str) -> Gauge:
    about, labels = GAUGES[name]
    return Gauge(name, description=about, tag_keys=labels)


def _set(name: str, value: float, tags: Mapping[str, str]) -> None:
    """Set a gauge, now and again: Ray forgets one that has not been set for two of its reports, some 20 s."""
    _values[name, tuple(tags.items())] = value
    _gauge(name).set(value, dict(tags))
    _keep()


@cache
def _keep() -> None:
    """Start the thread that sets gauges again, once."""

    def again() -> None:
        while True:
            time.sleep(AGAIN_S)
            if ray.is_initialized():
                for (name, tags), value in list(_values.items()):
                    _gauge(name).set(value, dict(tags))

    threading.Thread(target=again, daemon=True, name="gauges").start()


@cache
def _counter(name: str) -> Counter:
    about, labels = COUNTERS[name]
    return Counter(name, description=about, tag_keys=labels)


def training(model: str, metrics: Mapping[str, float], machine: Mapping[str, float]) -> None:
    """An epoch of a training, and what `of_machine` said of rank 0's."""
    tags = {"model": model}
    named = {"epoch": "epoch", "train_loss": "loss", "lr": "learning_rate", "examples_per_second": "examples_per_second"}
    for key, name in named.items():
        if key in metrics:
            _set(f"dmat_ray_{name}", metrics[key], tags)
    for key, value in metrics.items():
        if key.startswith("val_"):
            _set("dmat_ray_accuracy", value, {**tags, "of": f"held out, {key.removeprefix('val_')}"})
        elif key.startswith("train_") and key.endswith("_accuracy"):
            of = key.removeprefix("train_").removesuffix("_accuracy")
            _set("dmat_ray_accuracy", value, {**tags, "of": f"training, {of}"})
    if GPU_MEMORY in machine:
        _set("dmat_ray_gpu_memory_bytes", 1e6 * machine[GPU_MEMORY], tags)


def projected(images: int, rejected: int) -> None:
    """So many more images."""
    for name, value in (("projected", images), ("rejected", rejected)):
        if value:
            _counter(f"dmat_ray_images_{name}").inc(value)


def evaluated(model: str) -> None:
    """One more batch."""
    _counter("dmat_ray_batches_evaluated").inc(1, {"model": model})


def tested(model: str, set_name: str, attack: str, accuracy: float) -> None:
    """Result of an evaluation, a share of 1."""
    _set("dmat_ray_test_accuracy", accuracy, {"model": model, "set": set_name, "attack": attack})


def trial(search: str, name: str, values: Mapping[str, float]) -> None:
    """Objectives of a trial, shares of 1."""
    for objective, value in values.items():
        _set("dmat_ray_trial_objective", value, {"search": search, "trial": name, "objective": objective})


def of_machine(device: torch.device) -> dict[str, float]:
    """This machine's load since it was last asked, under the names that MLflow's page of system metrics knows."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # NVIDIA's library may be absent, or forbidden to answer; no training ends for that
            free, total = torch.cuda.mem_get_info(device)
            found |= {GPU_MEMORY: (total - free) / 1e6, "system/gpu_0_memory_usage_percentage": 100 * (1 - free / total)}
            found["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found
