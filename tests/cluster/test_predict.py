"""jobs/predict.py on a real Ray: every image of a folder has its row, and the labels are the model's own."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small import ROOT, SMALL

from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.storage.files import sha256

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("impatient")]
CLASSES = ("a", "b", "c", "d", "e", "f", "g")


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with one model."""
    torch.manual_seed(0)
    config = Config(name="mine", classifier=ClassifierConfig(name="digits_cnn"))
    network = classifiers.build(config.classifier, 3, len(CLASSES))
    network(torch.rand(16, 3, 32, 32))
    run = checkpoint.describe_run(config, CLASSES, 3, 32, None, None)
    checkpoint.save(tmp_path / "models" / "mine", network, {**run, "finished": True, "history": []})
    return tmp_path


@pytest.fixture
def predict(monkeypatch, capfd, output):
    """Runs the job in this process; returns its exit code, what it printed, and its errors."""

    def run(*options: object) -> tuple[int, str, str]:
        arguments = ["predict.py", "--output", output, *SMALL, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / "jobs" / "predict.py"), run_name="__main__")
        except SystemExit as stopped:
            return (stopped.code, *capfd.readouterr())
        return (0, *capfd.readouterr())

    return run


@pytest.fixture
def photos(tmp_path) -> dict[str, np.ndarray]:
    """Pictures of the model's own size, flat and in folders."""
    rng = np.random.default_rng(0)
    found = {}
    for i in range(45):
        name = f"{i:02d}.png" if i % 3 else f"sub/deep/{i:02d}.png"
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found[name] = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(found[name]).save(path)
    return found


@pytest.mark.usefixtures("ray_session")
def test_every_image_has_its_row(predict, output, photos):
    folder = output / "photos"
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    (folder / "Thumbs" / ".hidden").mkdir(parents=True)
    (folder / "zz").mkdir()
    for i in range(15):  # more than a part of the work: there is one without an image
        (folder / "zz" / f"{i:02d}.png").write_bytes(b"")
    more = ("--cluster.evaluation_actors", 2, "--evaluation.batch_size", 7, "--data.resize", "pad", "--data.grey_levels", 65536)
    more += ("--data.channels", 1, "--data.resolution", 32)
    code, said, error = predict("--model", "mine", "--images", folder, *more)
    assert code == 0, error
    assert "not taken: 1 file of no extension of images, the first: 'notes.txt'" in said
    assert said.count("note: ") == 2
    assert "note: data.channels 1 is not taken: the model has learned from images that were read with 3" in said
    assert "note: data.resize pad is not taken: the model has learned from images that were read with crop" in said
    assert "predicted 45 of 62 images, 17 could not be read" in said
    assert "unreadable: 'empty.jpg' cannot be read as an image: it has 0 bytes" in said
    assert "45 of 62 images have a prediction" in said
    table = pq.read_table(output / "predictions" / "mine.parquet")
    rows = {row["path"]: row for row in table.to_pylist()}
    assert rows.keys() == {*photos, "broken.png", "empty.jpg", *(f"zz/{i:02d}.png" for i in range(15))}
    assert table["path"].to_pylist() == sorted(rows, key=lambda path: path.replace("/", "\0"))
    network, _ = checkpoint.load_classifier(output / "models" / "mine")
    for name, pixels in photos.items():
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            expected = network(x).softmax(dim=1)[0]
        row = rows[name]
        order = expected.argsort(descending=True).tolist()
        assert row["prediction"] == order[0]
        assert row["class_name"] == CLASSES[order[0]]
        assert row["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
        assert row["reason"] is None
        assert [guess["prediction"] for guess in row["top5"]] == order[:5]
        assert [guess["class_name"] for guess in row["top5"]] == [CLASSES[label] for label in order[:5]]
    assert "it begins with b'not an image'" in rows["broken.png"]["reason"]
    assert [rows["broken.png"][key] for key in ("prediction", "class_name", "probability", "top5")] == [None] * 4


def test_bad_input_is_named(predict, output, photos):
    digest = sha256(output / "models" / "mine" / "model.safetensors")
    for options, words in (
        (("--model", "none", "--images", output / "photos"), "there is no trained model at"),
        (("--model", "mine", "--images", output / "absent"), "is no folder that exists"),
        (("--model", "mine", "--images", output / "photos" / "01.png"), "is a file; give the folder of images"),
        (("--model", "mine", "--images", output / "models"), "holds no images (.bmp, .gif"),
        (("--model", "mine", "--images", output / "photos", "--to", output / "x.csv"), "must end in .parquet"),
        (("--model", "mine", "--images", "ftp://host/x"), "begins with ftp://"),
    ):
        code, _, error = predict(*options)
        assert code == 2
        assert error.count("\n") == 1
        assert words in error
    assert not (output / "predictions").exists()
    assert sha256(output / "models" / "mine" / "model.safetensors") == digest
