"""What a user can get wrong: one clear line, exit code 2, nothing left that a later run takes for whole."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import SMALL, settings

from dmat_ray.cluster import jobs
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_job(monkeypatch, capfd, tmp_path):
    """Runs a script of jobs/ in this process with a command line; returns its exit code and what it wrote to stderr."""

    def run(job: str, *options: object, output: Path | None = None) -> tuple[int, str]:
        folder = output or tmp_path / "out"
        monkeypatch.setattr(sys, "argv", [job, "--output", str(folder), *SMALL, *map(str, options)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")
        return stopped.value.code, capfd.readouterr().err

    return run


def image_folder(root: Path, classes: int = 2, count: int = 4) -> Path:
    """A folder of random pictures, a sub-folder a class."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


def refused(result: tuple[int, str], *words: str) -> None:
    """Exit code 2 and one line of error that holds the words."""
    code, text = result
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2, text
    assert len(errors) == 1, text
    assert "Traceback" not in text
    for word in words:
        assert word in errors[0]


def test_settings(run_job):
    refused(run_job("train.py", "--training.epochz", 3), "--training.epochz")
    refused(run_job("train.py", "--training.epochs", 0), "training.epochs", "must be 1 or more")
    refused(run_job("train.py", "--objective.image.eps", "1/0"), "objective.image.eps", "1/0")
    refused(run_job("train.py", "--preset", "dmaat"), "dmaat", "om_at")
    refused(run_job("train.py", "--preset", "demo", "--objective.clean.weight", 0), "every term has weight 0", "dmat")
    refused(run_job("pipeline.py", "--methods", "dmat,magic"), "magic")


def test_images(run_job, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    one = image_folder(tmp_path / "one", classes=1)
    refused(run_job("project.py", "--data.source", tmp_path / "none"), "none", "mnist5k")
    refused(run_job("project.py", "--data.source", tmp_path / "empty"), "empty", "no sub-folders")
    refused(run_job("project.py", "--data.source", one), "one class only", "class0")
    refused(run_job("project.py", "--data.resolution", 64), "32x32", "64x64", "data.resolution")
    refused(run_job("project.py", "--generator.path", tmp_path), "card.json", "train_generator", "import_generator")
    refused(
        run_job("project.py", "--projection.lpips", 1, "--projection.lpips_weights", tmp_path / "vgg.pth"), "vgg.pth", "random"
    )
    assert not (out / "on_manifold_set" / "manifest.json").exists()


@pytest.mark.usefixtures("ray_session")
def test_unreadable_images_are_left_out_and_told(tmp_path, lines):
    good = image_folder(tmp_path / "pictures", count=10)
    (good / "class0" / "broken.png").write_bytes(b"not an image")
    options = ("--data.source", good, "--projection.steps", 1)
    with pytest.raises(UserError, match=r"1 of 21 images were rejected, more than data.max_rejected = 0.01"):
        jobs.project(settings(tmp_path, *options), lines.append)
    assert any(line.startswith("rejected: 'class0/broken.png' cannot be read as an image: ") for line in lines)
    assert not (tmp_path / "on_manifold_set" / "manifest.json").exists()
    # still broken, and there is nothing else to do
    jobs.project(settings(tmp_path, *options, "--data.max_rejected", 0.1), lines.append)
    assert "trying again what could not be read: 1 image" in lines
    found = json.loads((tmp_path / "on_manifold_set" / "manifest.json").read_text())
    assert found["rejected"].keys() == {"class0/broken.png"}
    assert "it begins with b'not an image', which is none of JPEG, PNG" in found["rejected"]["class0/broken.png"]
    assert found["count"] == 20


def test_sets_and_models(run_job, tmp_path, finished):
    out = tmp_path / "out"
    refused(run_job("train.py"), "no on-manifold set", "jobs/project.py")
    finished.copy_set(out)
    refused(run_job("project.py", "--projection.lr", 0.5), "projection.lr = 0.1", "now it is 0.5")
    refused(run_job("evaluate.py"), "no models", "jobs/train.py")
    refused(run_job("evaluate.py", "--models", "mine"), f"no trained model at '{out / 'models' / 'mine'}'", "jobs/train.py")
    refused(run_job("train.py", "--training.batch_size", 1), "batch_size 1", "2 workers")
    refused(run_job("train.py", "--classifier.name", "resnet19"), "resnet19", "resnet18")
    refused(run_job("train.py", "--preset", "demo", "dmat", "--training.images", "natural"), "objective.latent", "natural")

    other = tmp_path / "generator"
    shutil.copytree(ROOT / "dmat_ray" / "assets" / "mnist32", other)
    card = json.loads((other / "card.json").read_text())
    from dmat_ray.config import StyleGAN2Config
    from dmat_ray.manifold.generators import save_generator
    from dmat_ray.manifold.stylegan2 import StyleGAN2

    save_generator(other, StyleGAN2(StyleGAN2Config.model_validate(card["architecture"])), card)
    refused(run_job("train.py", "--generator.path", other), "was made with generator", "the same generator.path")

    model = finished.models["standard"]
    run = json.loads((model / "run.json").read_text())
    foreign = out / "models" / "foreign"
    shutil.copytree(model, foreign)
    run["config"]["classifier"]["name"] = "resnet18"
    (foreign / "run.json").write_text(json.dumps(run))
    refused(run_job("evaluate.py", "--models", "mine"), "no trained model", "those of this output are foreign")
    refused(run_job("evaluate.py", "--models", "foreign"), "foreign", "of another architecture")
    (foreign / "run.json").write_text(json.dumps({**run, "class_names": ["cat", "dog"]}))
    refused(run_job("evaluate.py", "--models", "foreign"), "foreign")

    (out / "on_manifold_set" / "manifest.json").unlink()
    refused(run_job("train.py"), "unfinished", "jobs/project.py")
    assert not (out / "evaluation").exists()
