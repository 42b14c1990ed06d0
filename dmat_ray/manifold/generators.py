"""Generators as folders: `generator.safetensors` with the weights, `card.json` with everything else."""

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmat_ray.cli import describe
from dmat_ray.config import StyleGAN2Config
from dmat_ray.data.manifold_set import read_json, sha256, write_json
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import StyleGAN2

WEIGHTS, CARD = "generator.safetensors", "card.json"
SHIPPED = ("mnist32",)


def folder_of(path: str) -> Path:
    """Folder of a shipped generator's name or of the user's path; raises UserError if it holds no generator."""
    folder = Path(str(resources.files("dmat_ray") / "assets" / path)) if path in SHIPPED else Path(path)
    for name in (WEIGHTS, CARD):
        if not (folder / name).is_file():
            raise UserError(
                f"generator.path '{path}' has no {name}; give {' or '.join(map(repr, SHIPPED))}, "
                "or a folder written by jobs/train_generator.py"
            )
    return folder


def fingerprint(path: str) -> str:
    """sha256 of a generator's weights, which names it in sets and checkpoints."""
    return sha256(folder_of(path) / WEIGHTS)


def read_card(path: str) -> dict[str, Any]:
    """The JSON card of a generator."""
    card: dict[str, Any] = read_json(folder_of(path) / CARD)
    return card


def save_generator(folder: Path, generator: StyleGAN2, card: dict[str, Any]) -> None:
    """Write a generator's folder; the card, last, makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in generator.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    write_json(folder / CARD, {**card, "kind": "stylegan2", "architecture": generator.config.model_dump(mode="json")})


def load_generator(path: str, device: torch.device | str = "cpu") -> StyleGAN2:
    """A frozen generator in eval mode. Raises UserError for a folder, card or weights that do not fit together."""
    folder = folder_of(path)
    card = read_card(path)
    if card.get("kind") != "stylegan2":
        raise UserError(f"generator '{path}' is of kind '{card.get('kind')}'; this version reads 'stylegan2'")
    try:
        generator = StyleGAN2(StyleGAN2Config.model_validate(card.get("architecture")))
        generator.load_state_dict(load_file(folder / WEIGHTS))
    except ValidationError as error:
        raise UserError(f"the card of generator '{path}': {describe(error)}") from None
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of generator '{path}' do not fit its card: {str(error).splitlines()[0]}") from None
    if not all(bool(torch.isfinite(p).all()) for p in generator.state_dict().values()):
        raise UserError(f"the weights of generator '{path}' are not finite")
    return generator.to(device).eval().requires_grad_(False)


def require_images(generator: StyleGAN2, path: str, channels: int, resolution: int) -> None:
    """Raise UserError unless the generator makes images of this shape."""
    if (generator.channels, generator.resolution) != (channels, resolution):
        raise UserError(
            f"generator '{path}' makes {generator.resolution}x{generator.resolution} images with {generator.channels} "
            f"channel(s), the data has {resolution}x{resolution} with {channels}; set data.resolution and data.channels"
        )
