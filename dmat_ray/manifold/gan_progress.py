"""Checkpoints of generator trainings: whose they are, how far they came, and the generator that the last one holds."""

from typing import Any

import torch

from dmat_ray.config import GanConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint, steps
from dmat_ray.storage import Place, at

PROGRESS = "gan.json"


def restored(config: GanConfig, state: Any, device: torch.device) -> StyleGAN2:
    """The generator of these weights, to be used."""
    generator = StyleGAN2(config.architecture)
    generator.load_state_dict(state)
    return generator.to(device).eval().requires_grad_(False)


def is_shorter(settings: dict[str, Any], config: GanConfig) -> bool:
    """Whether these, of a generator's training, are `config` but for fewer `kimg`."""
    then, now = GanConfig.recorded(settings), config.model_dump(mode="json")
    return {**then, "kimg": config.kimg} == now and then["kimg"] < config.kimg


def read_progress(folder: Place, config: GanConfig, *, shorter: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of itself, and its tensors; with `shorter` it is of fewer `kimg`.

    Raises UserError if it is damaged or of another training.
    """
    path = at(folder) / PROGRESS
    if not path.is_file():
        raise UserError(f"'{folder}' is no checkpoint of a generator training (no {PROGRESS})")
    progress: dict[str, Any] = path.read_json()
    then = GanConfig.recorded(progress["config"])
    known = is_shorter(then, config) if shorter else then == config.model_dump(mode="json")
    if not known:
        raise UserError(f"'{folder}' was trained with other settings under gan.*; give another --output or remove it")
    return progress, checkpoint.load_state(folder)


def result_of(folder: Place, config: GanConfig) -> tuple[StyleGAN2, dict[str, Any]]:
    """The generator that a finished training's last checkpoint holds, and its quality and `diverged`.

    Raises UserError if it is damaged, of another training, or not the last.
    """
    progress, state = read_progress(folder, config)
    steps.require_last(folder, progress)
    return restored(config, state["best"], torch.device("cpu")), {**progress["best"], "diverged": progress["diverged"]}
