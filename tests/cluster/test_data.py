"""Data sets as they are published, on their whole way: files or a tree, Ray Data, the on-manifold set, what reads it."""

import io

import numpy as np
import packed_files
import pytest
from PIL import Image
from small import settings

from dmat_ray import presets
from dmat_ray.cluster import jobs
from dmat_ray.data.inspection import inspect_set
from dmat_ray.data.manifold_set import open_set
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import set_maker

pytestmark = pytest.mark.cluster


def test_mnist_in_an_object_store_becomes_a_set(store, ray_session, tmp_path, say):
    """Compressed, at the size of the generator's digits, with the official test images as the test split."""
    train, test = packed_files.arrays(70, 10, (28, 28)), packed_files.arrays(30, 10, (28, 28), seed=1)
    files = packed_files.idx(tmp_path / "raw", train, test, compressed=True)
    store.put("mnist", {f"raw/{path.name}": path.read_bytes() for path in files.iterdir()})
    options = ("--data.source", "s3://mnist/raw", "--data.resize", "pad", "--projection.steps", "1")
    jobs.project(settings(tmp_path / "out", *options), say)
    for split, (pixels, labels), limit in (("train", train, 60), ("test", test, 20)):
        found = open_set(tmp_path / "out" / "on_manifold_set", split, include_poor=True)
        assert len(found) == limit
        for id, natural, label in zip(found.id, found.natural, found.label, strict=True):
            k = int(id.removeprefix(f"{split}-"))
            assert label == labels[k]
            np.testing.assert_array_equal(natural[0], np.pad(pixels[k], 2))
    # it decodes the stored images again, as the set says, and compares them with the errors that the projector has measured
    assert inspect_set(tmp_path / "out" / "on_manifold_set").sound


def test_a_tree_of_imagenet_becomes_a_set_of_mixed10(ray_session, tmp_path, say, lines):
    rng = np.random.default_rng(0)
    classes = presets.load(["mixed10_classes"])["data"]["classes"]
    for synset in [synset for members in classes.values() for synset, _ in members] + ["n99999999"]:
        (tmp_path / "imagenet" / "train" / synset).mkdir(parents=True)
        for i in range(3):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, format="JPEG")
            (tmp_path / "imagenet" / "train" / synset / f"{synset}_{i}.JPEG").write_bytes(buffer.getvalue())
    broken = tmp_path / "imagenet" / "train" / "n02085620" / "n02085620_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    options = (
        *(
            "--data.source",
            tmp_path / "imagenet",
            "--data.resize",
            "stretch",
            "--data.balanced",
            "true",
            "--projection.steps",
            "1",
        ),
        *("--data.train_limit", "null", "--data.test_limit", "null", "--projection.shard_size", "50"),
    )
    config = settings(tmp_path / "out", *options, preset=("demo", "mixed10_classes"))
    manifest = jobs.project(config, say)
    assert manifest["class_names"] == list(classes)
    assert manifest["splits"] == {"test": 60, "train": 119}
    assert list(manifest["rejected"]) == ["train/n02085620/n02085620_0.JPEG"]
    assert "not taken: 3 images of 1 classes that data.classes does not name" in lines
    assert inspect_set(tmp_path / "out" / "on_manifold_set").sound
    with pytest.raises(UserError, match=r"was begun with data\.resize = stretch, now it is its default"):
        jobs.project(config.model_copy(update={"data": config.data.model_copy(update={"resize": "crop"})}), say)


def test_a_set_that_is_older_than_a_setting_is_that_of_its_default(tmp_path):
    config = settings(tmp_path)
    told = set_maker.settings_of(config, list_examples(config.data))["data"]
    # as they were before there was any other way to give data
    assert sorted(told) == [
        *("channels", "id_column", "image_column", "label_column", "max_pixels", "resolution", "seed", "source"),
        *("test_limit", "test_share", "train_limit"),
    ]
    other = config.model_copy(update={"data": config.data.model_copy(update={"balanced": True})})
    assert set_maker.settings_of(other, list_examples(other.data))["data"] == {**told, "balanced": True}
