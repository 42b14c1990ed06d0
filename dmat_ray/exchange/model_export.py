"""Classifiers for others: a folder that plain torch reads, with all that is needed to build the network again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dmat_ray.config import AutoAttackRow, Config, EvaluationConfig
from dmat_ray.data.set_reader import named_classes
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluated
from dmat_ray.evaluation.intervals import Accuracy
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import VERSION
from dmat_ray.models import checkpoint, prediction
from dmat_ray.networks import classifiers, wide_resnet
from dmat_ray.reports.columns import columns_described
from dmat_ray.reports.report_text import escaped
from dmat_ray.storage import Place, at
from dmat_ray.storage.files import sha256, write_json
from dmat_ray.storage.folders import fetched, holds_anything
from dmat_ray.wording import number_of

STANDARD = {"apgd-ce", "apgd-t", "fab-t", "square"}  # parts of AutoAttack
CONFIG, CARD, README = "config.json", "model_card.json", "README.md"
PREFIX = "network."  # of the architecture's own names in model.safetensors
CARDS_SET = "natural"  # whose accuracies the card gives: RobustBench's are of no images g(w)

GREY = """\
first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
first.weight, first.in_channels = torch.nn.Parameter(first.weight[:, :1]), 1
"""
# by library: how the network is built in the README
BUILDS = {
    "torchvision": "network = torchvision.models.get_model({name!r}, weights=None, num_classes={classes})\n",
    "timm": "network = timm.create_model({name!r}, num_classes={classes}, in_chans={channels})\n",
    "dmat_ray": "network = dmat_ray.networks.classifiers.network({name!r}, {channels}, {classes})\n",
}
LOADS = {
    "torchscript": 'network = torch.jit.load("program.pt")\n',
    "torch_export": 'network = torch.export.load("program.pt2").module()\n',
}
IMPORTS = {
    "torchvision": "import torchvision\n",
    "timm": "import timm\n",
    "dmat_ray": "import dmat_ray.networks.classifiers\n",
    "torch": "",
}
CODE = """\
import torch
{imports}from safetensors.torch import load_file

state = load_file("model.safetensors")
mean, std = state.pop("mean"), state.pop("std")
{network}logits = network((x - mean) / std)  # x: (B, {channels}, {resolution}, {resolution}) in [0, 1]
"""
FILL = """\
network.load_state_dict({key.removeprefix("network."): value for key, value in state.items()})
network.eval()
"""
PAGE = """\
# {name}

{library} `{architecture}` for {resolution}x{resolution} images with {channels} channel(s), {classes} classes: {class_names}.
It takes images in [0, 1]; the normalisation, mean {mean} and std {std}, belongs to the model.

```python
{code}```

`config.json` says the same to programs; `model_card.json` has the keys of RobustBench's model cards, and says of how many images
its accuracies are.

{origin}

{table}
"""


def read_evaluation(folder: Place, name: str, model: Place) -> tuple[Results | None, str]:
    """What the evaluation in `folder` says of a model; nothing if it has none, or was of another model of this name.

    And which test images its numbers are not of; '' for none, and where it does not say.
    """
    about = evaluated.made_for(folder)
    if about is None or about.get("version") != VERSION or about.get("models", {}).get(name) != checkpoint.digest(model):
        return None, ""
    rows = evaluated.read_rows(folder)
    results = Results(rows.filter(pc.equal(rows["model"], name)), EvaluationConfig.model_validate(about["evaluation"]))
    return results, str(about.get(evaluated.LEFT_OUT, ""))


def _autoattack(results: Results) -> tuple[str, float] | None:
    """The group of the suite that is the standard version of AutoAttack in an L-infinity ball, and its radius."""
    for group, names in results.groups.items():
        rows = [row for name in names if isinstance(row := results.suite[name], AutoAttackRow) and row.norm == "linf"]
        if len(rows) == len(names) and {row.part for row in rows} >= STANDARD and len({row.eps for row in rows}) == 1:
            return group, rows[0].eps
    return None


def architecture(run: dict[str, Any], config: Config) -> dict[str, Any]:
    """Library, name in it, and what else the network is built with."""
    name, classes, channels = config.classifier.name, len(run["class_names"]), run["channels"]
    if "program" in run:
        return {"library": "torch", "name": run["program"], "file": checkpoint.PROGRAMS[run["program"]]}
    if name == "digits_cnn" or wide_resnet.NAME.fullmatch(name):
        return {"library": "dmat_ray", "name": name, "arguments": {"channels": channels, "num_classes": classes}}
    if name.startswith("timm/"):
        arguments = {"num_classes": classes, "in_chans": channels}
        return {"library": "timm", "name": name.removeprefix("timm/"), "arguments": arguments}
    if name.startswith(classifiers.OWN):
        own = classifiers.origin(name)
        assert own is not None
        package = {key: own[key] for key in ("package", "version", "sha256")}
        arguments = {"channels": channels, "num_classes": classes}
        return {"library": "own", "name": own["entry"], **package, "arguments": arguments}
    grey = {"first_convolution_in_channels": 1} if channels == 1 else {}
    return {"library": "torchvision", "name": name, "arguments": {"num_classes": classes}, **grey}


def config_json(run: dict[str, Any], config: Config, network: classifiers.Classifier) -> dict[str, Any]:
    """All that is needed to build the network again."""
    built = architecture(run, config)
    return {
        "format": "dmat_ray classifier",
        "architecture": built,
        "weights": {"file": checkpoint.MODEL, "prefix": None if "program" in run else PREFIX},
        "class_names": run["class_names"],
        "num_classes": len(run["class_names"]),
        "channels": run["channels"],
        "resolution": run["resolution"],
        **prediction.decoding(run),
        "input_range": [0.0, 1.0],
        "normalisation": {"mean": network.mean.flatten().tolist(), "std": network.std.flatten().tolist()},
        "dmat_ray_version": checkpoint.versions()["dmat_ray"],
        "versions": run["versions"],
        "source": run.get("source"),
    }


def model_card(
    name: str, run: dict[str, Any], config: Config, results: Results | None, clean: Results | None = None, missing: str = ""
) -> dict[str, Any]:
    """A card with RobustBench's keys, and of which and how many images its accuracies are; null is what nobody here knows.

    Accuracies are in percent, as text, as theirs are, and of natural images; that without an attack is `clean`'s, if given.
    `missing` says which test images these are not.
    """
    unattacked, robust, eps = None, None, None
    image = config.objective.image
    if "source" not in run and image.weight > 0 and image.norm == "linf":
        eps = image.eps
    if results is not None and CARDS_SET in results.config.sets:
        of_clean = clean or results
        unattacked = of_clean.accuracy(name, CARDS_SET, of_clean.clean)
        if found := _autoattack(results):
            robust, eps = results.accuracy(name, CARDS_SET, found[0]), found[1]
    return {
        "link": None,
        "name": name,
        "authors": None,
        "additional_data": None,
        "dataset": None if "source" in run else at(config.data.source).name,
        "venue": None,
        "architecture": architecture(run, config)["name"],
        "eps": None if eps is None else _fraction(eps),
        "clean_acc": _percent(unattacked),
        "autoattack_acc": _percent(robust),
        "reported": None,
        "test_set": None if unattacked is None else CARDS_SET,
        "clean_images": None if unattacked is None else unattacked.count,
        "autoattack_images": None if robust is None else robust.count,
        "left_out": missing or None,
    }


def _percent(found: Accuracy | None) -> str | None:
    return None if found is None else f"{100 * found.value:.2f}"


def _fraction(eps: float) -> str:
    levels = round(255 * eps)
    return f"{levels}/255" if levels and abs(255 * eps - levels) < 1e-3 else f"{eps:g}"


def _code(run: dict[str, Any], built: dict[str, Any]) -> str:
    classes, channels = len(run["class_names"]), run["channels"]
    if "program" in run:
        imports, network = IMPORTS["torch"], LOADS[run["program"]]
    elif built["library"] == "own":
        imports = f"import {built['name'].partition(':')[0]}  # of the package {built['package']} {built['version']}\n"
        network = f"network = {built['name'].replace(':', '.')}({channels}, {classes})\n{FILL}"
    else:
        imports = IMPORTS[built["library"]]
        network = BUILDS[built["library"]].format(name=built["name"], classes=classes, channels=channels)
        network += (GREY if "first_convolution_in_channels" in built else "") + FILL
    return CODE.format(imports=imports, network=network, channels=channels, resolution=run["resolution"])


def _origin(run: dict[str, Any], config: Config) -> str:
    if "source" in run:
        source = run["source"]
        return (
            f"Imported from {escaped(source['file'])} ({source['format']}, sha256 {source['sha256'][:16]}...), not trained here."
        )
    attacked = {key: term.weight for key, term in config.objective.adversarial.items()}
    weights = {"clean": config.objective.clean.weight, **attacked}
    terms = ", ".join(f"{key} {weight:g}" for key, weight in weights.items() if weight > 0)
    done = run.get("epoch", 0)
    kept = int(run.get("metrics", {}).get("epoch", done))  # with training.keep best an earlier one's
    epochs = number_of(done, "epoch") + (f", of which these are the weights after epoch {kept}" if kept < done else "")
    unseen = run.get(checkpoint.UNSEEN, [])
    without = f" It was trained without an image of {escaped(named_classes(unseen))}, which it cannot know." if unseen else ""
    return f"Trained by dmat_ray {run['versions']['dmat_ray']} for {epochs}; weights of its objective: {terms}.{without}"


def _table(results: Results | None, clean: Results | None, missing: str) -> str:
    if results is None:
        return "It has not been evaluated."
    lines = ["| test set | attack | accuracy (%) | 95 % interval | images |", "|---|---|---|---|---|"]
    for (name, set_name, attack), found in results.accuracies().items():
        if clean is not None and attack == results.clean:
            found = clean.accuracy(name, set_name, clean.clean)
        interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
        lines.append(f"| {set_name} | {escaped(attack)} | {100 * found.value:.1f} | {interval} | {found.count} |")
    meant = [f"- {escaped(column)}: {escaped(text)}" for column, text in columns_described(results).items()]
    about = [f"{escaped(missing)}.", ""] if missing else []
    return "\n".join([*lines, "", *about, "Images are in [0, 1], and so are L-infinity radii.", "", *meant])


def require_ours(folder: Place) -> None:
    """Raise UserError if an export to `folder` would take the place of something that is no export."""
    if holds_anything(folder) and not (at(folder) / CONFIG).is_file():
        raise UserError(f"'{folder}' is there and is no exported model; give another folder with --to, or remove it")


def export(model: Place, name: str, evaluation: Place, folder: Path, clean: Results | None = None) -> None:
    """Write the model in the folder `model` to `folder`, for others; `evaluation` is where rows may lie.

    `clean` are rows of the same test sets without an attack, of more images, whose accuracies take the place of those there.
    `model.safetensors` is the checkpoint's own: `mean`, `std` and, behind the prefix `network.`, the architecture's state dict.
    Raises UserError for a model that cannot be loaded.
    """
    network, run = checkpoint.load_classifier(model)
    config = checkpoint.settings_of(run)
    results, missing = read_evaluation(evaluation, name, model)
    folder.mkdir(parents=True, exist_ok=True)
    copied = [checkpoint.MODEL, *([checkpoint.PROGRAMS[run["program"]]] if "program" in run else [])]
    for file in copied:
        shutil.copyfile(fetched(model) / file, folder / file)
    about = config_json(run, config, network)
    about["sha256"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / CONFIG, about)
    write_json(folder / CARD, model_card(name, run, config, results, clean, missing))
    page = PAGE.format(
        name=escaped(name),
        library=escaped(about["architecture"].get("package", about["architecture"]["library"])),
        architecture=about["architecture"]["name"],
        resolution=run["resolution"],
        channels=run["channels"],
        classes=len(run["class_names"]),
        class_names=escaped(", ".join(json.dumps(text, ensure_ascii=False) for text in run["class_names"])),
        mean=about["normalisation"]["mean"],
        std=about["normalisation"]["std"],
        code=_code(run, about["architecture"]),
        origin=_origin(run, config),
        table=_table(results, clean, missing),
    )
    (folder / README).write_text(page)
