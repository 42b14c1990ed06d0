"""Images of folders from Python: loaded with their labels, and labelled by a model."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import folder_of
from PIL import Image

from dmat_ray import load_classifier, load_images, predict, train
from dmat_ray.config import Config, DataConfig
from dmat_ray.errors import UserError
from dmat_ray.exchange import model_export
from dmat_ray.models import checkpoint, prediction
from dmat_ray.networks import classifiers


def digits_in(folder: Path, count: int) -> None:
    """PNG files, those of the first two classes, a sub-folder a class, and one that is none."""
    digits, names = load_images("mnist5k", "train", limit=10 * count)
    for id, x, y in zip(digits.id, digits.x_BCHW, digits.y_B.tolist(), strict=True):
        if y < 2:
            (folder / names[y]).mkdir(parents=True, exist_ok=True)
            Image.fromarray((x[0] * 255).round().byte().numpy()).save(folder / names[y] / f"{id}.png")


def test_images_of_a_folder_are_those_in_it(tmp_path: Path) -> None:
    digits_in(tmp_path, 10)
    images, names = load_images(str(tmp_path), "train")
    assert names == ("0", "1")
    assert images.x_BCHW.shape == (16, 1, 32, 32), "a fifth is the test split"
    for id, x, y in zip(images.id, images.x_BCHW, images.y_B.tolist(), strict=True):
        assert id.startswith(f"{names[y]}/")
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / id)), (x[0] * 255).round().numpy())
    images, _ = load_images(str(tmp_path), "train", resolution=16, channels=3)
    assert images.x_BCHW.shape == (16, 3, 16, 16)
    (tmp_path / "0" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of \d+ images cannot be read, the first: '0/bad.png' .* max_rejected, which is 0.01"):
        [load_images(str(tmp_path), split) for split in ("train", "test")]
    with pytest.warns(UserWarning, match=r"cannot be read, the first: '0/bad.png'"):
        both = [load_images(str(tmp_path), split, max_rejected=1)[0] for split in ("train", "test")]
    assert len(both[0]) + len(both[1]) == 20


@pytest.mark.parametrize(
    ("given", "shape", "told"),
    [
        ({}, (1, 32, 32), "resolution and channels are not given: .* come as 32x32 grey; give resolution=32, channels=1, or"),
        ({"resolution": 16}, (1, 16, 16), "^channels is not given: .* come as 16x16 grey; give channels=1, or others$"),
        ({"channels": 3}, (3, 32, 32), "^resolution is not given: .* come as 32x32 RGB; give resolution=32, or others$"),
        ({"resolution": 32, "channels": 1}, (1, 32, 32), None),
    ],
)
def test_the_size_that_nobody_gave_is_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, given: dict[str, int], shape: tuple[int, ...], told: str | None
) -> None:
    for k in range(4):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((48, 64, 3), 50 * k, np.uint8)).save(tmp_path / "ab"[k % 2] / f"{k}.png")
    assert load_images(tmp_path, test_share=0.5, **given)[0].x_BCHW.shape == (2, *shape)
    said = [(str(warning.message), Path(warning.filename).name) for warning in recwarn]
    assert len(said) == (told is not None)
    if told is not None:
        assert re.search(told, said[0][0])
        assert said[0][1] == Path(__file__).name, "the line is the caller's"


def test_the_digits_have_one_size_of_their_own(recwarn: pytest.WarningsRecorder) -> None:
    load_images("mnist5k", limit=10)
    assert not recwarn.list


@pytest.mark.parametrize("extra", [("a/x.jfif", "b/y.jfif", "notes.md"), ()])
def test_files_that_are_not_taken_are_told(tmp_path: Path, extra: tuple[str, ...]) -> None:
    folder_of(tmp_path, *(f"{name}/{i}.png" for name in "ab" for i in range(4)), *extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_images(tmp_path, resolution=8, channels=1)
    told = ["not taken: 3 files of no extension of images, or beside the class folders, the first: 'a/x.jfif'"]
    assert [str(warning.message) for warning in caught] == (told if extra else [])
    assert {Path(warning.filename).name for warning in caught} <= {Path(__file__).name}, "the line is the caller's"


def model_of(folder: Path, class_names: tuple[str, ...], resolution: int = 32, **data: object) -> Path:
    """A model of random weights, as a training with these settings of the data leaves it."""
    torch.manual_seed(0)
    config = Config.model_validate({"name": "mine", "classifier": {"name": "digits_cnn"}, "data": data})
    network = classifiers.build(config.classifier, 1, len(class_names))
    network(torch.rand(16, 1, resolution, resolution))
    run = checkpoint.describe_run(config, class_names, 1, resolution, None, None)
    checkpoint.save(folder, network, {**run, "finished": True, "history": []})
    return folder


@pytest.mark.parametrize(
    ("class_names", "data", "padded"),
    [
        (tuple("0123456789"), {}, True),
        (("low", "high"), {"classes": {"low": ["0", "1"], "high": ["8", "9"]}}, True),
        (("cat", "dog"), {}, False),
        (tuple("0123456789"), {"source": "elsewhere"}, False),
        (tuple("0123456789"), {"source": "elsewhere", "resize": "pad"}, True),
    ],
    ids=["digits", "classes of digits", "a set of others, trained without a word of it", "others", "others on black"],
)
def test_digits_are_labelled_as_those_that_a_model_of_them_knows(
    tmp_path: Path, class_names: tuple[str, ...], data: dict[str, object], padded: bool
) -> None:
    """The embedded ones lie on 32x32 of black, where others of 28x28 would be enlarged."""
    digits, _ = load_images("mnist5k", limit=10, resolution=28)
    pixels = (digits.x_BCHW[:, 0] * 255).round().byte().numpy()
    (tmp_path / "digits").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "digits" / f"{i}.png")
    model = model_of(tmp_path / "model", class_names, **data)
    network, _ = load_classifier(model)
    enlarged = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS)) for image in pixels]
    x = np.pad(pixels, ((0, 0), (2, 2), (2, 2))) if padded else np.stack(enlarged)
    expected = network(torch.from_numpy(x)[:, None].float() / 255).softmax(dim=1).max(dim=1).values
    found = torch.tensor(predict(model, tmp_path / "digits")["probability"].to_pylist())
    torch.testing.assert_close(found, expected)


def test_images_as_large_as_those_of_the_training_are_labelled(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    Image.new("L", (8000, 6500)).save(tmp_path / "scans" / "0.png", compress_level=1)
    (row,) = predict(model_of(tmp_path / "usual", ("a", "b"), 8), tmp_path / "scans").to_pylist()
    assert row["reason"] == "is 8000x6500 pixels, more than data.max_pixels = 50000000"
    model = model_of(tmp_path / "large", ("a", "b"), 8, max_pixels=60_000_000)
    (row,) = predict(model, tmp_path / "scans").to_pylist()
    assert row["prediction"] in (0, 1)
    run = load_classifier(model)[1]
    told = "note: images of up to 60000000 pixels are read, as for the model's training (data.max_pixels)"
    assert prediction.notes_of_decoding(run, DataConfig(max_pixels=50_000_000), ()) == [told], "given or not"
    assert prediction.read_as(run, DataConfig(max_pixels=1000), "scans").max_pixels == 1000, "who gives another limit wants it"
    assert prediction.notes_of_decoding(run, DataConfig(max_pixels=1000), ()) == []
    few = load_classifier(model_of(tmp_path / "few", ("a", "b"), 8, max_pixels=1000))[1]
    assert prediction.read_as(few, DataConfig(), "scans").max_pixels == DataConfig().max_pixels
    assert prediction.notes_of_decoding(few, DataConfig(), ()) == []


@pytest.mark.parametrize(
    ("here", "given", "told"),
    [
        ({}, (), []),
        ({"resize": "stretch", "grey_levels": 4096}, ("resize", "grey_levels"), []),
        ({"resize": "pad"}, (), ["data.resize pad is not taken: the model has learned from images that were read with stretch"]),
        ({}, ("resize",), ["data.resize crop is not taken: the model has learned from images that were read with stretch"]),
        ({"grey_levels": 1024}, ("grey_levels",), ["data.grey_levels 1024 is not taken: the model has learned from images that"]),
        ({"resolution": 64}, (), ["data.resolution 64 is not taken: the model has learned from images that were read with 16"]),
        ({}, ("resolution",), ["data.resolution 32 is not taken: the model has learned from images that were read with 16"]),
        ({"channels": 1}, ("channels",), ["data.channels 1 is not taken: the model has learned from images that were read"]),
        ({"channels": 3, "resolution": 16}, ("channels", "resolution"), []),
    ],
)
def test_settings_that_a_prediction_does_not_take_are_told(
    here: dict[str, object], given: tuple[str, ...], told: list[str]
) -> None:
    said = {"source": "elsewhere", "resize": "stretch", "grey_levels": 4096}
    run = {"config": {"data": said}, "class_names": ["a", "b"], "channels": 3, "resolution": 16}
    notes = prediction.notes_of_decoding(run, DataConfig.model_validate(here), given)
    assert [note[: len("note: ") + len(start)] for note, start in zip(notes, told, strict=True)] == [f"note: {t}" for t in told]


def test_predictions_are_the_networks(make_config: Callable[..., Config], set_folder: Path, tmp_path: Path) -> None:
    digits_in(tmp_path / "photos", 3)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    model = train(make_config(output=str(tmp_path), manifold_set=str(set_folder), name="tiny"))
    network, run = load_classifier(model)
    table = predict(model, tmp_path / "photos", batch_size=4)
    assert table["path"].to_pylist() == sorted(table["path"].to_pylist(), key=lambda path: path.replace("/", "\0"))
    rows = {row["path"]: row for row in table.to_pylist()}
    assert rows.pop("bad.png")["reason"]
    assert len(rows) == 6
    for path, row in rows.items():
        x = Image.open(tmp_path / "photos" / path).resize((8, 8), Image.Resampling.LANCZOS)
        probability = network(torch.from_numpy(np.asarray(x)).float()[None, None] / 255).softmax(dim=1)[0]
        assert row["class_name"] == run["class_names"][row["prediction"]]
        assert abs(float(probability[row["prediction"]]) - row["probability"]) < 1e-5
    with pytest.raises(UserError, match="batch_size is 0; give a whole number, 1 or more"):
        predict(model, tmp_path / "photos", batch_size=0)
    with pytest.raises(UserError, match=r"^'.*/absent' is no folder that exists"):
        predict(model, tmp_path / "absent")


def test_a_class_that_a_model_has_not_seen_is_told(
    make_config: Callable[..., Config], write_any_set: Callable[..., Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    digits_in(tmp_path / "photos", 1)
    models = {}
    for name, lost in (("whole", {}), ("lacking", {"classes_without_usable": {"train": ["odd", "even"], "test": ["few"]}})):
        folder = write_any_set(tmp_path / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **lost}))
        config = make_config(output=str(folder), manifold_set=str(folder), name="tiny", training={"epochs": 1})
        models[name] = train(config)
    recwarn.clear()
    predict(models["whole"], tmp_path / "photos")
    assert not recwarn.list
    told = "the model was trained without an image of 'odd', 'even', which it cannot know"
    with pytest.warns(UserWarning, match=f"^{told}$"):
        predict(models["lacking"], tmp_path / "photos")
    model_export.export(models["lacking"], "tiny", tmp_path / "evaluation", tmp_path / "export")
    page = (tmp_path / "export" / "README.md").read_text()
    assert "It was trained without an image of 'odd', 'even', which it cannot know." in page


def test_a_folder_of_nothing_readable_is_refused(tmp_path: Path) -> None:
    digits_in(tmp_path, 10)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"4 of 4 images cannot be read, the first: '0/.*Repair or replace the files$"):
        load_images(str(tmp_path), max_rejected=1)
