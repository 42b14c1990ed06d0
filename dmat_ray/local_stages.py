"""The stages from images to a model without Ray: in this process, or a training in each of several under torchrun."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed

from dmat_ray import inputs
from dmat_ray.config import Config
from dmat_ray.data import manifold_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators, set_maker
from dmat_ray.models import checkpoint
from dmat_ray.rng import kept_apart
from dmat_ray.storage import Location, local_output, set_folder
from dmat_ray.storage.folders import remove_folder, sweep_removed
from dmat_ray.storage.lease import sole
from dmat_ray.training import trained_models
from dmat_ray.training.trainer import describe
from dmat_ray.training.trainer import train as training_loop


def make_set(config: Config) -> Location:
    """Project the images of `config.data` into an on-manifold set, and return its folder, OUTPUT/on_manifold_set.

    The set that jobs/project.py makes; on the current GPU if there is one. Lines go to standard error. A set that is there with
    these settings is not made again, and one that was interrupted is finished. Raises UserError for data, a generator, an encoder
    or LPIPS weights that do not fit, and for a folder that was begun with other settings.

    >>> from dmat_ray import make_set, open_set, settings
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> train = open_set(make_set(config), "train")
    >>> train.manifest["splits"], train.w[0].shape, train.manifest["means"]["l1"] < 0.1  # the mean of |g(w) - x|
    ({'test': 50, 'train': 150}, (8, 64), True)
    """
    inputs.require_config(config)
    inputs.require_gradients("a projection")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_maker.make(config, device, lambda line: print(line, file=sys.stderr, flush=True))
    return set_folder(config)


def train(config: Config, *, heed_sigterm: bool = False) -> Location:
    """Train a classifier on the set that the settings name (see `make_set`), and return its folder, OUTPUT/models/NAME.

    The same loop as of jobs/train.py, and with one worker the same model (of several each normalises its own part of a batch); on
    the current GPU if there is one. A line for every epoch goes to standard error. A model that is there with these settings is
    not trained again, one of other settings is replaced; a training that was interrupted goes on from its newest checkpoint, in
    OUTPUT/local/NAME, a folder that is removed once the model is there. Under torchrun no process returns before that. With
    `heed_sigterm` SIGTERM makes it write a checkpoint and end with exit code 143; one that comes after the last step takes effect
    when the model is there. Raises UserError for settings that do not fit the set, or are not those of the training that was
    interrupted, or while another process trains this, and NotFiniteError, with step and term, if training diverges.

    >>> from dmat_ray import load_classifier, make_set, settings, train
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> _ = make_set(config)
    >>> network, run = load_classifier(train(config))
    >>> first, *_, last = [epoch["train_image_accuracy"] for epoch in run["history"]]  # under its own attack
    >>> last > first + 0.3
    True
    """
    inputs.require_config(config)
    inputs.require_gradients("a training")
    if config.training.loader != "memory":
        raise UserError("training.loader stream reads through Ray Data: use jobs/train.py, or set training.loader memory")
    folder = local_output(config, "dmat_ray.train or jobs/train_local.py") / "local" / config.name
    context = LocalContext(folder, lambda metrics: context.say(describe(config.name, metrics, config.training.epochs)))
    model = trained_models.model_folder(config)
    heeding = context.heeding_sigterm() if heed_sigterm else nullcontext()
    with heeding, kept_apart(context.device), torch.enable_grad():  # also within a caller's no_grad
        todo = trained_models.untrained([config], context.say, context.world_size)
        if context.rank == 0:
            _sweep(folder, context.checkpoints(), model)
        if context.world_size > 1:
            torch.distributed.barrier()  # or another looks for checkpoints where there will be none
        if todo:
            trained_models.tell_of_older(config, context.say)
            data = manifold_set.open_set(set_folder(config), "train", images=config.training.images)
            generator = generators.load_configured(config.generator, context.device)
            # another training of this name would put its checkpoints in the place of ours
            with sole(folder) if context.rank == 0 else nullcontext():
                folder.mkdir(parents=True, exist_ok=True)
                training_loop(config, data, generator, generators.fingerprint(config.generator.path), context)
                if context.rank == 0:
                    trained_models.publish(context.checkpoints()[0], model)
                    remove_folder(folder)
                    context.say(f"model in {model}")
            if context.world_size > 1:
                torch.distributed.barrier()
    return model


def _sweep(folder: Path, checkpoints: Sequence[Path], model: Location) -> None:
    """Remove the checkpoints of a training that was killed when its model was there, and before they were removed: they would
    keep one of other settings from its place. Nothing of a training that has yet to end, or is at work.
    """
    sweep_removed(folder.parent, folder.name)
    if checkpoints and _is_published(checkpoints[0], model):
        with suppress(UserError), sole(folder):
            if _is_published(checkpoints[0], model):  # still
                remove_folder(folder)


def _is_published(newest: Path, model: Location) -> bool:
    """Whether a model is what this checkpoint, the last of a training, was published as."""
    try:
        run, published = (checkpoint.read_run(place) for place in (newest, model))
    except UserError:
        return False
    # each has the digests of its own files
    return {**run, "sha256": None} == {**published, "sha256": None}
