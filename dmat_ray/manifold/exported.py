"""Decoders that come as a program: of a VAE, an autoencoder, or any other map w -> image that torch can export.

A folder holds the program (`decoder.pt` for TorchScript, `decoder.pt2` for torch.export) and `card.json`, which says what
the program does not: the shape of w, the shape and range of the images, and the distribution of w. `programs` says what is
looked at before a program by others is loaded; what it puts out is tried each time it is loaded.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dmat_ray.config import Section
from dmat_ray.config.data import Channels
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.formats.programs import Kind, kind_of, load_program, reason
from dmat_ray.formats.stored import shown
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.models.checkpoint import versions
from dmat_ray.storage.files import read_json, sha256, write_json
from dmat_ray.validated import describe

FILES: dict[str, str] = {"torchscript": "decoder.pt", "torch_export": "decoder.pt2"}
CARD = "card.json"
EXAMPLE = '{"w_dim": 64, "resolution": 32, "channels": 1}'
# largest difference, in [0, 1] units, that rounding may make between two runs on one w
TOLERANCE = 1e-3
MOST = 1 << 22  # numbers of one W+ code


class DecoderCard(Section):
    """What a decoder expects and makes. `w_dim`, `resolution` and `channels` have no default."""

    kind: Kind = Field(description="what the program is; an import finds out by itself")
    w_dim: int = Field(ge=1, le=1 << 20, description="dimensions of one w vector")
    num_ws: int = Field(1, ge=1, le=4096, description="number of w vectors")
    resolution: int = Field(ge=8, le=1024, description="image height and width in pixels")
    channels: Channels = Field(description="image channels: 1 (grey) or 3 (RGB)")
    output_range: tuple[float, float] = Field((0.0, 1.0), description="[0, 1] (a sigmoid) or [-1, 1] (a tanh)")
    input: Literal["BD", "BLD"] | None = Field(
        None, description="'BLD': w is (B, num_ws, w_dim); 'BD': flattened, (B, num_ws * w_dim); null = BD if num_ws is 1"
    )
    w_mean: float | tuple[float, ...] = Field(0.0, description="mean of w: a number or w_dim of them; 0 is a VAE's prior")
    w_std: float | tuple[float, ...] = Field(1.0, description="standard deviation of w, likewise; 1 is a VAE's prior")
    name: str = Field("", description="for people")
    sha256: str | None = Field(None, description="of the program, written by the import")
    source: str | None = Field(None, description="name of the imported file, written by the import")
    versions: dict[str, str] | None = Field(None, description="versions of what imported it, written by the import")

    @model_validator(mode="after")
    def _check(self) -> "DecoderCard":
        if self.num_ws * self.w_dim > MOST:
            raise ValueError(f"num_ws {self.num_ws} times w_dim {self.w_dim} is more than {MOST}")
        if self.output_range not in ((0.0, 1.0), (-1.0, 1.0)):
            raise ValueError(f"output_range is {list(self.output_range)}, but must be [0, 1] or [-1, 1]")
        for key, value in (("w_mean", self.w_mean), ("w_std", self.w_std)):
            if isinstance(value, tuple) and len(value) != self.w_dim:
                raise ValueError(f"{key} has {len(value)} numbers, but w_dim is {self.w_dim}")
        if min(self.w_std if isinstance(self.w_std, tuple) else (self.w_std,)) <= 0:
            raise ValueError("w_std must be above 0")
        return self


class ExportedDecoder(LatentGenerator):
    """A program w -> image as a generator: `z_dim` is `w_dim`, and mapping is w_mean + w_std z.

    Always in eval mode, as it was exported, and frozen: a gradient reaches w and nothing else.
    """

    def __init__(self, card: DecoderCard, program: nn.Module, device: torch.device) -> None:
        super().__init__(card.w_dim, card.w_dim, card.num_ws, card.resolution, card.channels)
        self.program = program
        self.flat = (card.input or ("BD" if card.num_ws == 1 else "BLD")) == "BD"
        self.low, self.high = card.output_range
        self.w_mean = torch.tensor(card.w_mean).expand(card.w_dim).clone().to(device)
        self.w_std = torch.tensor(card.w_std).expand(card.w_dim).clone().to(device)
        self.eval()

    def train(self, mode: bool = True) -> "ExportedDecoder":
        """Nothing: an exported program has but one mode."""
        self.training = False
        return self

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """z ~ N(0, 1) -> w_BLD = w_mean + truncation_psi w_std z, the same code in each of the num_ws layers."""
        w_BD = self.w_mean + truncation_psi * self.w_std * z_BZ
        return w_BD[:, None].expand(-1, self.num_ws, -1)

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        """w_BLD -> x_BCHW in [0, 1]; without `clamp` the program's output, scaled only."""
        x: Tensor = self.program(w_BLD.flatten(1) if self.flat else w_BLD)
        x = (x.to(w_BLD.dtype) - self.low) / (self.high - self.low)
        return x.clamp(0.0, 1.0) if clamp else x


def read_decoder_card(values: Any, what: str) -> DecoderCard:
    """Validated values of a card; `what` names it in the UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{what} is not a JSON object; the least there can be is {EXAMPLE}")
    try:
        return DecoderCard.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{what}: {shown(describe(error), 400)}; the least there can be is {EXAMPLE}") from None


def meaning(values: Any) -> dict[str, Any]:
    """Of a card, what changes images or the distribution of w; not names and versions."""
    notes = {"name", "sha256", "source", "versions"}
    return read_decoder_card(values, "the card of the generator").model_dump(mode="json", exclude=notes)


def _decode(decoder: ExportedDecoder, w: Tensor, path: Path) -> Tensor | str:
    """The unclamped images of w, or in words why there are none."""
    try:
        x = decoder.program(w.flatten(1) if decoder.flat else w)
        if not isinstance(x, Tensor):
            raise UserError(f"'{path}' returns a {type(x).__name__}, not one tensor; export a decoder w -> image")
        expected = (decoder.channels, decoder.resolution, decoder.resolution)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise UserError(
                f"'{path}' makes {tuple(x.shape)} of {len(w)} w, its card promises ({len(w)}, {', '.join(map(str, expected))}); "
                "set resolution and channels in the card"
            )
        return x if len(x) == len(w) else f"it makes {len(x)} images of {len(w)} w"
    except UserError:
        raise
    except Exception as error:  # whatever the program raises
        return reason(error)


@torch.no_grad()
def _probe_images(decoder: ExportedDecoder, w: Tensor, path: Path) -> None:
    one, all_ = _decode(decoder, w[:1], path), _decode(decoder, w, path)
    shape = f"(B, {decoder.num_ws * decoder.w_dim})" if decoder.flat else f"(B, {decoder.num_ws}, {decoder.w_dim})"
    if isinstance(one, str) and isinstance(all_, str):
        raise UserError(
            f"'{path}' fails on w of shape {shape}, for a B of 1 ({one}) and of {len(w)}; set w_dim, num_ws and input in the "
            "card, and export it with a dynamic batch dimension"
        )
    if isinstance(one, str) or isinstance(all_, str):
        count, why = (1, one) if isinstance(one, str) else (len(w), all_)
        raise UserError(
            f"'{path}' was exported for a fixed batch, it fails on a batch of {count} ({why}); export it again with a dynamic "
            "batch dimension (dynamic_shapes, or in TorchScript x.shape[0] instead of a number)"
        )
    if not torch.isfinite(all_).all():
        raise UserError(
            f"'{path}' puts out values that are not finite, at w_mean or a draw of w; check w_mean and w_std in the card"
        )
    (low, high), span = all_.aminmax(), decoder.high - decoder.low
    if low < decoder.low - span / 2 or high > decoder.high + span / 2:
        raise UserError(
            f"'{path}' puts out values from {low:.3g} to {high:.3g}, its card promises [{decoder.low:g}, {decoder.high:g}]; set "
            "output_range in the card, or end the decoder in a sigmoid or tanh"
        )
    x = decoder.synthesis(w, clamp=False)
    if (x - decoder.synthesis(w, clamp=False)).abs().max() > TOLERANCE:
        raise UserError(
            f"'{path}' makes another image of the same w each time; call .eval() before exporting it, and draw no noise"
        )
    alone = torch.cat([decoder.synthesis(row, clamp=False) for row in w.split(1)])
    if (x - alone).abs().max() > TOLERANCE:
        raise UserError(
            f"'{path}' makes another image of w alone than among others (batch norm in training mode does that); call .eval() "
            "before exporting it"
        )


@torch.enable_grad()
def _probe_gradient(decoder: ExportedDecoder, w: Tensor, path: Path) -> None:
    w = w.detach().requires_grad_(True)
    x = decoder.synthesis(w, clamp=False)
    # a random weighting: the plain sum of a normalised image does not depend on w
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    gradient = torch.autograd.grad((x * weights).sum(), w, allow_unused=True)[0] if x.requires_grad else None
    if gradient is None or not gradient.any():
        raise UserError(f"no gradient reaches w through '{path}'; export it without no_grad, detach or rounding")
    if not torch.isfinite(gradient).all():
        raise UserError(f"the gradient of '{path}' with respect to w is not finite, at w_mean or a draw of w")


def _load(path: Path, card: DecoderCard, device: torch.device) -> ExportedDecoder:
    decoder = ExportedDecoder(card, load_program(path, card.kind, device), device)
    z = torch.randn(3, card.w_dim, generator=torch.Generator().manual_seed(0))
    z[0] = 0  # w_mean itself; the others differ, or batch statistics would not show
    w = decoder.mapping(z.to(device)).contiguous()
    with tf32(False):  # whose rounding, another one for each number of images, is above TOLERANCE
        _probe_images(decoder, w, path)
        _probe_gradient(decoder, w, path)
    return decoder


def load_exported(folder: Path, card: dict[str, Any], device: torch.device) -> ExportedDecoder:
    """The decoder of a folder, tried on w_mean and two draws of w.

    Raises UserError for a wrong card, a program that may not be loaded (see `programs`) or is not the one imported, and for
    one whose images have another shape or range than the card says, are not finite, depend on their neighbours in the batch or
    on chance, whose batch is fixed, or through which no gradient reaches w.
    """
    parsed = read_decoder_card(card, f"the card of generator '{folder}'")
    path = folder / FILES[parsed.kind]
    if parsed.sha256 is not None and sha256(path) != parsed.sha256:
        raise UserError(
            f"'{path}' is not the program that its card was written for; import it again with jobs/import_generator.py"
        )
    return _load(path, parsed, device)


def is_program(path: Path) -> bool:
    """Whether the file's content is a TorchScript or torch.export program, whatever its name; False if there is no file."""
    return kind_of(path) is not None


def import_program(path: Path, card_path: Path | None, folder: Path) -> None:
    """Copy a program and its card into `folder`, tried as when it is loaded; the card, last, makes the folder whole.

    The card gets the program's `kind`, `sha256`, `source` and the `versions` of what read it. Raises UserError as
    `load_exported`, and if there is no card or it is another kind's; `folder` is then as before.
    """
    if not path.is_file():
        raise UserError(f"there is no file at '{path}'")
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"'{path}' is damaged, or neither a TorchScript nor a torch.export file; export it again")
    if card_path is None or not card_path.is_file():
        missing = "needs a card" if card_path is None else f"needs a card, and '{card_path}' is not there"
        raise UserError(f"'{path}' {missing}: give --card card.json with at least {EXAMPLE}, and see docs/guide.md for the rest")
    values = read_json(card_path)
    card = read_decoder_card({"kind": kind, **values} if isinstance(values, dict) else values, f"the card '{card_path}'")
    if card.kind != kind:
        raise UserError(f"the card '{card_path}' says kind '{card.kind}', but '{path}' is {kind}; remove kind from the card")
    _load(path, card, torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    program = folder / FILES[kind]
    if path.resolve() != program.resolve():
        shutil.copyfile(path, program)
    written = {"sha256": sha256(program), "source": path.name, "versions": versions()}
    write_json(folder / CARD, {**card.model_dump(mode="json", exclude_none=True), **written})
