"""Generator training on Ray Train: workers on parts of each batch, checkpoints, samples in MLflow."""

import contextlib
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmat_ray.cluster import one_training, session
from dmat_ray.cluster.context import RayContext, StoppedError, stored_checkpoints
from dmat_ray.cluster.events import no_retry_of_user_errors, send
from dmat_ray.config import Config
from dmat_ray.manifold import trained_on
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.diversity import warning_of_collapse
from dmat_ray.manifold.gan_folder import TRUNK, extends, settle, trunk_of
from dmat_ray.manifold.gan_images import ImageCache, card_of, check, sweep, training_name
from dmat_ray.manifold.gan_progress import PROGRESS, result_of
from dmat_ray.manifold.gan_trainer import DEAD_END, train_generator
from dmat_ray.manifold.generators import save_generator
from dmat_ray.manifold.samples import sample_grid
from dmat_ray.models.checkpoint import versions
from dmat_ray.storage import Location, at, local_output
from dmat_ray.storage.files import read_json
from dmat_ray.storage.lease import Lease, sole
from dmat_ray.wording import number_of, to_go

SAMPLES = "samples.png"
RUN_NAME = "generator"
COLLAPSED = "train it anew with gan.ada_target 0.6, a higher gan.r1_gamma or gan.mode_seeking, or more images of a class"
FEW = 1000  # images, by which a generator is hardly judged


def worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs; the checkpoint of the last snapshot holds the result."""
    config = Config.model_validate(settings["config"])
    mailbox = settings["mailbox"]
    torch.set_num_threads(config.cluster.threads_per_worker)

    def show(average: LatentGenerator, kimg: float, quality: dict[str, float]) -> None:
        send(mailbox, {"kimg": kimg, "samples": sample_grid(average, config.gan.seed)})

    with no_retry_of_user_errors(mailbox) as go, contextlib.suppress(StoppedError):
        if go:
            images, labels = ImageCache(Path(settings["images"]), "", {}).open()
            shorter, trunk = settings["shorter"], Path(settings["trunk"])
            train_generator(config.gan, images, labels, RayContext(RUN_NAME, mailbox), show, shorter=shorter, trunk=trunk)


def describe(metrics: dict[str, float], kimg: float) -> str:
    """One line about a report: what it says of losses, and of quality where it was measured."""
    names = ("loss_g", "loss_d", "real_sign", "augment", "fid", "precision", "recall", "diversity", "images_per_second")
    text = ", ".join(f"{name} {metrics[name]:.3g}" for name in names if name in metrics)
    return f"{metrics['kimg']:.3g} of {kimg:g} thousand images, {text}{to_go(metrics, kimg)}"


def _warnings(metrics: dict[str, float], config: Config) -> list[str]:
    """What a report gives reason to say besides its numbers."""
    said = []
    rest = "an earlier snapshot is kept if one is better" if config.gan.keep == "best" else "gan.keep best would leave it out"
    if warning := warning_of_collapse(metrics, f"here; {rest}"):
        said.append(warning)
    if not math.isfinite(metrics["loss_g"] + metrics["loss_d"]):
        said.append(f"warning: training has diverged and ends with its best snapshot; {DEAD_END}")
    return said


def train(config: Config, folder: Path, command: str, say: Callable[[str], None], *, anew: bool = False) -> Path:
    """Train a generator on the training split of `config.data`, with its session, and write it to `folder`.

    A rerun after a crash goes on from the latest snapshot, and one of more `gan.kimg` than the generator that is there from the
    last snapshot of that before its rates fell, unless it is to begin `anew`. Asked to stop (SIGTERM, Ctrl-C) it has a checkpoint
    written, and raises SystemExit.
    """
    storage = local_output(config, "jobs/train_generator.py") / "train"
    # one at a time, whatever its settings: the decoded images, which the first to end removes, are the same for many
    with sole(folder) as lease:
        cache = check(config, storage)  # bad data ends here, before Ray starts
        sweep(storage, cache.folder)
        with session.connected(config.cluster, config.output, say, (session.TRAIN,)):
            return _train(config, folder, storage, cache, lease, command, say, anew)


def _train(
    config: Config,
    folder: Path,
    storage: Path,
    cache: ImageCache,
    lease: Lease,
    command: str,
    say: Callable[[str], None],
    anew: bool,
) -> Path:
    if cache.ignored:
        say(f"not taken: {cache.ignored}")
    if cache.rejected:
        name, reason = next(iter(cache.rejected.items()))
        say(f"{number_of(len(cache.rejected), 'image')} cannot be read, left out; the first: '{name}' {reason}")
    place = at(storage) / training_name(config, cache.digest)
    grids = folder.with_name(f"{folder.name}_samples") / place.name

    def keep_samples(event: dict[str, Any]) -> None:
        grids.mkdir(parents=True, exist_ok=True)
        file = grids / f"samples-{round(event['kimg'] * 1000):09d}.png"
        file.write_bytes(event["samples"])
        training.run.artifact(file, "samples")

    def lines(metrics: dict[str, float]) -> list[str]:
        return [describe(metrics, config.gan.kimg), *_warnings(metrics, config)]

    with one_training.tracked(config, "train_generator", place, lease, say) as training:
        prepare = functools.partial(_prepare, config, folder, place, cache, say, anew)
        found = training.fit(worker, prepare, PROGRESS, lines, keep_samples)
        if found is None:
            return folder  # which is where the signal takes effect
        generator, kept = result_of(found[0], config.gan)
        fid = f", FID {kept['fid']:.3g}" if "fid" in kept else ""
        say(f"keeping the snapshot of {kept['kimg']:.3g} thousand images (gan.keep {config.gan.keep}){fid}")
        if warning := warning_of_collapse(kept, f"in the snapshot that is kept; {COLLAPSED}"):
            say(warning)
        if "fid" in kept and (count := len(cache.open()[1])) < FEW:
            say(
                f"note: it is judged by the {count} images that it learned from, and one that repeats so few scores well; how "
                "close it comes to new images, the projection of the test split tells"
            )
        card = {
            "command": command,
            **card_of(config, cache),
            "quality": kept,
            "seed": config.gan.seed,
            "versions": versions(),
        }

        def write(fresh: Path) -> None:
            save_generator(fresh, generator, card)
            shutil.copyfile(cache.folder / trained_on.IMAGES, fresh / trained_on.IMAGES)
            (fresh / SAMPLES).write_bytes(sample_grid(generator, config.gan.seed))

        values = {f"kept_{key}": float(value) for key, value in kept.items()}
        training.publish(folder, "generator", write, values, kept["kimg"])
        # that of the generator before, only now: until this one is there that one is trained for longer from it
        shutil.rmtree(trunk_of(folder), ignore_errors=True)
        settle(config, folder, storage)
        shutil.rmtree(cache.folder, ignore_errors=True)
    return folder


def _prepare(
    config: Config, folder: Path, place: Location, cache: ImageCache, say: Callable[[str], None], anew: bool
) -> dict[str, Any]:
    """What the workers are told of where their images are, and what they go on from; says how long that will be."""
    say(
        f"training on {len(cache.open()[1])} images, of which {config.gan.kimg:g} thousand are shown in all: a line "
        f"every {config.gan.report_kimg:g} thousand, a snapshot every "
        f"{config.gan.snapshot_kimg:g} thousand (on CPUs that may be hours)"
    )
    shorter = None if anew or not extends(config, folder) else str(trunk_of(folder))
    if shorter is not None and not stored_checkpoints(place):
        many = read_json(trunk_of(folder) / PROGRESS)["history"][-1]["kimg"]
        say(f"going on from the training of '{folder}', with its first {many:.3g} thousand images")
    return {"images": str(cache.folder), "trunk": str(place / TRUNK), "shorter": shorter}
