"""Models that lie in this repository are what their pages say: loaded by plain torch, as their READMEs tell."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from classifiers.make import digits
from model_readmes import by_its_readme

from dmat_ray.storage.files import sha256

ROOT = Path(__file__).parents[2]
RELEASED = sorted(path.parent for path in (ROOT / "models").rglob("config.json"))
NAMES = [str(folder.relative_to(ROOT)) for folder in RELEASED]


def listed(folder: Path, kind: str) -> list[str]:
    """The cells of a model's line about a kind of test images, on its study's page."""
    lines = (folder.parent / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| [{folder.name}]({folder.name}) | {kind}")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def card(folder: Path) -> dict[str, Any]:
    """A model's card."""
    found: dict[str, Any] = json.loads((folder / "model_card.json").read_text())
    return found


COUNTED = [folder for folder in RELEASED if "clean_images" in card(folder)]  # older cards do not say of how many images they are


def test_every_study_has_some() -> None:
    assert {folder.parent.name for folder in RELEASED} == {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert sum(path.stat().st_size for path in (ROOT / "models").rglob("*")) < 5e6


@pytest.mark.parametrize("folder", RELEASED, ids=NAMES)
def test_files_are_those_that_the_pages_name(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    # how its images were read: digits lie on black of 32x32
    assert (about["resize"], about["grey_levels"]) == ("pad" if folder.parent.name == "mnist" else "crop", 65536)
    assert about["sha256"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert listed(folder, "natural")[-1] == about["sha256"]["model.safetensors"][:16]


@pytest.mark.parametrize("folder", COUNTED, ids=[str(folder.relative_to(ROOT)) for folder in COUNTED])
def test_the_accuracy_without_an_attack_is_that_of_all_natural_images(folder: Path) -> None:
    rows = pq.read_table(ROOT / "benchmarks" / "results" / folder.parent.name / "clean" / "all.parquet").to_pylist()
    right = [row["correct"] for row in rows if (row["model"], row["set"]) == (f"{folder.name}-0", "natural")]
    said = card(folder)
    assert (said["clean_acc"], said["test_set"]) == (f"{100 * sum(right) / len(right):.2f}", "natural")
    assert said["clean_images"] == len(right)
    assert float(listed(folder, "natural")[2]) == round(100 * sum(right) / len(right), 1)
    (line,) = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| natural | clean |")]
    assert line.endswith(f"| {len(right)} |")


def test_cards_of_digits_say_of_how_many_images_they_are() -> None:
    assert {folder for folder in RELEASED if folder.parent.name == "mnist"} <= set(COUNTED)


@pytest.mark.parametrize("folder", RELEASED, ids=NAMES)
def test_the_network_answers_as_the_studys_rows_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = json.loads((folder / "config.json").read_text())
    shape = (about["channels"], about["resolution"], about["resolution"])
    if folder.parent.name != "mnist":  # photographs that no package ships
        logits = by_its_readme(folder, torch.rand(3, *shape), monkeypatch)
        assert logits.shape == (3, about["num_classes"])
        assert logits.isfinite().all()
        return
    test = digits("test")
    answers = by_its_readme(folder, test.x_BCHW, monkeypatch).argmax(dim=1)
    rows = pq.read_table(ROOT / "benchmarks" / "results" / "mnist" / "clean" / "all.parquet").to_pylist()
    said = {row["id"]: row["prediction"] for row in rows if (row["model"], row["set"]) == (f"{folder.name}-0", "natural")}
    assert said.keys() == set(test.id)
    assert sum(said[id] != answer for id, answer in zip(test.id, answers.tolist(), strict=True)) <= 1, "one may turn by rounding"
