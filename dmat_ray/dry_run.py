"""What --dry-run prints: the settings as they are understood, the resources of every stage, and what it takes at most."""

from collections.abc import Mapping, Sequence

import torch
import yaml
from rich.table import Table

from dmat_ray import estimate
from dmat_ray.config import Config
from dmat_ray.data.set_format import MANIFEST
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.data.sources import list_examples
from dmat_ray.evaluation.evaluation import require_fit
from dmat_ray.manifold import encoder_trainer, generators
from dmat_ray.manifold.gan_trainer import check_images, check_workers
from dmat_ray.models.checkpoint import load_classifier
from dmat_ray.reports.terminal import plain
from dmat_ray.storage import Place, set_folder


def sizes(config: Config) -> tuple[dict[str, int], int]:
    """Images of each split, and classes: of the on-manifold set if it is finished, else of the source.

    An output folder in an object store is not looked at.
    """
    folder = set_folder(config)
    if (config.manifold_set or folder.local) and (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return {split: manifest["usable"].get(split, 0) for split in ("train", "test")}, len(manifest["class_names"])
    listing = list_examples(config.data)
    return {split: listing.rows(split).num_rows for split in ("train", "test")}, len(listing.class_names)


def stages(
    config: Config,
    *,
    project: bool = False,
    train: Sequence[Config] = (),
    models: int = 0,
    trials: int = 0,
    corners: Sequence[Config] = (),
) -> list[estimate.Stage]:
    """Projection, trainings of these settings, evaluation of so many models, so many trials, each the dearest of `corners`."""
    counts, classes = sizes(config)
    generator = generators.load_configured(config.generator, "cpu")
    counted: dict[str, estimate.Passes] = {}  # the networks of methods and of a space are often one

    def passes(of: Config) -> estimate.Passes:
        key = of.classifier.fingerprint()
        if key not in counted:
            counted[key] = estimate.passes(of, generator, classes)
        return counted[key]

    one = passes(config)
    found = [estimate.project(config, one, sum(counts.values()))] if project else []
    found += [estimate.train(method, passes(method), generator, counts["train"]) for method in train]
    if trials:
        kinds = {corner.fingerprint(): corner for corner in corners}.values()
        each = [estimate.train(kind, passes(kind), generator, counts["train"]) for kind in kinds]
        dearest = max(each, key=lambda stage: stage.flops)
        found.append(estimate.search(config, dearest, trials))
        if config.tune.confirm_seeds:
            found.append(estimate.confirm(config, dearest))
    if models:  # none of which need be there
        likely = [passes(method) for method in train] + [passes(corner) for corner in corners if trials]
        network = max(likely or [one], key=lambda of: of.classifier_back)
        found.append(estimate.evaluate(config, [network] * models, counts["test"]))
    return found


def evaluation_stage(config: Config, folders: Mapping[str, Place]) -> estimate.Stage:
    """Evaluation of models that are there, each with its own network. Raises UserError for one that does not fit the images."""
    counts, classes = sizes(config)
    generator = generators.load_configured(config.generator, "cpu")
    shape = [generator.channels, generator.resolution, generator.resolution]
    one = estimate.passes(config, generator, classes)
    networks = []
    for name, folder in folders.items():
        network, run = load_classifier(folder)
        require_fit(run, {"shapes": {"on_manifold": shape}, "class_names": run["class_names"]}, name, config.evaluation)
        networks.append(estimate.with_classifier(one, network))
    return estimate.evaluate(config, networks, counts["test"])


def generator_stages(config: Config) -> list[estimate.Stage]:
    """Training of a generator. Raises UserError if the settings do not fit the data, of which no image is read."""
    check_workers(config.gan, config.cluster.train_workers)
    rows = list_examples(config.data, labelled=config.gan.architecture.num_classes > 0).rows("train")
    blank = torch.zeros(1, config.data.channels, config.data.resolution, config.data.resolution)
    check_images(config.gan, blank, torch.tensor(rows["label"].to_pylist()))
    return [estimate.train_generator(config, rows.num_rows)]


def encoder_stages(config: Config) -> list[estimate.Stage]:
    """Training of an encoder for the generator that the settings name."""
    encoder_trainer.check_workers(config.encoder, config.cluster.train_workers)
    return [estimate.train_encoder(config, generators.load_configured(config.generator, "cpu"))]


def text(config: Config, found: Sequence[estimate.Stage]) -> str:
    """The settings as YAML, then the stages as a table."""
    cluster = config.cluster
    needs = f"{cluster.threads_per_worker} CPU" + (f", {cluster.gpus_per_worker:g} GPU" if cluster.gpus_per_worker else "")
    table = Table(title="at most")
    for name in ("stage", "images", "work", "workers", "each needs", "TFLOP", *_known(config)):
        table.add_column(name, justify="left" if name in ("stage", "work", "each needs") else "right")
    total_hours, total_cost, total = 0.0, 0.0, 0.0
    for stage in found:
        hours = stage.hours(cluster.tflops) if cluster.tflops else 0.0
        cost = hours * (cluster.price or 0)
        total, total_hours, total_cost = total + stage.flops, total_hours + hours, total_cost + cost
        cells = _cells(config, stage.flops, hours, hours / stage.workers, cost)
        table.add_row(stage.name, f"{stage.images:,}", stage.work, str(stage.workers), needs, *cells)
    if len(found) > 1:
        wall = sum(stage.hours(cluster.tflops) / stage.workers for stage in found) if cluster.tflops else 0.0
        table.add_section()
        table.add_row("all", "", "", "", "", *_cells(config, total, total_hours, wall, total_cost))
    settings = yaml.safe_dump(config.to_json(), sort_keys=False, allow_unicode=True).rstrip()
    lines = [settings, "", plain([table], width=140)]
    if not cluster.tflops:
        lines.append("give --cluster.tflops, what a worker keeps up, for hours, and --cluster.price of its hour for the cost")
    lines.append("without start-up, decoding and waiting for machines; nothing was started")
    return "\n".join(lines)


def _known(config: Config) -> list[str]:
    """The columns that the settings say enough for, in order."""
    times = ["worker-hours", "hours"] if config.cluster.tflops else []
    return [*times, *(["cost"] if times and config.cluster.price is not None else [])]


def _cells(config: Config, flops: float, hours: float, wall: float, cost: float) -> list[str]:
    cells = {"worker-hours": f"{hours:.3g}", "hours": f"{wall:.3g}", "cost": f"{cost:.2f}"}
    return [f"{flops / 1e12:.3g}", *(cells[name] for name in _known(config))]
