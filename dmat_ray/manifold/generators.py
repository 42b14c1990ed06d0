"""Generators as folders: the weights, and `card.json` with everything else.

`kind` in the card says what the weights are: a StyleGAN of ours (`generator.safetensors`), or a decoder that came as
a program (`decoder.pt`, `decoder.pt2`, see `exported`).
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from dmat_ray.config import GeneratorConfig, StyleGAN1Config, StyleGAN2Config
from dmat_ray.devices import device_of
from dmat_ray.errors import UserError, first_line
from dmat_ray.formats.layouts import listed
from dmat_ray.formats.stored import shown
from dmat_ray.manifold import exported, fast
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import weights
from dmat_ray.rng import kept_apart
from dmat_ray.storage import Place, text_of
from dmat_ray.storage.files import read_json, sha256, text_digest, write_json
from dmat_ray.validated import describe

WEIGHTS, CARD = "generator.safetensors", "card.json"
FILES = {"stylegan1": WEIGHTS, "stylegan2": WEIGHTS, **exported.FILES}
DTYPES = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
MOST = 400  # letters of what is wrong with a card
UNSHAPED = ("mapping_rate", "fused_from", "conv_clamp")  # settings that change images, and no tensor's shape


def _card(folder: Path, path: str) -> dict[str, Any]:
    card = read_json(folder / CARD)
    if not isinstance(card, dict):
        raise UserError(f"the card of generator '{path}' is a {type(card).__name__}, not a JSON object with kind")
    return card


def _kind(card: dict[str, Any]) -> str:
    """What a card says of its kind, as text."""
    kind = card.get("kind")
    return kind if isinstance(kind, str) else type(kind).__name__


def opened(path: str) -> tuple[Path, dict[str, Any]]:
    """Folder of a shipped generator's name, of the user's path, or of a copy of what his URL names; and its JSON card.

    Raises UserError if it holds no generator, or one of an unknown kind.
    """
    folder = None
    with contextlib.suppress(FileNotFoundError):
        folder = weights.generator_folder(path)
    if folder is None or not folder.is_dir():
        raise UserError(f"generator.path '{path}' is no folder that exists; {weights.HOW_TO_GET_A_GENERATOR}")
    if not (folder / CARD).is_file():
        raise UserError(f"generator.path '{path}' has no {CARD}; {weights.HOW_TO_GET_A_GENERATOR}")
    card = _card(folder, path)
    kind = _kind(card)
    if not (folder / (name := FILES.get(kind, WEIGHTS))).is_file():
        raise UserError(f"generator.path '{path}' has no {name}; {weights.HOW_TO_GET_A_GENERATOR}")
    if kind not in FILES:
        raise UserError(f"generator '{path}' is of kind '{kind[:80]}'; this version reads {', '.join(FILES)}")
    return folder, card


def folder_of(path: str) -> Path:
    """The folder of a generator, as `opened`."""
    return opened(path)[0]


def read_card(path: str) -> dict[str, Any]:
    """The card of a generator, as `opened`."""
    return opened(path)[1]


def fingerprint(path: str) -> str:
    """sha256 that names a generator in sets and checkpoints.

    Of its weights, and of what its card says that changes images beside them: for a StyleGAN only where that is not the
    default. Raises UserError for a card that describes no generator.
    """
    folder, card = opened(path)
    digest = sha256(folder / FILES[card["kind"]])
    if card["kind"] in exported.FILES:
        return text_digest(json.dumps([digest, exported.meaning(card)], sort_keys=True))
    shape = _architecture(card, path)
    told = {key: value for key, value in shape.model_dump(mode="json", exclude_defaults=True).items() if key in UNSHAPED}
    return text_digest(json.dumps([digest, told], sort_keys=True)) if told else digest


def save_generator(folder: Path, generator: StyleGAN1 | StyleGAN2, card: dict[str, Any]) -> None:
    """Write a generator's folder; the card, last, makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in generator.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    kind = "stylegan1" if isinstance(generator, StyleGAN1) else "stylegan2"
    write_json(folder / CARD, {**card, "kind": kind, "architecture": generator.config.model_dump(mode="json")})


def _architecture(card: dict[str, Any], path: str) -> StyleGAN1Config | StyleGAN2Config:
    config = StyleGAN1Config if card["kind"] == "stylegan1" else StyleGAN2Config
    try:
        return config.model_validate(card.get("architecture"))
    except ValidationError as error:
        raise UserError(f"the card of generator '{path}': {shown(describe(error), MOST)}") from None


def build(kind: str, architecture: Any) -> StyleGAN1 | StyleGAN2:
    """An untrained StyleGAN of this kind; raises pydantic's ValidationError for an architecture that is none."""
    if kind == "stylegan1":
        return StyleGAN1(StyleGAN1Config.model_validate(architecture))
    return StyleGAN2(StyleGAN2Config.model_validate(architecture))


class _ShapesOnly(TorchFunctionMode):
    """Makes initial weights without numbers: for random ones torch's own way would first import sympy, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.ones, torch.zeros, torch.full):
            return torch.empty(args[0] if isinstance(args[0], tuple | list) else args, device="meta")
        return args[0] if func is Tensor.div else func(*args, **(kwargs or {}))


def blueprint(kind: str, architecture: Any) -> dict[str, Tensor]:
    """The state of a StyleGAN without its numbers, for sizes that nothing is believed of yet; raises as `build`."""
    with torch.device("meta"), _ShapesOnly():
        return build(kind, architecture).state_dict()


def _check_weights(path: Path, needed: dict[str, Tensor], what: str) -> None:
    """Raise UserError, naming tensors, unless a safetensors file holds those that are needed; reads none of them."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    if missing := needed.keys() - found.keys():
        raise UserError(f"{what} do not fit its card: {len(missing)} of {len(needed)} tensors are not there: {listed(missing)}")
    if extra := found.keys() - needed.keys():
        raise UserError(f"{what} do not fit its card: {len(extra)} tensor(s) have no place there: {listed(extra)}")
    if odd := [
        f"{name} {found[name][0]} is not {tuple(needed[name].shape)}" for name in needed if found[name][0] != needed[name].shape
    ]:
        raise UserError(f"{what} do not fit its card: {len(odd)} shape(s) differ: {listed(odd)}")
    if odd := [f"{name} ({dtype})" for name, (_, dtype) in found.items() if dtype not in DTYPES]:
        raise UserError(f"{what} are not all floating-point numbers: {listed(odd)}")


def _load_stylegan(folder: Path, card: dict[str, Any], path: str) -> StyleGAN1 | StyleGAN2:
    """The StyleGAN of a folder, with the papers' arithmetic. Raises UserError if card and weights do not fit together."""
    what = f"the weights of generator '{path}'"
    shape = _architecture(card, path)
    try:
        _check_weights(folder / WEIGHTS, blueprint(card["kind"], shape), what)
        with kept_apart():  # initial weights
            generator = build(card["kind"], shape)
        generator.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} do not fit its card: {shown(first_line(error), MOST)}") from None
    for key, value in generator.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{what} are not finite: {key}")
    return generator


def load_generator(path: Place, device: torch.device | str = "cpu", precision: str = "reference") -> LatentGenerator:
    """A frozen generator in eval mode, in one of GeneratorConfig's precisions.

    `path` is mnist32 (shipped), or a folder or URL that train_generator.py or import_generator.py wrote.
    Raises UserError for a folder, card or weights that do not fit together, a precision that the kind has not, or a device that
    is not here.

    >>> import torch
    >>> from dmat_ray import load_generator
    >>> g = load_generator("mnist32")
    >>> w = g.mapping(torch.randn(4, g.z_dim))
    >>> w.shape, g.synthesis(w).shape
    (torch.Size([4, 8, 64]), torch.Size([4, 1, 32, 32]))
    """
    path, device = text_of(path), device_of(device)
    folder, card = opened(path)
    if card["kind"] in exported.FILES:
        if precision != "reference":
            raise UserError(f"generator '{path}' is an exported program: generator.precision must be reference, not {precision}")
        return exported.load_exported(folder, card, device)
    generator: LatentGenerator = _load_stylegan(folder, card, path)
    if precision != "reference":
        generator = fast.accelerate(generator, torch.bfloat16 if precision == "bf16" else torch.float32)
    return generator.to(device).eval().requires_grad_(False)


def load_configured(config: GeneratorConfig, device: torch.device | str = "cpu") -> LatentGenerator:
    """The generator that the settings name."""
    generator = load_generator(config.path, device, config.precision)
    if config.recompute:
        recompute(generator)
    return generator


def recompute(generator: LatentGenerator) -> None:
    """From now on only the input of each layer is kept for a gradient, and its activations are computed anew (in place).

    A program has no layers to see, and is computed anew as one.
    """
    if isinstance(generator, exported.ExportedDecoder):
        # to the end: the exception that stops it where all is there again does not come through TorchScript's interpreter
        again = functools.partial(checkpoint, generator.synthesis, use_reentrant=False, early_stop=False)
        generator.synthesis = again  # type: ignore[method-assign]
        return
    synth = generator.synth
    layers = getattr(synth, "layers", None) or getattr(synth, "convs", None) or [synth]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def require_images(generator: LatentGenerator, path: str, channels: int, resolution: int) -> None:
    """Raise UserError unless the generator makes images of this shape."""
    if (generator.channels, generator.resolution) != (channels, resolution):
        raise UserError(
            f"generator '{path}' makes {generator.resolution}x{generator.resolution} images with {generator.channels} "
            f"channel(s), the data has {resolution}x{resolution} with {channels}; set data.resolution and data.channels, or "
            "another generator.path"
        )
