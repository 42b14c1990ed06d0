"""The gallery of the page: images that decode, with captions that are the predictions."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from report_pages import LINES, Page, whole_page
from tiny_page import EVALUATION, MODELS, TITLE, Written, write_page

from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation import units
from dmat_ray.models import checkpoint
from dmat_ray.reports import gallery

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config(evaluation=EVALUATION, tracking={"experiment": TITLE})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Written:
    return whole_page(tmp_path_factory.mktemp("page"), config, set_folder)


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.html)


def test_images_decode_and_captions_are_the_predictions(page: Page, written: Written, set_folder: Path) -> None:
    data = open_set(set_folder, "test")
    first_of = [int(np.flatnonzero(data.label == c)[0]) for c in range(3)]
    shown = np.stack([np.asarray(image) for image in page.images]).reshape(len(MODELS), -1, 3, 8, 8).astype(float)
    assert shown.shape[1] == len(LINES) + 4, "a line for each, and for four attacks their differences"
    said = np.array(page.captions, dtype=object).reshape(len(MODELS), len(LINES), 3, 2)
    times = [float(t) for t in re.findall(r"difference × ([\d.e+-]+)<", written.html)]
    predictions = {(r["model"], r["attack"], r["id"]): r["prediction"] for r in written.results.rows.to_pylist()
                   if r["model"] == r["source"] and r["set"] == "on_manifold"}  # fmt: skip
    for m, (model, folder) in enumerate(written.models.items()):
        network, _ = checkpoint.load_classifier(folder)
        for k, stored in enumerate((data.natural, data.on_manifold)):
            np.testing.assert_array_equal(shown[m, k], stored[first_of, 0])
            with torch.no_grad():
                guess = network(torch.from_numpy(stored[first_of]).float() / 255).argmax(dim=1).tolist()
            marks = [("✓ ", "right") if g == y else ("✗ ", "wrong") for g, y in zip(guess, data.label[first_of], strict=True)]
            assert said[m, k].tolist() == [
                [mark + data.class_names[g], word] for g, (mark, word) in zip(guess, marks, strict=True)
            ]
        for k, attack in enumerate(LINES[2:]):
            if attack != "one":  # which the evaluation tries only on what is right
                expected = [data.class_names[predictions[model, attack, data.id[i]]] for i in first_of]
                assert [text[2:] for text, _ in said[m, 2 + k]] == expected
            attacked, difference = shown[m, 2 + 2 * k], shown[m, 3 + 2 * k]
            by = times[4 * m + k]
            # levels are rounded before they are shown, and `by` when it is printed
            assert np.abs(127.5 + by * (attacked - shown[m, 1]) - difference).max() <= 0.5 * by + 2
            assert difference.min() == 0 or difference.max() == 255
    assert len(set(page.alts)) == len(page.alts) // len(MODELS)


def test_every_test_set_has_its_own_unit_of_the_gallery(config: Config) -> None:
    """Files of units are kept: one of both sets would show both on a later page of one, or one on a page of both."""
    labels, keys = np.arange(4) % 2, {}
    for sets in (("on_manifold",), ("natural",), ("natural", "on_manifold")):
        evaluated = config.evaluation.model_copy(update={"sets": sets})
        work = gallery.units(["at"], evaluated, labels, np.arange(4))
        assert [unit.set for unit in work if not unit.attack] == sorted(sets)
        keys[sets] = {units.key_of(unit, evaluated, {"models": {"at": "0"}}) for unit in work}
        assert len(keys[sets]) == len(work)
    both = keys["natural", "on_manifold"]
    assert keys[("on_manifold",)] < both
    assert len(keys[("natural",)] & both) == 1  # attacks are shown on the manifold where that is evaluated


def test_big_suites_show_the_first_attacks_of_the_gallery(
    tmp_path: Path, make_config: Callable[..., Config], set_folder: Path
) -> None:
    attacks = [{"threat": "image", "name": f"PGD {k}", "eps": 0.1, "steps": 1} for k in range(15)]
    found = write_page(tmp_path, make_config(evaluation={"attacks": attacks}), set_folder, ["only"], check=False)
    page = Page(found.html)
    assert len(page.images) == 3 * (2 + 2 * 12)
    assert "3 attacks are not shown: PGD 12, PGD 13, PGD 14." in page.texts
