"""The trained models of an output folder, and which of them are still to be trained."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from dmat_ray.attack import require_possible
from dmat_ray.config import Config, TrainingConfig
from dmat_ray.data import set_reader
from dmat_ray.data.epochs import held_out_positions
from dmat_ray.data.manifold_set import steps_per_epoch
from dmat_ray.errors import UserError, first_line
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.networks import classifiers
from dmat_ray.rng import Draws
from dmat_ray.storage import Location, Place, at, set_folder
from dmat_ray.storage.folders import fetched, replace_folder
from dmat_ray.training.trainer import check_inputs
from dmat_ray.types import Batch


def models_folder(config: Config) -> Location:
    """Where trained models end up, each in a folder of its name."""
    return at(config.output) / "models"


def model_folder(config: Config) -> Location:
    """Where a trained model ends up."""
    return models_folder(config) / config.name


def named_folders(config: Config, given: Sequence[str]) -> Mapping[str, Location]:
    """Name -> folder of models given by their names under the output folder, or by folders or URLs.

    Raises UserError for one that is no model, or for two of one name.
    """
    root = models_folder(config)
    found = {PurePath(name).name: _named(root, name) for name in given}
    if len(found) < len(given):
        raise UserError(f"two of the models have the same name: {', '.join(given)}")
    for name, folder in found.items():
        if not folder.is_dir() and name in given:  # a name, and no path
            there = [folder.name for folder in root.folders() if (folder / checkpoint.RUN).is_file()]
            choices = f"; those of this output are {', '.join(there)}" if there else "; train one with jobs/train.py"
            raise UserError(f"there is no trained model at '{root / name}'{choices}")
        checkpoint.read_run(folder)
    return found


def _named(root: Location, name: str) -> Location:
    known = (root.local is not None or "/" not in name) and (root / name).is_dir()
    return at(str(root / name) if known else name)


def is_trained(config: Config) -> bool:
    """True if the model is there, finished, with these settings and this set."""
    folder = model_folder(config)
    if not (folder / checkpoint.RUN).is_file():
        return False
    run = checkpoint.read_run(folder)
    return bool(run["finished"]) and is_of(run, config, folder)


def is_of(run: dict[str, Any], config: Config, folder: Location) -> bool:
    """Whether the run.json of a folder says that it is of these settings, this generator and this set."""
    try:
        trained_settings.require_same_config(run["config"], config, folder)
        checkpoint.require_network_of(run, folder, unchanged=True)
        same_generator = run["generator_sha256"] == generators.fingerprint(config.generator.path)
        return bool(same_generator and run.get("set_sha256") == set_digest(config))
    except UserError:
        return False


def set_digest(config: Config) -> str:
    """What `ManifoldSet.sha256` of the output folder's set is."""
    return set_reader.digest(set_reader.read_manifest(set_folder(config)))


def untrained(configs: list[Config], say: Callable[[str], None], workers: int | None = None) -> list[Config]:
    """Those whose model is not there yet, checked against the set, for so many `workers` (null: as configured).

    Raises UserError for settings that do not fit the set, or names that clash.
    """
    names = [c.name for c in configs]
    if len(set(names)) < len(names) or "" in names:
        given = ", ".join(map(repr, names))
        raise UserError(f"every model needs a name of its own; given: {given}; give one by name=, or --name on a command line")
    todo = []
    for config in configs:
        if is_trained(config):
            say(f"{config.name}: is trained already and unchanged, nothing to do")
        else:
            todo.append(config)
    if todo:
        manifest = set_reader.read_manifest(set_folder(todo[0]))
        require_fit(todo, manifest, workers)
        for line in _trained_on(todo, manifest):
            say(line)
        for warning in set_reader.warnings_of_lost(manifest, "train"):
            say(warning)
    return todo


def _trained_on(configs: list[Config], manifest: Mapping[str, Any]) -> list[str]:
    """How many images there are to train on, and which are left out; rates that end elsewhere than the training, a batch larger
    than all of them, and the like.
    """
    usable = manifest["usable"].get("train", 0)
    poor = manifest["splits"].get("train", 0) - usable
    held_out = sorted({config.training.val_examples for config in configs})
    told = f"{' or '.join(str(usable - count) for count in held_out)} images to train on"
    if held_out[-1]:
        told += f", {' or '.join(map(str, held_out))} more held out (training.val_examples)"
    told += f"; {poor} that were projected poorly are left out (projection.poor_l1)" if poor else ""
    lines = [told]
    for settings in dict.fromkeys(config.training for config in configs):
        if settings.schedule == "piecewise" and settings.lr_epochs[-1] != settings.epochs:
            end, what = settings.lr_epochs[-1], "is cut off" if settings.lr_epochs[-1] > settings.epochs else "stays at its last"
            lines.append(
                f"note: the learning rate {what}: training.lr_epochs ends at {end:g}, training.epochs is {settings.epochs}"
            )
        if (images := usable - settings.val_examples) < settings.batch_size:
            more = f"note: training.batch_size {settings.batch_size} is more than all images to train on, {images}"
            lines.append(f"{more}: an epoch is one step of these")
        lines += [f"note: {line}" for line in _without_effect(settings)]
    return lines


def _without_effect(settings: TrainingConfig) -> Iterator[str]:
    """What is set and changes nothing of a training, a line each."""
    if never := settings.without_awp():
        yield never
    if settings.awp_warmup and not settings.awp_gamma:
        yield f"training.awp_warmup is {settings.awp_warmup} and delays nothing: training.awp_gamma is 0"
    if settings.best_metric != TrainingConfig().best_metric and settings.keep == "last" and settings.patience is None:
        yield f"training.best_metric is {settings.best_metric} and decides nothing: training.keep is last, training.patience null"


def require_fit(configs: Sequence[Config], manifest: Mapping[str, Any], workers: int | None = None) -> None:
    """Raise UserError for trainings that a set of this manifest does not allow, or that cannot run together.

    `workers` as in `untrained`.
    """
    channels, resolution, _ = manifest["shapes"]["on_manifold"]
    usable, tried = manifest["usable"].get("train", 0), set()
    for config in configs:
        set_reader.require_usable(manifest, set_folder(config), "train")
        count = workers or config.cluster.train_workers
        check_inputs(config, manifest, generators.fingerprint(config.generator.path), count)
        held_out_positions(usable, config.training)
        share = _least_share(usable - config.training.val_examples, config.training.batch_size, count)
        if (network := (config.classifier.fingerprint(), share, count)) not in tried:
            classes = len(manifest["class_names"])
            classifiers.require_trainable(config.classifier, channels, resolution, classes, share, count)
            tried.add(network)
        _require_terms(config, channels, resolution)
    if len({c.training.loader for c in configs}) > 1:
        raise UserError("training.loader must be the same for all methods that are trained together")


def _least_share(examples: int, batch_size: int, workers: int) -> int:
    """Images that a worker gets of an epoch's smallest batch, 2 at most: of one some networks have no batch statistics."""
    smallest = examples // steps_per_epoch(examples, batch_size)
    return min(2, math.ceil(smallest / workers))


def _require_terms(config: Config, channels: int, resolution: int) -> None:
    """Raise UserError for a term that attacks in a way that cannot run on such images."""
    blank = Batch(["blank"], torch.zeros(1, channels, resolution, resolution), torch.zeros(1, dtype=torch.int64))
    for name, term in config.objective.adversarial.items():
        if term.weight > 0:
            try:
                require_possible(term, blank, Draws(config.training.seed, blank.id, "train/try"))
            except (UserError, RuntimeError) as error:
                size = f"{channels} x {resolution} x {resolution}"
                raise UserError(f"objective term {name} on {size} images: {first_line(error)}") from None


def tell_of_older(config: Config, say: Callable[[str], None]) -> None:
    """Say so if a model, which `untrained` has found to be another, is about to be replaced."""
    if (model_folder(config) / checkpoint.RUN).is_file():
        say(f"{config.name}: there is a model of this name, of other settings or another set; this one will take its place")


def publish(source: Place, folder: Location) -> None:
    """The model without its optimiser state, in place of an older one, whole or not at all."""

    def write(fresh: Path) -> None:
        fresh.mkdir(parents=True)
        shutil.copy2(fetched(source) / checkpoint.MODEL, fresh / checkpoint.MODEL)
        checkpoint.seal(fresh, checkpoint.RUN, checkpoint.read_run(source))

    replace_folder(folder, write)
