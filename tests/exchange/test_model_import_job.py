"""The job that imports a classifier: classes, shape and normalisation are of the set, the options or the file."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imported_models import CLASSES, Normalised, images_fixture, program, saved, small, unsettle  # noqa: F401  (fixtures)
from job_runs import run_job
from PIL import Image
from safetensors.torch import load_file
from set_rows import edit_manifest
from torch import Tensor

from dmat_ray import predict
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
]
JOB = "import_model.py"


def test_the_job(tmp_path: Path, set_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes and shape of the set, or of the options."""
    torch.manual_seed(0)
    digits = unsettle(classifiers.DigitsCNN(1, 3))
    path = saved({"net": digits.state_dict()}, tmp_path / "digits.pth")
    options = ["--checkpoint", path, "--classifier.name", "digits_cnn", "--model", "theirs", "--output", tmp_path / "x"]
    assert run_job(JOB, monkeypatch, *options) == 2
    assert "no on-manifold set" in capsys.readouterr().err
    assert run_job(JOB, monkeypatch, *options, "--manifold_set", set_folder, "--classifier.mean", 0.1) == 2
    assert "give both" in capsys.readouterr().err
    assert (
        run_job(JOB, monkeypatch, *options, "--manifold_set", set_folder, "--classifier.mean", 0.1, "--classifier.std", 0.3) == 0
    )
    assert "8x8 images with 1 channel(s), 3 classes" in capsys.readouterr().out
    network, run = checkpoint.load_classifier(tmp_path / "x" / "models" / "theirs")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(x), digits((x - 0.1) / 0.3))
    assert run["class_names"] == json.loads((set_folder / "manifest.json").read_text())["class_names"]
    assert run_job(JOB, monkeypatch, *options, "--manifold_set", set_folder) == 2
    assert "is there already" in capsys.readouterr().err

    names = tmp_path / "names.json"
    more = ["--classes", names, "--data.resolution", 32, "--overwrite"]
    for content, message in (("[1, 2]", "list of two class names"), ('["a", "a"]', "'a' twice"), ("[", "is no JSON")):
        names.write_text(content)
        assert run_job(JOB, monkeypatch, *options, *more) == 2
        assert message in capsys.readouterr().err
    names.write_text('["a", "b", "c"]')
    assert run_job(JOB, monkeypatch, *options, *more) == 0
    _, run = checkpoint.load_classifier(tmp_path / "x" / "models" / "theirs")
    assert (run["class_names"], run["resolution"]) == (["a", "b", "c"], 32)
    assert run_job(JOB, monkeypatch, *options[:4], "--model", "a/b", "--output", tmp_path / "x", *more) == 2
    assert "name:" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "x" / "models").iterdir()} == {"theirs"}
    assert load_file(tmp_path / "x" / "models" / "theirs" / "model.safetensors").keys() >= {"mean", "std", "network.0.weight"}


@pytest.mark.parametrize(
    ("of_set", "options", "how"),
    [
        ({"source": "scans", "resize": "stretch", "grey_levels": 4096}, {}, ("stretch", 4096)),
        ({"source": "scans", "grey_levels": 4096}, {"--data.resize": "pad"}, ("crop", 4096)),
        ({"source": "mnist5k"}, {}, ("pad", 65536)),
        ({"source": "scans", "resize": "stretch", "grey_levels": 4096, "of_later": 1}, {}, ("stretch", 4096)),
        ({}, {}, ("crop", 65536)),
        (None, {}, ("crop", 65536)),
        (None, {"--data.resize": "stretch", "--data.grey_levels": 4096}, ("stretch", 4096)),
    ],
    ids=[
        *("a set", "a set and other options", "a set of digits that lie on black", "a set of a later version"),
        *("a set of another program", "no set", "no set and options"),
    ],
)
def test_images_are_labelled_as_those_of_the_set_are_read(
    tmp_path: Path,
    write_any_set: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    of_set: dict[str, Any] | None,
    options: dict[str, Any],
    how: tuple[str, int],
) -> None:
    """Of another size, and of 12 bits in 16 or all 16. Without a set the options tell, also of digits of whatever source."""
    network = unsettle(classifiers.DigitsCNN(1, 10 if of_set is None else 3))
    path = saved(network.state_dict(), tmp_path / "digits.pth")
    if of_set is None:
        (tmp_path / "names.json").write_text(json.dumps(list("0123456789")))
        options = {**options, "--classes": tmp_path / "names.json", "--data.resolution": 8}
    else:
        shapes = {"resolution": 8, "channels": 1}
        edit_manifest(write_any_set(tmp_path / "on_manifold_set"), data=of_set and {**of_set, **shapes})
    given = ["--checkpoint", path, "--classifier.name", "digits_cnn", "--model", "theirs", "--output", tmp_path]
    assert run_job(JOB, monkeypatch, *given, *itertools.chain(*options.items())) == 0
    resize, levels = how
    wide = np.random.default_rng(0).integers(0, levels, (6, 12)).astype(np.uint16)
    (tmp_path / "photos").mkdir()
    Image.fromarray(wide).save(tmp_path / "photos" / "0.png")
    grey = Image.fromarray((wide // (levels // 256)).astype(np.uint8))
    if resize == "stretch":
        x = grey.resize((8, 8), Image.Resampling.BILINEAR)
    elif resize == "crop":
        x = grey.resize((16, 8), Image.Resampling.LANCZOS).crop((4, 0, 12, 8))
    else:
        x = Image.new("L", (8, 8))
        x.paste(grey.resize((8, 4), Image.Resampling.LANCZOS), (0, 2))
    network, _ = checkpoint.load_classifier(tmp_path / "models" / "theirs")
    with torch.no_grad():
        expected = network(torch.from_numpy(np.array(x)).float()[None, None] / 255).softmax(dim=1)
    (row,) = predict(tmp_path / "models" / "theirs", tmp_path / "photos").to_pylist()
    assert row["probability"] == pytest.approx(float(expected.max()), abs=1e-6)


@pytest.mark.parametrize("what", ["program", "own buffers", "no buffers"])
@pytest.mark.parametrize("included", [False, True])
def test_a_presets_normalisation_is_not_for_models_of_others(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, what: str, included: bool
) -> None:
    inner = small() if what == "program" else small(classifiers.network, "wrn-10-1", 3, 4)
    theirs = inner if what == "no buffers" else Normalised(inner).eval()
    made = program(theirs, tmp_path / "x.pt", "trace") if what == "program" else saved(theirs.state_dict(), tmp_path / "x.pt")
    (tmp_path / "names.json").write_text(json.dumps(CLASSES))
    preset, model = tmp_path / "mine.yaml", tmp_path / "runs" / "models" / "theirs"
    options = ["--checkpoint", made, "--model", "theirs", "--classes", tmp_path / "names.json", "--output", tmp_path / "runs"]
    options += ["--classifier.name", "wrn-10-1", "--overwrite", "--preset", preset if included else "cifar10"]
    if included:
        preset.write_text("include: [cifar10]")
    assert run_job(JOB, monkeypatch, *options) == 0
    network, run = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-5, atol=1e-5)
    if not included:
        return
    # what a file of the user's own says, though it includes a preset, or one comes after it
    preset.write_text("include: [cifar10]\nclassifier: {mean: [0.25], std: [0.5]}")
    assert run_job(JOB, monkeypatch, *options, "cifar10", "--classifier.std", 0.75) == 0
    network, run = checkpoint.load_classifier(model)
    assert (network.mean.flatten().tolist(), network.std.flatten().tolist()) == ([0.25], [0.75])
    if what == "program":
        told = "images go in normalised by mean (0.25,) and std (0.75,), besides what the program does inside"
        assert run["source"]["notes"] == [told]
    preset.write_text("include: [cifar10]\nclassifier: {mean: [0.25]}")
    assert run_job(JOB, monkeypatch, *options) == 2, "both, or neither"
