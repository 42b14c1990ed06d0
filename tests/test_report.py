"""The table and the page: right numbers, nothing fetched from elsewhere, images that decode."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dmat_ray import checkpoint, classifiers, evaluation, report
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation import Chunk
from dmat_ray.manifold.stylegan2 import StyleGAN2

ATTACKS = [
    {"threat": "clean", "name": "clean"},
    {"threat": "image", "name": "PGD [fast] <5>", "eps": 0.1, "steps": 2},
    {"threat": "latent", "name": "OM-PGD", "eps": 0.3, "steps": 2},
]
LINES = ["natural x", "on-manifold g(w)", "PGD [fast] <5>", "OM-PGD"]
MODELS = ["at", "dmat & more"]
HISTORY = [{"epoch": e, "train_loss": 1 / e, "val_clean": 0.5, "val_image": 0.1 * e} for e in (1.0, 2.0, 3.0)]


class Page(HTMLParser):
    """What a browser would see: references, images with their captions, table rows, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[str] = []
        self.images: list[Image.Image] = []
        self.captions: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self.texts: list[str] = []
        self._path: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._path.append((tag, values))
        self.references += [v for k, v in attrs if v and (k in ("src", "href", "action") or k.endswith(":href"))]
        if tag == "img":
            content = base64.b64decode(str(values["src"]).removeprefix("data:image/png;base64,"), validate=True)
            self.images.append(Image.open(io.BytesIO(content)))
        if tag == "tr":
            self.cells.append([])

    def handle_data(self, data: str) -> None:
        tag, attributes = self._path[-1] if self._path else ("", {})
        self.texts.append(data)
        if tag == "figcaption":
            self.captions.append((data, str(attributes["class"])))
        if tag in ("td", "th"):
            self.cells[-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._path and self._path.pop()[0] != tag:
            pass


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(evaluation={"attacks": ATTACKS}, tracking={"experiment": "tiny <page>"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> dict[str, Path]:
    """Two random networks, saved as if trained."""
    root, data = tmp_path_factory.mktemp("models"), open_set(set_folder, "test")
    x = data.batch(np.arange(len(data)), "natural").x_BCHW
    run = checkpoint.describe_run(config, data.class_names, 1, 8, data.manifest["generator_sha256"], data.sha256)
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        network = classifiers.build(config.classifier, 1, 3)
        with torch.no_grad():
            for _ in range(50):
                network(x)
            network.network[-1].bias -= network.eval()(x).mean(dim=0)
        checkpoint.save(root / name, network, {**run, "history": HISTORY})
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def rows(models: dict[str, Path], config: Config, set_folder: Path, generator: StyleGAN2) -> pa.Table:
    data = open_set(set_folder, "test")
    tables = []
    for name, folder in models.items():
        network, _ = checkpoint.load_classifier(folder)
        chunks = [Chunk(name, set_name, 0, len(data)) for set_name in ("on_manifold", "natural")]
        cpu = torch.device("cpu")
        tables += [evaluation.evaluate_chunk(network, generator, data, c, config.evaluation, cpu) for c in chunks]
    return pa.concat_tables(tables)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], config: Config, rows: pa.Table, set_folder: Path
) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.write(config, set_folder, models, rows, path) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text()


def shares(rows: pa.Table, model: str, set_name: str) -> list[str]:
    """Per cent correct of each attack, counted by hand."""
    found = []
    for attack in ("clean", "PGD [fast] <5>", "OM-PGD"):
        wanted = (model, set_name, attack)
        right = [r["correct"] for r in rows.to_pylist() if (r["model"], r["set"], r["attack"]) == wanted]
        found += [f"{100 * sum(right) / len(right):.1f}"] if right else []
    return found


def test_terminal_table_has_the_right_numbers(rows: pa.Table, config: Config) -> None:
    text = report.terminal_table(rows, MODELS, config.evaluation)
    blocks = text.split("accuracy (%) on 12 ")[1:]
    assert [block.split(" test images")[0] for block in blocks] == ["on-manifold", "natural"]
    for block, set_name in zip(blocks, ("on_manifold", "natural"), strict=True):
        for model in MODELS:
            line = next(line for line in block.splitlines() if f" {model} " in line)
            assert re.findall(r"\d+\.\d", line) == shares(rows, model, set_name)
    assert all(name in blocks[0] for name in LINES[2:])
    assert "OM-PGD" not in blocks[1]
    assert "\x1b" not in text


def test_terminal_table_stays_readable_with_many_attacks() -> None:
    names = [f"attack number {i}" for i in range(20)]
    suite = {"attacks": [{"threat": "image", "name": name} for name in names], "sets": ["natural"]}
    answers = {"set": "natural", "id": "a", "correct": True}
    rows = pa.Table.from_pylist([{"model": m, "attack": a, **answers} for m in MODELS for a in names])
    text = report.terminal_table(rows, MODELS, EvaluationConfig.model_validate(suite))
    assert [name for name in names if f" {name} " not in text] == []
    assert text.count("100.0") == 2 * 20
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_page_has_the_right_numbers(written: str, rows: pa.Table) -> None:
    cells = Page(written).cells
    on_manifold, natural = cells[:3], cells[3:6]
    assert on_manifold[0] == ["method", "clean", "PGD [fast] <5>", "OM-PGD"]
    assert natural[0] == ["method", "clean", "PGD [fast] <5>"]
    for k, model in enumerate(MODELS):
        assert on_manifold[1 + k] == [model, *shares(rows, model, "on_manifold")]
        assert natural[1 + k] == [model, *shares(rows, model, "natural")]


def test_best_of_a_column_is_marked(written: str, rows: pa.Table) -> None:
    bold = re.findall(r'class="best">([\d.]+)<', written)
    expected = [
        value
        for set_name in ("on_manifold", "natural")
        for model in MODELS
        for k, value in enumerate(shares(rows, model, set_name))
        if float(value) == max(float(shares(rows, m, set_name)[k]) for m in MODELS)
    ]
    assert bold == expected


def test_page_is_self_contained(written: str) -> None:
    page = Page(written)
    assert len(page.references) > 0
    assert [r for r in page.references if not r.startswith(("data:", "#"))] == []
    assert [u for u in re.findall(r"url\(([^)]*)\)", written) if not u.strip("'\"").startswith(("data:", "#"))] == []
    assert re.findall(r"@import|<script|<link|<iframe", written) == []


def test_images_decode_and_captions_are_the_predictions(written: str, models: dict[str, Path], set_folder: Path) -> None:
    page, data = Page(written), open_set(set_folder, "test")
    first_of = [int(np.flatnonzero(data.label == c)[0]) for c in range(3)]
    per_model = len(LINES) * 3
    assert len(page.images) == len(page.captions) == len(MODELS) * per_model
    assert {image.size for image in page.images} == {(8, 8)}
    for m, folder in enumerate(models.values()):
        for k, stored in enumerate((data.natural, data.on_manifold)):
            part = slice(m * per_model + 3 * k, m * per_model + 3 * k + 3)
            shown = np.stack([np.asarray(image) for image in page.images[part]])
            np.testing.assert_array_equal(shown, stored[first_of, 0])
            network, _ = checkpoint.load_classifier(folder)
            with torch.no_grad():
                guess = network(torch.from_numpy(stored[first_of]).float() / 255).argmax(dim=1).tolist()
            right = ["right" if g == y else "wrong" for g, y in zip(guess, data.label[first_of], strict=True)]
            assert page.captions[part] == [(data.class_names[g], r) for g, r in zip(guess, right, strict=True)]


def test_page_names_everything_as_it_is_written(written: str) -> None:
    page = Page(written)
    for model in MODELS:
        assert page.texts.count(model) >= 3, "two tables and the gallery"
    assert "tiny <page>" in page.texts
    for line in LINES:
        assert page.texts.count(line) >= len(MODELS)


def test_curves_are_drawn_for_every_metric_that_was_reported(written: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", written, flags=re.DOTALL)
    titles = re.findall(r'<figure aria-label="([^"]*)">', written)
    assert titles == ["training loss (each method its own)", "held-out accuracy, clean", "held-out accuracy, image attack"]
    assert len(pictures) == 3
    for picture in pictures:
        assert len(list(ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}path"))) > len(MODELS)


def test_page_holds_the_whole_config(written: str, config: Config) -> None:
    text = "".join(Page(written).texts)
    flat = checkpoint.flatten_config(config)
    missing = [name for name in flat if f"{name.rsplit('.', 1)[-1]}:" not in text]
    assert missing == []
