"""What people look at: the table in the terminal, and one self-contained HTML page with curves and a gallery."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from dmat_ray import checkpoint, figures
from dmat_ray.config import ON_MANIFOLD, Config, EvaluationConfig
from dmat_ray.data import manifold_set, set_reader
from dmat_ray.data.pixels import quantise
from dmat_ray.evaluation import rows_of
from dmat_ray.manifold import generators
from dmat_ray.metrics import Accuracy, accuracies
from dmat_ray.storage import at

SET_NAMES = {"on_manifold": "on-manifold test images g(w)", "natural": "natural test images x"}
GALLERY_SIZE = 10
WIDTH = 110


def _columns(config: EvaluationConfig, set_name: str) -> list[str]:
    return [row.name for row in config.attacks if set_name == "on_manifold" or not isinstance(row, ON_MANIFOLD)]


def terminal_table(rows: pa.Table, models: list[str], config: EvaluationConfig) -> str:
    """Accuracy in per cent, methods x attacks, a block for each test set; many attacks take several tables."""
    found = accuracies(rows)
    # markup would swallow a name such as "at [fast]"
    console = Console(width=WIDTH, force_terminal=False, color_system=None, record=True, markup=False, file=io.StringIO())
    room = WIDTH - max(len(name) for name in ("method", *models)) - 4
    for set_name in config.sets:
        columns = _columns(config, set_name)
        console.print(f"accuracy (%) on {found[models[0], set_name, columns[0]].count} {SET_NAMES[set_name]}")
        parts: list[list[str]] = [[]]
        for column in columns:
            if parts[-1] and sum(max(len(c), 5) + 3 for c in [*parts[-1], column]) > room:
                parts.append([])
            parts[-1].append(column)
        for part in parts:
            table = Table()
            table.add_column("method")
            for column in part:
                table.add_column(column, justify="right")
            for model in models:
                table.add_row(model, *(f"{100 * found[model, set_name, c].value:.1f}" for c in part))
            console.print(table)
    return console.export_text().rstrip()


def write(config: Config, set_folder: set_reader.Place, models: dict[str, Path], rows: pa.Table, path: Path) -> Path:
    """Write the page for these rows; `models` maps names to folders, in the order of the table."""
    runs = {name: checkpoint.read_run(folder) for name, folder in models.items()}
    manifest = set_reader.read_manifest(set_folder)
    figures.write_page(
        at(path),
        "report.html",
        title=config.tracking.experiment,
        tables=_tables(rows, list(models), config.evaluation),
        curves=_curves({name: run["history"] for name, run in runs.items()}),
        gallery=_gallery(config, set_folder, models),
        manifest=manifest,
        config=_yaml(config),
        versions=manifest["versions"],
    )
    return path


def _tables(rows: pa.Table, models: list[str], config: EvaluationConfig) -> list[dict[str, Any]]:
    found = accuracies(rows)
    tables = []
    for set_name in config.sets:
        columns = _columns(config, set_name)
        best = {c: max(found[m, set_name, c].value for m in models) for c in columns}
        body = [{"method": m, "cells": [_cell(found[m, set_name, c], best[c]) for c in columns]} for m in models]
        count = found[models[0], set_name, columns[0]].count
        tables.append({"title": SET_NAMES[set_name], "count": count, "columns": columns, "rows": body})
    return tables


def _cell(accuracy: Accuracy, best: float) -> dict[str, Any]:
    interval = f"95 % interval {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
    return {"text": f"{100 * accuracy.value:.1f}", "hover": interval, "best": accuracy.value == best}


def _yaml(config: Config) -> str:
    import yaml

    return str(yaml.safe_dump(config.to_json(), sort_keys=False))


def _curves(histories: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """One SVG each for the loss and the held-out accuracies over epochs."""
    wanted = [
        ("train_loss", "training loss (each method its own)"),
        ("val_clean", "held-out accuracy, clean"),
        ("val_image", "held-out accuracy, image attack"),
        ("val_latent", "held-out accuracy, latent attack"),
    ]
    drawn = []
    for metric, title in wanted:
        if not any(metric in h for history in histories.values() for h in history):
            continue
        with figures.axes(4.2, 2.8, title, "epoch") as (axes, svg):
            for name, history in histories.items():
                points = [(h["epoch"], h[metric]) for h in history if metric in h]
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6)
            if metric.startswith("val_"):
                axes.set_ylim(0, 1.02)
            axes.legend(fontsize=8, frameon=False)
        drawn.append({"title": title, "svg": svg[0]})
    return drawn


def _gallery(config: Config, set_folder: set_reader.Place, models: dict[str, Path]) -> list[dict[str, Any]]:
    """For each model: natural and on-manifold images and every attack of the suite, with the predicted labels."""
    data = manifold_set.open_set(set_folder, "test")
    index = _one_of_each_class(data.label)
    generator = generators.load_configured(config.generator)
    names = data.class_names
    blocks = []
    for model, folder in models.items():
        network, _ = checkpoint.load_classifier(folder)
        lines = []
        natural = data.batch(index, "natural")
        with torch.no_grad():
            guess = network(natural.x_BCHW).argmax(dim=1)
        lines.append(_line("natural x", natural.x_BCHW, guess.numpy(), data.label[index], names))
        batch = data.batch(index, "on_manifold")
        for table, x in rows_of(network, generator, batch, config.evaluation, model, "on_manifold"):
            attack = table["attack"][0].as_py()
            title = "on-manifold g(w)" if attack == "clean" else attack
            lines.append(_line(title, x, table["prediction"].to_numpy(), data.label[index], names))
        blocks.append({"model": model, "lines": lines})
    return blocks


def _one_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Positions of the first example of up to GALLERY_SIZE classes."""
    return np.array([int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)[:GALLERY_SIZE]])


def _line(title: str, x: torch.Tensor, guess: np.ndarray, label: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    images = [
        {"src": figures.png(quantise(image)), "label": names[int(g)], "right": bool(g == y)}
        for image, g, y in zip(x, guess, label, strict=True)
    ]
    return {"title": title, "images": images}
