"""An encoder: a small residual network from images to W+, that projection may start from, and its folder.

Like the encoders of other inversion methods (e.g. arXiv 2008.00951) it predicts the offset of w from its mean. It has no
normalisation over the batch or over anything else, so that an image's code does not depend on its neighbours.
"""

import math
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmat_ray.config import EncoderConfig
from dmat_ray.errors import UserError
from dmat_ray.networks.weights import generator_place
from dmat_ray.rng import kept_apart
from dmat_ray.storage import Location, Place, at
from dmat_ray.storage.files import sha256, write_json
from dmat_ray.storage.folders import fetched
from dmat_ray.types import Generator

FOLDER, WEIGHTS, CARD = "encoder", "encoder.safetensors", "encoder.json"
VERSION = 1
SMALLEST = 4  # height and width at which the features are read out
LARGEST = 1 << 20  # a bound for every size in a card
SLOPE = 0.2  # of the leaky ReLU
MOST = 400  # letters of what is wrong with a file
HOW_TO_GET_ONE = "train one with jobs/train_encoder.py, or start without: --projection.start nearest"


class _Block(nn.Module):
    """Residual block that halves the resolution, rounding up."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, stride=2)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.conv0(F.leaky_relu(x, SLOPE)), SLOPE))
        skip = self.skip(F.avg_pool2d(x, 2, ceil_mode=True))
        total: Tensor = (y + skip) * math.sqrt(0.5)
        return total


class Encoder(nn.Module):
    """x_BCHW in [0, 1] -> w_BLD float32: w_mean plus w_std times what the network says, which at first is 0.

    `w_mean` (D) and `w_std` (D) are the generator's. Layers are read out at a size of 4x4 or less.
    """

    w_mean: Tensor
    w_std: Tensor

    def __init__(self, resolution: int, channels: int, num_ws: int, w_dim: int, width: int, width_max: int) -> None:
        super().__init__()
        self.architecture = {
            "resolution": resolution, "channels": channels, "num_ws": num_ws, "w_dim": w_dim,
            "width": width, "width_max": width_max,
        }  # fmt: skip
        self.num_ws = num_ws
        sizes = [resolution]
        while sizes[-1] > SMALLEST:
            sizes.append((sizes[-1] + 1) // 2)
        widths = [min(width_max, width << k) for k in range(len(sizes))]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(widths)))
        self.hidden = nn.Linear(widths[-1] * sizes[-1] ** 2, width_max)
        self.head = nn.Linear(width_max, num_ws * w_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("w_mean", torch.zeros(w_dim))
        self.register_buffer("w_std", torch.ones(w_dim))

    def offset(self, x_BCHW: Tensor) -> Tensor:
        """(w - w_mean) / w_std (B, L, D), float32."""
        features = F.leaky_relu(self.blocks(self.stem(x_BCHW * 2 - 1)), SLOPE)
        flat: Tensor = self.head(F.leaky_relu(self.hidden(features.flatten(1)), SLOPE))
        return flat.float().view(len(x_BCHW), self.num_ws, -1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.w_mean + self.w_std * self.offset(x_BCHW)


def untrained(config: EncoderConfig, generator: Generator) -> Encoder:
    """An encoder for this generator that says w_mean of every image; its other weights are drawn by torch's global rng."""
    encoder = Encoder(generator.resolution, generator.channels, generator.num_ws, generator.w_dim, config.width, config.width_max)
    encoder.w_mean.copy_(generator.w_mean)
    encoder.w_std.copy_(generator.w_std)
    return encoder.to(generator.w_mean.device)


def as_stored(encoder: Encoder) -> dict[str, Tensor]:
    """The state as it is written: weights in float16, which moves codes by about 0.001 w_std; w_mean and w_std as they are."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    return {name: value if name in ("w_mean", "w_std") else value.half() for name, value in state.items()}


def save_encoder(folder: Path, encoder: Encoder, card: dict[str, Any]) -> None:
    """Write encoder.safetensors and, last, encoder.json into a folder, which may be the generator's own.

    `card` holds `generator_sha256` and whatever else is worth knowing. Until the new json is there, there is none.
    """
    assert "generator_sha256" in card
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    save_file(as_stored(encoder), folder / WEIGHTS)
    whole = {**card, "version": VERSION, "architecture": encoder.architecture, "weights_sha256": sha256(folder / WEIGHTS)}
    write_json(folder / CARD, whole)


def read_card(folder: Place) -> dict[str, Any]:
    """encoder.json of a whole encoder; raises UserError for a folder that is missing, unfinished or of another version."""
    path = at(folder) / CARD
    if not path.parent.is_dir():
        raise UserError(f"there is no encoder at '{folder}'; {HOW_TO_GET_ONE}")
    if not path.is_file():
        raise UserError(f"'{folder}' holds no encoder, or an unfinished one (no {CARD}); {HOW_TO_GET_ONE}")
    card = path.read_json()
    if not isinstance(card, dict):
        raise UserError(f"'{path}' is damaged: a {type(card).__name__}, not a JSON object")
    if card.get("version") != VERSION:
        raise UserError(
            f"the encoder '{folder}' has format version {card.get('version')!r}, this program reads {VERSION}; {HOW_TO_GET_ONE}"
        )
    return card


def _architecture(card: dict[str, Any], folder: Place) -> dict[str, int]:
    """The sizes that a card gives, each a positive integer."""
    found = card.get("architecture")
    names = list(signature(Encoder).parameters)
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise UserError(f"'{at(folder) / CARD}' is damaged: architecture must give {', '.join(names)}")
    for name, value in found.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise UserError(f"'{at(folder) / CARD}' is damaged: architecture.{name} is {str(value)[:80]}")
    return found


def load_encoder(folder: Place, generator_sha256: str, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a folder, frozen and in eval mode, for the generator of this fingerprint.

    Raises UserError for a folder that is missing, damaged or of another generator, and for weights that do not fit.
    """
    card = read_card(folder)
    if card.get("generator_sha256") != generator_sha256:
        raise UserError(
            f"the encoder '{folder}' was trained for generator {str(card.get('generator_sha256'))[:12]}, but the one given is "
            f"{generator_sha256[:12]}; {HOW_TO_GET_ONE}"
        )
    sizes, path = _architecture(card, folder), fetched(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"the encoder '{folder}' has no {WEIGHTS}; {HOW_TO_GET_ONE}")
    if (digest := sha256(path)) != card.get("weights_sha256"):
        raise UserError(
            f"'{at(folder) / WEIGHTS}' is damaged or not the one that {CARD} was written for: its sha256 begins with "
            f"{digest[:12]}, not {str(card.get('weights_sha256'))[:12]}; {HOW_TO_GET_ONE}"
        )
    try:
        state = load_file(path)
        with torch.device("meta"):  # a card alone must not make this reserve memory
            wanted = {name: tuple(value.shape) for name, value in Encoder(**sizes).state_dict().items()}
        for name, shape in wanted.items():
            if name not in state or tuple(state[name].shape) != shape:
                found = "not there" if name not in state else tuple(state[name].shape)
                raise UserError(f"the weights of encoder '{folder}' do not fit its card: {name} is {found}, not {shape}")
        with kept_apart():  # initial weights
            encoder = Encoder(**sizes)
        encoder.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines())
        raise UserError(f"the weights of encoder '{folder}' do not fit its card: {lines[:MOST]}") from None
    for name, value in encoder.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"the weights of encoder '{folder}' are not finite: {name}")
    return encoder.to(device).eval().requires_grad_(False)


def fingerprint_encoder(folder: Place) -> str:
    """sha256 of an encoder's weights; raises UserError if there are none."""
    path = at(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"'{folder}' has no {WEIGHTS}; {HOW_TO_GET_ONE}")
    return sha256(fetched(path))


def locate_encoder(setting: str | None, output: Place, generator_path: str) -> Location:
    """The encoder's folder: the setting, else OUTPUT/encoder, else the generator's own; raises UserError if there is none."""
    if setting is not None:
        return at(setting)
    own, shipped = at(output) / FOLDER, generator_place(generator_path)
    if own.is_dir():
        return own
    if (shipped / WEIGHTS).is_file():
        return shipped
    raise UserError(
        f"projection.start is encoder, but there is none in '{own}' nor beside the generator '{generator_path}'; "
        "train one with jobs/train_encoder.py and the same --output, give its folder as --projection.encoder, or start "
        "without: --projection.start nearest"
    )
