"""Search: Ray Tune over Ray Train runs, each trial a child run in MLflow."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from dmat_ray import cli, presets
from dmat_ray.cluster import session, tracking
from dmat_ray.cluster.events import listen, send
from dmat_ray.cluster.train import worker
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.models import untrained
from dmat_ray.storage import set_folder


def load_space(path: str) -> ModuleType:
    """The Python file of a search space; raises UserError if it does not define space() and settings()."""
    if not Path(path).is_file():
        raise UserError(f"tune.space '{path}' is no file; see tune_spaces/ for examples")
    spec = importlib.util.spec_from_file_location("tune_space", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("space", "settings"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"tune.space '{path}' does not define {name}()")
    return module


def trial_config(base: dict[str, Any], overrides: dict[str, Any], name: str, epochs: int) -> Config:
    """The base settings with a sample's values (by dotted name); raises UserError for keys and values that do not fit."""
    old = base["training"]
    # the whole schedule in the trial's few epochs: a trial must not be judged in the middle of its highest rates
    share = epochs / old["epochs"]
    shorter = {
        "lr_epochs": [k * share for k in old["lr_epochs"]],
        "lr_warmup": old["lr_warmup"] * share,
        "awp_warmup": int(old["awp_warmup"] * share),
    }
    layered = presets.merge(base, {"name": name, "training": shorter})
    for key, value in {**overrides, "training.epochs": epochs}.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layered = presets.merge(layered, nested)
    return cli.validate(layered)


def _first(value: Any) -> Any:
    """One value of a search domain, to check a space before anything starts."""
    if isinstance(value, dict) and set(value) == {"grid_search"}:
        return value["grid_search"][0]
    return value.sample() if hasattr(value, "sample") else value


def _trial(sample: dict[str, Any], *, base: dict[str, Any], overrides: Callable[..., Any], set_path: str, mailbox: str) -> None:
    """One trial, in a process of its own: a Ray Train run whose every report reaches Tune."""
    trial = ray.tune.get_context().get_trial_id()
    config = trial_config(base, overrides(sample), f"trial_{trial}", base["tune"]["epochs"])
    send(mailbox, {"run": config.name, "config": config.to_json(), "sample": sample})
    ray.train.torch.TorchTrainer(
        worker,
        train_loop_config={"configs": [config.to_json()], "set": set_path, "mailbox": mailbox},
        scaling_config=ray.train.ScalingConfig(
            num_workers=session.worker_count(config.cluster),
            elastic_resize_monitor_interval_s=config.cluster.resize_seconds,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=session.worker_resources(config.cluster),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(Path(config.output) / "tune" / "trials"),
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _fit(config: Config, base: dict[str, Any], space: ModuleType, domains: dict[str, Any], set_path: str, mailbox: str) -> Any:
    trainable = ray.tune.with_parameters(_trial, base=base, overrides=space.settings, set_path=set_path, mailbox=mailbox)
    results = ray.tune.Tuner(
        ray.tune.with_resources(trainable, {"CPU": 0.5}),
        param_space=domains,
        tune_config=ray.tune.TuneConfig(
            metric=config.tune.metric,
            mode="max",
            num_samples=config.tune.num_samples,
            max_concurrent_trials=config.tune.max_concurrent,
        ),
        run_config=ray.tune.RunConfig(
            name=Path(config.tune.space).stem,
            storage_path=str(Path(config.output) / "tune"),
            verbose=0,
        ),
    ).fit()
    if results.errors:
        first = results.errors[0]
        raise RuntimeError(f"{len(results.errors)} trials failed; the first: {first}") from first
    return results


def search(config: Config, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the search; returns each trial's sample and last metrics, best first. Ray must be connected."""
    space = load_space(config.tune.space)
    config = config.model_copy(update={"output": str(Path(config.output).resolve())})
    base = presets.merge(config.to_json(), presets.load([space.PRESET])) if hasattr(space, "PRESET") else config.to_json()
    domains = space.space()
    probe = trial_config(base, space.settings({k: _first(v) for k, v in domains.items()}), "probe", config.tune.epochs)
    untrained([probe], say)
    if not probe.training.val_examples and config.tune.metric.startswith("val_"):
        raise UserError(f"tune.metric {config.tune.metric} needs training.val_examples, which is 0")
    if config.tune.metric == "val_latent" and probe.training.images == "natural":
        raise UserError("tune.metric val_latent needs training.images on_manifold: natural images have no exact w")
    with tracking.tracked(config, Path(config.tune.space).stem, "tune") as parent:
        children: dict[str, tracking.Run] = {}

        def finish(status: str) -> None:
            for child in children.values():
                child.finish(status)

        def handle(event: dict[str, Any]) -> None:
            name = event["run"]
            if "config" in event:
                child = tracking.open_run(Config.model_validate(event["config"]), name, "trial", parent)
                for key, value in event["sample"].items():
                    child.tag(f"sample.{key}", str(value))
                children[name] = child
                say(f"{name} starts: " + ", ".join(f"{k} = {v}" for k, v in event["sample"].items()))
                return
            if "text" in event:
                say(f"{name}: {event['text']}")
                return
            metrics = event["metrics"]
            children[name].metrics(metrics, step=int(metrics["epoch"]))
            value = metrics[config.tune.metric]
            say(f"{name}: epoch {metrics['epoch']:.0f}/{config.tune.epochs}, {config.tune.metric} {value:.3f}")

        try:
            with listen(handle) as mailbox:
                results = _fit(config, base, space, domains, str(set_folder(probe)), mailbox)
        except BaseException:
            finish("FAILED")
            raise
        finish("FINISHED")
        found = [{"sample": r.config, "metrics": r.metrics} for r in results]
        found.sort(key=lambda r: -r["metrics"][config.tune.metric])
        parent.metrics({f"best_{config.tune.metric}": found[0]["metrics"][config.tune.metric]}, step=0)
    return found
