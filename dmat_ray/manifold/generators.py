"""Generators as folders: the weights, and `card.json` with everything else.

`kind` in the card says what the weights are: a StyleGAN of ours (`generator.safetensors`), or a decoder that came as
a program (`decoder.pt`, `decoder.pt2`, see `exported`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmat_ray import weights
from dmat_ray.cli import describe
from dmat_ray.config import GeneratorConfig, StyleGAN1Config, StyleGAN2Config
from dmat_ray.data.manifold_set import read_json, sha256, text_digest, write_json
from dmat_ray.errors import UserError
from dmat_ray.manifold import fast
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.formats import exported
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2

WEIGHTS, CARD = "generator.safetensors", "card.json"
FILES = {"stylegan1": WEIGHTS, "stylegan2": WEIGHTS, **exported.FILES}


def folder_of(path: str) -> Path:
    """Folder of a shipped generator's name or of the user's path; raises UserError if it holds no generator."""
    folder = weights.generator_folder(path)
    if not (folder / CARD).is_file():
        raise UserError(f"generator.path '{path}' has no {CARD}; {weights.HOW_TO_GET_A_GENERATOR}")
    name = FILES.get(read_json(folder / CARD).get("kind"), WEIGHTS)
    if not (folder / name).is_file():
        raise UserError(f"generator.path '{path}' has no {name}; {weights.HOW_TO_GET_A_GENERATOR}")
    return folder


def read_card(path: str) -> dict[str, Any]:
    """The JSON card of a generator; raises UserError for one of an unknown kind."""
    card: dict[str, Any] = read_json(folder_of(path) / CARD)
    if card.get("kind") not in FILES:
        raise UserError(f"generator '{path}' is of kind '{card.get('kind')}'; this version reads {', '.join(FILES)}")
    return card


def fingerprint(path: str) -> str:
    """sha256 that names a generator in sets and checkpoints: of its weights, or of a program and what its card says of it."""
    card = read_card(path)
    digest = sha256(folder_of(path) / FILES[card["kind"]])
    if card["kind"] not in exported.FILES:
        return digest
    return text_digest(json.dumps([digest, exported.meaning(card)], sort_keys=True))


def save_generator(folder: Path, generator: StyleGAN1 | StyleGAN2, card: dict[str, Any]) -> None:
    """Write a generator's folder; the card, last, makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in generator.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    kind = "stylegan1" if isinstance(generator, StyleGAN1) else "stylegan2"
    write_json(folder / CARD, {**card, "kind": kind, "architecture": generator.config.model_dump(mode="json")})


def build(kind: str, architecture: Any) -> StyleGAN1 | StyleGAN2:
    """An untrained StyleGAN of this kind; raises pydantic's ValidationError for an architecture that is none."""
    if kind == "stylegan1":
        return StyleGAN1(StyleGAN1Config.model_validate(architecture))
    return StyleGAN2(StyleGAN2Config.model_validate(architecture))


def load_stylegan(path: str) -> StyleGAN1 | StyleGAN2:
    """The StyleGAN of a folder, with the papers' arithmetic. Raises UserError if card and weights do not fit together."""
    folder, card = folder_of(path), read_card(path)
    try:
        generator = build(card["kind"], card.get("architecture"))
        generator.load_state_dict(load_file(folder / WEIGHTS))
    except ValidationError as error:
        raise UserError(f"the card of generator '{path}': {describe(error)}") from None
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"the weights of generator '{path}' do not fit its card: {str(error).splitlines()[0]}") from None
    for key, value in generator.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"the weights of generator '{path}' are not finite: {key}")
    return generator


def load_generator(path: str, device: torch.device | str = "cpu", precision: str = "reference") -> LatentGenerator:
    """A frozen generator in eval mode, in one of GeneratorConfig's precisions.

    Raises UserError for a folder, card or weights that do not fit together, or a precision that the kind has not.
    """
    if read_card(path)["kind"] in exported.FILES:
        if precision != "reference":
            raise UserError(f"generator '{path}' is an exported program: generator.precision must be reference, not {precision}")
        return exported.load_exported(folder_of(path), read_card(path), torch.device(device))
    generator: LatentGenerator = load_stylegan(path)
    if precision != "reference":
        generator = fast.accelerate(generator, torch.bfloat16 if precision == "bf16" else torch.float32)
    return generator.to(device).eval().requires_grad_(False)


def load_configured(config: GeneratorConfig, device: torch.device | str = "cpu") -> LatentGenerator:
    """The generator that the settings name."""
    return load_generator(config.path, device, config.precision)


def require_images(generator: LatentGenerator, path: str, channels: int, resolution: int) -> None:
    """Raise UserError unless the generator makes images of this shape."""
    if (generator.channels, generator.resolution) != (channels, resolution):
        raise UserError(
            f"generator '{path}' makes {generator.resolution}x{generator.resolution} images with {generator.channels} "
            f"channel(s), the data has {resolution}x{resolution} with {channels}; set data.resolution and data.channels"
        )
