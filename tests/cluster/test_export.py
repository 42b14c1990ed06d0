"""Exported models in MLflow: what it gives back is the same function, under the name and the alias that were asked for."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from small import settings

from dmat_ray.cluster import export, tracking
from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.errors import UserError
from dmat_ray.exchange import model_export, model_import
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

pytestmark = pytest.mark.cluster
CLASSES = ("cat", "dog", "fox", "owl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with random weights."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    torch.manual_seed(0)
    config = Config(name="mine", classifier=ClassifierConfig(name="resnet18", mean=(0.4,), std=(0.3,)))
    network = classifiers.build(config.classifier, 3, 4)
    network(torch.rand(8, 3, 32, 32))
    run = checkpoint.describe_run(config, CLASSES, 3, 32, "f" * 64, "e" * 64)
    checkpoint.save(folder, network, {**run, "epoch": 2, "finished": True, "history": []})
    return folder


def test_a_registered_model_is_the_same_function(tmp_path, model, say, lines):
    config = settings(tmp_path)
    model_export.export(model, "mine", tmp_path / "evaluation", tmp_path / "exported")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    uri = export.log_model(config, "mine", model, tmp_path / "exported", "pets", "champion", say)
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    elsewhere = MlflowClient(f"sqlite:///{tmp_path / 'other.db'}")
    assert not elsewhere.search_registered_models(), "another server's registry is another's"
    assert "version 1 of 'pets' (champion)" in lines[-1]
    x = torch.rand(5, 3, 32, 32)
    network, _ = checkpoint.load_classifier(model)
    mlflow.set_tracking_uri(tracking.tracking_uri(config))
    for place in (uri, "models:/pets@champion"):
        with torch.no_grad():
            torch.testing.assert_close(mlflow.pytorch.load_model(place)(x), network(x), rtol=1e-5, atol=1e-5)
    about = mlflow.models.get_model_info("models:/pets@champion")
    assert about.signature.inputs.inputs[0].shape == (-1, 3, 32, 32)
    assert about.signature.outputs.inputs[0].shape == (-1, 4)
    served = mlflow.pyfunc.load_model("models:/pets@champion").predict(np.asarray(x))
    torch.testing.assert_close(torch.from_numpy(served), network(x).detach(), rtol=1e-4, atol=1e-4)
    folder = Path(mlflow.artifacts.download_artifacts("models:/pets@champion"))
    assert json.loads((folder / "extra_files" / "config.json").read_text())["class_names"] == list(CLASSES)
    assert (folder / "extra_files" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    example = mlflow.models.Model.load(str(folder)).load_input_example(str(folder))
    assert np.asarray(example).shape == (2, 3, 32, 32)
    mlflow.set_tracking_uri(before[0])


def test_what_cannot_be_registered_is_named(tmp_path, model, say):
    with pytest.raises(UserError, match="--alias 'champion' is an alias of a registered model"):
        export.require_loggable({"mine": model}, None, "champion")
    with pytest.raises(UserError, match=r"--register 'pets' takes one model, 2 are given: a, b"):
        export.require_loggable({"a": model, "b": model}, "pets", None)
    torch.manual_seed(0)
    path = tmp_path / "net.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))).save(str(path))
    found = model_import.read_model(path, ClassifierConfig(), None, 1, 8, 4)
    model_import.save_model(found, path, Config(name="theirs"), CLASSES, 1, 8, tmp_path / "theirs")
    with pytest.raises(UserError, match=r"'theirs' is a TorchScript program"):
        export.require_loggable({"theirs": tmp_path / "theirs"}, "pets", None)
    model_export.export(tmp_path / "theirs", "theirs", tmp_path, tmp_path / "exported")
    assert export.log_model(settings(tmp_path), "theirs", tmp_path / "theirs", tmp_path / "exported", None, None, say) is None
    model_export.export(model, "mine", tmp_path, tmp_path / "exported_mine")
    with pytest.raises(UserError, match="MLflow refuses model 'mine'"):
        export.log_model(settings(tmp_path), "mine", model, tmp_path / "exported_mine", "pets", "v1", say)
