"""Exported classifiers in MLflow: a model of its PyTorch flavour, with signature and example, registered if asked."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmat_ray.cluster import tracking
from dmat_ray.config import Config
from dmat_ray.errors import UserError, first_line
from dmat_ray.exchange import model_export
from dmat_ray.models import checkpoint
from dmat_ray.storage import Place, tracking_uri
from dmat_ray.storage.folders import fetched

NAME = "model"  # of the model in its run
TOLERANCE = 1e-4  # of the largest logit


@contextmanager
def _server(uri: str) -> Iterator[None]:
    """Inside, MLflow's own functions speak to this server.

    Its registry follows by itself, as it does for every client; set here it would be that of later clients of other servers, too.
    """
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:  # MLflow sets it beside, and jobs that this process starts would speak to that server
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def require_loggable(models: Mapping[str, Place], register: str | None, alias: str | None) -> None:
    """Raise UserError for a registration that cannot be."""
    if alias and not register:
        raise UserError(f"--alias '{alias}' is an alias of a registered model; give --register NAME too")
    if register and len(models) > 1:
        raise UserError(f"--register '{register}' takes one model, {len(models)} are given: {', '.join(models)}")
    for name, folder in models.items():
        if register and checkpoint.read_run(folder).get("program") == "torchscript":
            raise UserError(
                f"model '{name}' is a TorchScript program, of which MLflow makes no pt2 model; export it with torch.export, or "
                "leave --register away"
            )


def log_model(
    config: Config, name: str, model: Place, exported: Place, register: str | None, alias: str | None, say: Callable[[str], None]
) -> str | None:
    """Log a model and its exported files to MLflow; returns the URI that mlflow.pytorch.load_model takes.

    A TorchScript program has none: its files are logged alone. Raises UserError for a name or an alias that MLflow refuses, and
    for a network that torch.export cannot export.
    """
    with tracking.tracked(config, name, "export") as run:
        network, about = checkpoint.load_classifier(model)
        if about.get("program") == "torchscript":
            run.artifact(exported, "export")
            say(f"{name}: a TorchScript program is no pt2 model; its files are in MLflow, without a model of a flavour")
            return None
        with _server(tracking_uri(config)):
            return _log(run.id, name, network, about, fetched(exported), register, alias, say)


def _log(
    run_id: str,
    name: str,
    network: torch.nn.Module,
    about: dict[str, Any],
    exported: Path,
    register: str | None,
    alias: str | None,
    say: Callable[[str], None],
) -> str:
    import mlflow
    import mlflow.pytorch
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape: tuple[int, int, int] = (about["channels"], about["resolution"], about["resolution"])
    classes = len(about["class_names"])
    kind = np.dtype(np.float32)
    # without names: with one, MLflow's pyfunc would take dicts only
    signature = ModelSignature(Schema([TensorSpec(kind, (-1, *shape))]), Schema([TensorSpec(kind, (-1, classes))]))
    files = [str(path) for path in sorted(exported.iterdir()) if path.name != model_export.README]
    try:
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pytorch.log_model(
                network,
                name=NAME,
                signature=signature,
                # two: of a batch of one torch.export takes the size for a constant
                input_example=np.full((2, *shape), 0.5, np.float32),
                serialization_format="pt2",
                extra_files=files,
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
            )
        # before it is registered: nobody shall find another function under the name
        _require_equal(name, network, mlflow.pytorch.load_model(info.model_uri), shape)
        version = mlflow.register_model(info.model_uri, register).version if register else None
        if register and alias:
            mlflow.MlflowClient().set_registered_model_alias(register, alias, version)
    except MlflowException as error:
        raise UserError(f"MLflow refuses model '{name}': {first_line(error)}") from None
    where = f", version {version} of '{register}'{f' ({alias})' if alias else ''}" if register else ""
    say(f"{name}: {info.model_uri}{where}")
    return str(info.model_uri)


@torch.no_grad()
def _require_equal(name: str, network: torch.nn.Module, read_back: torch.nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless what MLflow gives back is the same function, for another batch size than it was exported with."""
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    try:
        found = read_back(x)
    except Exception as error:  # whatever torch says of a size that it took for a constant
        raise UserError(f"model '{name}' was exported for a fixed batch ({first_line(error)})") from None
    if not torch.allclose(found, expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0):
        raise UserError(f"model '{name}' comes back from MLflow with other logits; its network depends on more than its input")
