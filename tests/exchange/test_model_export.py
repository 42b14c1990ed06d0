"""Classifiers for others: what a README promises holds with plain torch, and cards say what rows say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from imported_models import CLASSES, program, small, unsettle
from installed import install
from model_readmes import by_its_readme
from rendered import Rendered
from safetensors.torch import load_file

from dmat_ray import train
from dmat_ray.config import ClassifierConfig, Config, EvaluationConfig
from dmat_ray.errors import UserError
from dmat_ray.evaluation import units
from dmat_ray.evaluation.metrics import Results
from dmat_ray.exchange import model_export, model_import
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
MakeConfig = Callable[..., Config]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# of RobustBench's model_info/*.json
KEYS = {
    *("link", "name", "authors", "additional_data", "dataset", "venue", "architecture", "eps", "clean_acc", "reported"),
    "autoattack_acc",
}
OURS = {"test_set", "clean_images", "autoattack_images", "left_out"}


@pytest.fixture
def trained(tmp_path: Path, make_config: MakeConfig) -> Callable[..., Path]:
    """trained(name, channels, resolution) is the folder of a model with random weights, as a training leaves it."""

    def make(name: str = "resnet18", channels: int = 3, resolution: int = 32, **sections: Any) -> Path:
        torch.manual_seed(0)
        normalisation = {"mean": MEAN[:channels], "std": STD[:channels]}
        config = make_config(classifier={"name": name, **normalisation}, name="mine", **sections)
        network = unsettle(classifiers.build(config.classifier, channels, len(CLASSES)))
        run = checkpoint.describe_run(config, CLASSES, channels, resolution, "f" * 64, "e" * 64)
        checkpoint.save(tmp_path / "mine", network, {**run, "epoch": 2, "finished": True, "history": []})
        return tmp_path / "mine"

    return make


PARTS = [
    {"threat": "autoattack", "name": part, "part": part, "eps": "8/255", "group": "AA"}
    for part in ("apgd-ce", "apgd-t", "fab-t", "square")
]
ATTACKS = [{"threat": "clean", "name": "clean"}, {"threat": "image", "name": "PGD", "eps": 0.5}, *PARTS]


def rows(**right: list[int]) -> pa.Table:
    """Rows of evaluations of four images: 'set__attack' -> those that are right, of those that it met if it is of a group."""
    found = []
    for key, ids in right.items():
        name, attack = key.split("__")
        met = right.get(f"{name}__apgd", right[f"{name}__clean"]) if attack == "square" else range(4)
        found += [
            {"model": model, "source": model, "set": name, "attack": attack.replace("apgd", "apgd-ce"), "id": str(i)}
            | {"correct": i in ids and model == "mine"}
            for i in met
            for model in ("mine", "other")
        ]
    return pa.Table.from_pylist(found)


def evaluated(folder: Path, table: pa.Table, digest: str, sets: tuple[str, ...] = ("on_manifold", "natural")) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "rows.parquet")
    about = {
        "version": units.VERSION,
        "models": {"mine": digest},
        "evaluation": {"attacks": ATTACKS, "sets": sets, "limit": 4},
        "left_out": "3 of 7 test images are left out",
    }
    (folder / "evaluation.json").write_text(json.dumps(about))
    return folder


def export(model: Path, evaluation: Path | None = None) -> Path:
    folder = model.parent / "exported" / "mine"
    model_export.export(model, "mine", evaluation or model.parent / "none", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "channels", "resolution"),
    [("resnet18", 3, 32), ("resnet18", 1, 32), ("digits_cnn", 1, 32), ("wrn-10-1", 3, 32), ("timm/mobilenetv3_small_050", 1, 32)],
)
def test_the_readme_rebuilds_the_network(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, channels: int, resolution: int
) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = trained(name, channels, resolution)
    folder = export(model)
    x = torch.rand(3, channels, resolution, resolution)
    network, _ = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(by_its_readme(folder, x, monkeypatch), network(x), rtol=1e-6, atol=1e-6)


def test_the_readme_of_a_network_of_a_package(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = (
        '[project]\nname = "their-networks"\nversion = "1"\n[project.entry-points."dmat_ray.networks"]\nflat = "for_export:flat"'
    )
    flat = "from torch import nn\ndef flat(c, k):\n    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(4 * c, k))"
    monkeypatch.syspath_prepend(install(tmp_path / "installed", project, for_export=flat))
    model = trained("own/flat")
    folder = export(model)
    about = json.loads((folder / "config.json").read_text())["architecture"]
    assert (about["library"], about["package"], about["version"], about["name"]) == (
        "own",
        "their-networks",
        "1",
        "for_export:flat",
    )
    assert "import for_export  # of the package their-networks 1" in (folder / "README.md").read_text()
    x = torch.rand(3, 3, 32, 32)
    network, _ = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(by_its_readme(folder, x, monkeypatch), network(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_the_readme_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    path = program(small(), tmp_path / "x.pt", how)
    found = model_import.read_model(path, ClassifierConfig(), ((0.5,), (0.25,)), 3, 32, 4)
    model_import.save_model(found, path, Config(name="mine"), CLASSES, 3, 32, tmp_path / "mine")
    folder = export(tmp_path / "mine")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(by_its_readme(folder, x, monkeypatch), small()((x - 0.5) / 0.25), rtol=1e-5, atol=1e-5)
    card = json.loads((folder / "model_card.json").read_text())
    assert (card["dataset"], card["eps"]) == (None, None), "of whoever made it, which nobody here knows"
    assert "Imported from x.pt" in (folder / "README.md").read_text()


def test_the_weights_are_torchvisions_behind_one_prefix(trained: Callable[..., Path]) -> None:
    model = trained("resnet18", data={"source": "scans", "resize": "stretch", "grey_levels": 4096})
    folder = export(model)
    about = json.loads((folder / "config.json").read_text())
    state = load_file(folder / about["weights"]["file"])
    prefix = about["weights"]["prefix"]
    assert {key for key in state if not key.startswith(prefix)} == {"mean", "std"}
    theirs = torchvision.models.resnet18(**about["architecture"]["arguments"])
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=True)
    mean, std = (torch.tensor(about["normalisation"][key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = torch.rand(2, 3, 32, 32)
    network, _ = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()((x - mean) / std), network(x), rtol=1e-6, atol=1e-6)
    assert about["class_names"] == list(CLASSES)
    assert (about["channels"], about["resolution"], about["input_range"]) == (3, 32, [0, 1])
    assert (about["resize"], about["grey_levels"]) == ("stretch", 4096)
    assert str(model.parent) not in (folder / "config.json").read_text() + (folder / "model_card.json").read_text()


def test_what_is_exported_can_be_imported(trained: Callable[..., Path]) -> None:
    model = trained("resnet18")
    folder = export(model)
    found = model_import.read_model(folder / "model.safetensors", ClassifierConfig(name="resnet18"), None, 3, 32, 4)
    x = torch.rand(2, 3, 32, 32)
    network, _ = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(found.network(x), network(x), rtol=1e-5, atol=1e-5)
    assert found.config.mean == pytest.approx(MEAN)


def test_cards_say_what_is_known(trained: Callable[..., Path]) -> None:
    model = trained("digits_cnn", 1, 32, data={"source": "/data/of/somebody/photos", "resolution": 32})
    card = json.loads((export(model) / "model_card.json").read_text())
    assert card.keys() == KEYS | OURS
    known = {"name": "mine", "dataset": "photos", "architecture": "digits_cnn", "eps": "0.1"}
    assert card == {key: known.get(key) for key in KEYS | OURS}
    assert "It has not been evaluated." in (model.parent / "exported" / "mine" / "README.md").read_text()


@pytest.mark.parametrize(("keep", "told"), [("best", ", of which these are the weights after epoch 1;"), ("last", ";")])
def test_a_card_says_after_which_epoch_its_weights_are(
    make_config: MakeConfig, set_folder: Path, tmp_path: Path, keep: str, told: str
) -> None:
    """A rate of 0 leaves the network of the second epoch as it was, and of equals the first is the best."""
    training = {"lr_epochs": [0, 1, 2], "lr_values": [0.05, 0, 0], "keep": keep}
    objective = {"batch_norm": "frozen"}
    model = train(
        make_config(output=str(tmp_path), manifold_set=str(set_folder), name="x", training=training, objective=objective)
    )
    _, run = checkpoint.load_classifier(model)
    first, second = (epoch["val_robust"] for epoch in run["history"])
    assert first >= second
    model_export.export(model, "x", tmp_path / "none", tmp_path / "exported")
    assert f" for 2 epochs{told} weights of its objective: " in (tmp_path / "exported" / "README.md").read_text()


def test_an_export_replaces_nothing_but_an_export(trained: Callable[..., Path]) -> None:
    model = trained("digits_cnn", 1, 32)
    with pytest.raises(UserError, match="is no exported model"):
        model_export.require_ours(model)
    model_export.require_ours(export(model))
    model_export.require_ours(model.parent / "nothing there")


def test_names_of_others_are_text_in_the_readme(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, classes, name = "P|G <b>D</b> `x`", ("<img src=x onerror=alert(1)>", "a|b\n# `c`", "*d*", "[e](f)"), "_a_ <b>b</b>"
    monkeypatch.setitem(globals(), "CLASSES", classes)
    model = trained("digits_cnn", 1, 32)
    found = rows(**{f"natural__{row}": [0, 1] for row in ("clean", attack)}).to_pylist()
    table = pa.Table.from_pylist([{**row, "model": name, "source": name} for row in found if row["model"] == "mine"])
    evaluated(tmp_path / "evaluation", table, checkpoint.digest(model))
    about = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    attacks = [ATTACKS[0], {**ATTACKS[1], "name": attack}]
    about = {**about, "models": {name: checkpoint.digest(model)}, "evaluation": {"attacks": attacks, "sets": ["natural"]}}
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(about))
    model_export.export(model, name, tmp_path / "evaluation", tmp_path / "folder")
    page = Rendered((tmp_path / "folder" / "README.md").read_text())
    assert page.tags == []
    assert [language for language, _ in page.code] == ["python"]
    assert page.texts[0] == name
    assert page.texts[1].split("classes: ")[1].split(".It takes")[0] == ", ".join(json.dumps(text) for text in classes)
    assert [(row[1], row[2], len(row)) for row in page.tables[0]] == [
        ("attack", "accuracy (%)", 5), ("clean", "50.0", 5), (attack, "50.0", 5)
    ]  # fmt: skip
    assert [text for text in page.texts if text.startswith(f"{attack}: ")]


def test_cards_take_accuracies_from_rows(trained: Callable[..., Path], tmp_path: Path) -> None:
    model = trained("digits_cnn", 1, 32)
    natural = {"natural__clean": [0, 1, 2], "natural__PGD": [0, 1], "natural__apgd": [0, 3], "natural__square": [0]}
    on_manifold = {f"on_manifold__{attack}": [0, 1, 2, 3] for attack in ("clean", "PGD", "apgd", "square")}
    table = rows(**natural, **on_manifold)
    evaluation = evaluated(tmp_path / "evaluation", table, checkpoint.digest(model))
    folder = export(model, evaluation)
    card = json.loads((folder / "model_card.json").read_text())
    assert (card["clean_acc"], card["autoattack_acc"], card["eps"]) == ("75.00", "25.00", "8/255")
    assert (card["test_set"], card["clean_images"], card["autoattack_images"]) == ("natural", 4, 4)
    page = (folder / "README.md").read_text()
    assert card["left_out"] == "3 of 7 test images are left out"
    assert "3 of 7 test images are left out." in page.splitlines()
    assert "| natural | PGD | 50.0 | " in page
    assert page.count("| natural |") == 3
    (meant,) = [line for line in page.splitlines() if line.startswith("- PGD: ")]
    assert "eps 0.5" in meant
    about = json.loads((evaluation / "evaluation.json").read_text())
    without_a_part = [row for row in ATTACKS if row["name"] != "fab-t"]
    of_two_radii = [{**row, "eps": 0.1} if row["name"] == "square" else row for row in ATTACKS]
    for other in (without_a_part, of_two_radii):
        (evaluation / "evaluation.json").write_text(
            json.dumps({**about, "evaluation": {**about["evaluation"], "attacks": other}})
        )
        assert json.loads((export(model, evaluation) / "model_card.json").read_text())["autoattack_acc"] is None
    (evaluation / "evaluation.json").write_text(json.dumps({**about, "left_out": ""}))
    assert json.loads((export(model, evaluation) / "model_card.json").read_text())["left_out"] is None
    # the rows of other weights under this name say nothing of these
    evaluated(evaluation, table, "0" * 64)
    assert json.loads((export(model, evaluation) / "model_card.json").read_text())["clean_acc"] is None


def test_cards_have_no_accuracies_of_images_that_the_generator_made(trained: Callable[..., Path], tmp_path: Path) -> None:
    model = trained("digits_cnn", 1, 32)
    table = rows(**{f"on_manifold__{attack}": [0, 1] for attack in ("clean", "PGD", "apgd", "square")})
    evaluation = evaluated(tmp_path / "evaluation", table, checkpoint.digest(model), ("on_manifold",))
    folder = export(model, evaluation)
    card = json.loads((folder / "model_card.json").read_text())
    assert {card[key] for key in ("clean_acc", "autoattack_acc", *OURS - {"left_out"})} == {None}
    assert card["eps"] == "0.1", "that of its training"
    assert "| on_manifold | AA | 50.0 | " in (folder / "README.md").read_text()


def test_the_accuracy_without_an_attack_may_be_of_more_images(trained: Callable[..., Path], tmp_path: Path) -> None:
    model = trained("digits_cnn", 1, 32)
    table = rows(**{f"natural__{attack}": [0, 1, 2, 3] for attack in ("clean", "PGD", "apgd", "square")})
    evaluation = evaluated(tmp_path / "evaluation", table, checkpoint.digest(model), ("natural",))
    some = rows(natural__clean=[0, 1, 2, 3]).to_pylist()
    more = pa.Table.from_pylist(some + [{**row, "id": f"1{row['id']}", "correct": row["id"] == "0"} for row in some])
    clean = Results(more.filter(pc.equal(more["model"], "mine")), EvaluationConfig(sets=("natural",)))
    model_export.export(model, "mine", evaluation, tmp_path / "folder", clean)
    card = json.loads((tmp_path / "folder" / "model_card.json").read_text())
    assert (card["clean_acc"], card["clean_images"]) == ("62.50", 8)
    assert (card["autoattack_acc"], card["autoattack_images"]) == ("100.00", 4)
    shown = [(row[1], row[2], row[4]) for row in Rendered((tmp_path / "folder" / "README.md").read_text()).tables[0]]
    assert shown[1:3] == [("clean", "62.5", "8"), ("PGD", "100.0", "4")]
