"""Encoder training on Ray Train: workers on parts of each batch of samples, checkpoints, errors in MLflow."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from dmat_ray.cluster import one_training, session
from dmat_ray.cluster.context import RayContext, StoppedError
from dmat_ray.cluster.events import no_retry_of_user_errors
from dmat_ray.config import Config, EncoderConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import encoder_trainer, generators
from dmat_ray.manifold.encoder import CARD, FOLDER, load_encoder, read_card, save_encoder
from dmat_ray.models.checkpoint import versions
from dmat_ray.storage import Location, at
from dmat_ray.storage.files import text_digest
from dmat_ray.storage.folders import remove_folder, sweep_removed
from dmat_ray.storage.lease import Lease, sole
from dmat_ray.wording import to_go

RUN_NAME = "encoder"
USEFUL = 0.8  # share of the error of the mean w, above which a start is not worth its name


def worker(settings: dict[str, Any]) -> dict[str, float] | None:
    """What every Ray Train worker runs; the last checkpoint holds the result. Rank 0 returns its errors on fresh samples."""
    config = Config.model_validate(settings["config"])
    torch.set_num_threads(config.cluster.threads_per_worker)
    with no_retry_of_user_errors(settings["mailbox"]) as go, suppress(StoppedError):
        if go:
            context = RayContext(RUN_NAME, settings["mailbox"])
            generator = generators.load_configured(config.generator, context.device)
            sha = generators.fingerprint(config.generator.path)
            encoder = encoder_trainer.train_encoder(config.encoder, generator, sha, context)
            if context.rank == 0:
                return encoder_trainer.fresh_errors(encoder, generator, config.encoder)
    return None


def describe(metrics: dict[str, float], kimg: float) -> str:
    """One line about a report."""
    return (
        f"{metrics['kimg']:.3g} of {kimg:g} thousand samples, loss {metrics['loss']:.3g}, mean |g(E(x)) - x| "
        f"{metrics['l1']:.4f}, {metrics['images_per_second']:.0f} samples/s{to_go(metrics, kimg)}"
    )


def is_trained(config: Config, folder: Location) -> bool:
    """True if `folder` holds the encoder that these settings make for this generator.

    Raises UserError if it holds another one, which training would replace.
    """
    if not (folder / CARD).is_file():
        return False
    card = read_card(folder)
    sha = generators.fingerprint(config.generator.path)
    same = EncoderConfig.recorded(card.get("training")) == config.encoder.model_dump(mode="json")
    if same and card.get("generator_sha256") == sha:
        load_encoder(folder, sha)
        return True
    raise UserError(
        f"'{folder}' holds an encoder of another generator, or of other settings under encoder.*; give another --output, or "
        "--overwrite"
    )


def _label(config: Config) -> str:
    """What folders of trainings of these settings, for this generator, are called up to the number of workers."""
    sha = generators.fingerprint(config.generator.path)
    digest = text_digest(f"{sha} {config.generator.precision} {config.encoder.fingerprint()}")[:12]
    return f"encoder-{digest}-"


def _sweep(config: Config) -> None:
    """Remove what trainings have left that were killed in their last moment, when the encoder was there, or in the middle of
    this. Under the lease of the encoder's folder.
    """
    storage, label = at(config.output) / "train", _label(config)
    sweep_removed(storage, f"{label}*")
    for left in storage.folders():
        if left.name.startswith(label):
            remove_folder(left)


def train(config: Config, folder: Location, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train an encoder for `config.generator`, with its session, and write it to `folder`; returns its card.

    A rerun after a crash goes on from the latest checkpoint. Asked to stop (SIGTERM, Ctrl-C) it has one written, and raises
    SystemExit. Raises UserError while another training, of whatever settings, writes to `folder`.
    """
    with sole(folder) as lease, session.connected(config.cluster, config.output, say, (session.TRAIN,)):
        return _train(config, folder, lease, command, say)


def _train(config: Config, folder: Location, lease: Lease, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    sha, settings, began = generators.fingerprint(config.generator.path), config.encoder, time.monotonic()
    place = at(config.output) / "train" / f"{_label(config)}{config.cluster.train_workers}"
    with one_training.tracked(config, "train_encoder", place, lease, say) as training:
        found = training.fit(worker, dict, encoder_trainer.PROGRESS, lambda metrics: [describe(metrics, settings.kimg)])
        if found is None:
            return {}  # which is where the signal takes effect
        last, errors = found
        encoder = encoder_trainer.result_of(last, settings, generators.load_configured(config.generator), sha)
        card = {
            "command": command,
            "generator": config.generator.model_dump(mode="json"),
            "generator_sha256": sha,
            "training": settings.model_dump(mode="json"),
            "workers": config.cluster.train_workers,
            "seconds": round(time.monotonic() - began),
            "fresh_samples": errors,
            "versions": versions(),
        }
        values = {f"fresh_{key}": value for key, value in errors.items()}
        training.publish(folder, "encoder", lambda fresh: save_encoder(fresh, encoder, card), values, settings.kimg)
        remove_folder(place)
    return card


def train_encoder(config: Config, overwrite: bool, command: str, say: Callable[[str], None]) -> Location:
    """Encoder training, tracked, unless the encoder is there. Returns its folder."""
    folder = at(config.output) / FOLDER
    encoder_trainer.check_workers(config.encoder, config.cluster.train_workers)
    if not overwrite and is_trained(config, folder):
        with suppress(UserError), sole(folder):  # nothing of a training that is at work
            _sweep(config)
        say("is trained already and unchanged, nothing to do")
        return folder
    generators.load_configured(config.generator)  # a bad generator ends here, before Ray starts
    found = train(config, folder, command, say)["fresh_samples"]
    say(f"on fresh samples mean |g(E(x)) - x| is {found['l1']:.4f}, {found['l1_of_mean']:.4f} for the mean of w")
    if found["l1"] > USEFUL * found["l1_of_mean"]:
        say("warning: that is hardly better than to start at the mean of w; raise encoder.kimg, encoder.width and width_max")
    return folder
