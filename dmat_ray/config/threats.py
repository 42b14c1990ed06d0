"""Settings of threats: what an attack may change, and how far. Sources are named in the modules of `dmat_ray.threats`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, create_model, model_validator
from pydantic_settings import CliSuppress

from dmat_ray.config.base import Fraction, Section

S = TypeVar("S", bound=Section)


EXAMPLES = {"l2": ", e.g. 128/255", "l1": ", e.g. 12"}
"""Radii of pixels as they are usual for images of 32."""
IN_WORDS = {"raw": "raw W", "std": "standard deviations of w"}


def unit_in_words(unit: str) -> str:
    """What a radius is in, as messages say it: the name of a norm, or what a `scale` means."""
    return IN_WORDS.get(unit, unit)


def require_own_eps(settings: Section) -> None:
    """Raise ValueError for another norm or scale than the default without a radius: the default radius is one of that unit."""
    for name, radius in radii(type(settings)).items():
        given, usual = getattr(settings, name), default_unit(type(settings), name)
        if given != usual and radius not in settings.model_fields_set:
            example = EXAMPLES.get(given, "") if getattr(settings, "eps_in_pixels", False) else ""
            raise ValueError(
                f"{radius} {getattr(settings, radius):.3g} is a radius in {unit_in_words(usual)}; give one in "
                f"{unit_in_words(given)}{example}"
            )


def radii(kind: type[Section]) -> dict[str, str]:
    """The settings of this kind that say in which unit a radius is, `norm` and `scale`, each with the name of that radius."""
    fields = kind.model_fields
    found = {"norm": "eps", "scale": "latent_eps" if "latent_eps" in fields else "eps"}
    return {name: radius for name, radius in found.items() if name in fields}


def default_unit(kind: type[Section], name: str) -> str:
    """The norm or the scale, whichever `name` says, that settings of this kind have unless told otherwise."""
    return str(kind.model_fields[name].default)


def require_pixel_units(norm: str, eps: float) -> None:
    """Raise ValueError for a radius in L-infinity that is more than pixels can move: one in levels up to 255."""
    if norm == "linf" and eps > 1:
        raise ValueError(f"eps is {eps:g}, but pixels are in [0, 1]; did you mean {eps:g}/255?")


class ThreatSettings(Section):
    """What an attack may change, and how far. Each says as `threat` what it is called, and as `eps` how far."""

    step_in_eps: ClassVar[bool] = True
    """Whether a step is measured as eps is; else in theta's own units, whatever eps is."""
    step_in_radii: ClassVar[bool] = False
    """Whether these are shares of the radius."""
    eps_in_pixels: ClassVar[bool] = False
    """Whether eps is a distance of pixels in [0, 1]."""

    if TYPE_CHECKING:

        @property
        def threat(self) -> str: ...

    @model_validator(mode="after")
    def _eps_is_in_its_unit(self) -> "ThreatSettings":
        require_own_eps(self)
        return self


class ImageThreat(ThreatSettings):
    """Pixels moved inside a ball around x: clip(x + delta)."""

    eps_in_pixels: ClassVar[bool] = True
    threat: CliSuppress[Literal["image"]] = "image"
    norm: Literal["linf", "l2", "l1"] = Field("linf", description="norm of the ball")
    eps: Fraction = Field(4 / 255, ge=0, description="radius in [0, 1] pixel units, e.g. 4/255")

    @model_validator(mode="after")
    def _in_pixel_units(self) -> "ImageThreat":
        require_pixel_units(self.norm, self.eps)
        return self


class LatentThreat(ThreatSettings):
    """A move along the manifold: g(w + lambda)."""

    threat: CliSuppress[Literal["latent"]] = "latent"
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball, over the whole W+ code")
    eps: Fraction = Field(0.02, ge=0, description="radius (eta in the paper) in units of `scale`")
    scale: Literal["raw", "std"] = Field("raw", description="unit of eps: raw W, or the standard deviation of each w")


class JointThreat(ThreatSettings):
    """One move along the manifold and in pixels: clip(g(w + lambda) + delta), both in L-infinity balls."""

    step_in_eps: ClassVar[bool] = False
    step_in_radii: ClassVar[bool] = True
    eps_in_pixels: ClassVar[bool] = True
    threat: CliSuppress[Literal["joint"]] = "joint"
    eps: Fraction = Field(4 / 255, ge=0, le=1, description="radius of delta in [0, 1] pixel units, e.g. 4/255")
    latent_eps: Fraction = Field(0.02, ge=0, description="radius of lambda in units of `scale`")
    scale: Literal["raw", "std"] = Field("raw", description="unit of latent_eps: raw W, or the standard deviation of each w")


class FogThreat(ThreatSettings):
    """Diamond-square fog laid over the image; the attack chooses the noise of every level."""

    step_in_eps: ClassVar[bool] = False
    eps_in_pixels: ClassVar[bool] = True
    threat: CliSuppress[Literal["fog"]] = "fog"
    eps: Fraction = Field(128 / 255, ge=0, le=1, description="density in [0, 1] pixel units, e.g. 128/255")
    wibble_decay: float = Field(2.0, gt=0, description="how much weaker each finer level is")


class SnowThreat(ThreatSettings):
    """Flakes of seven layers, blurred along their fall; the attack chooses the flakes."""

    step_in_eps: ClassVar[bool] = False
    threat: CliSuppress[Literal["snow"]] = "snow"
    eps: Fraction = Field(0.0625, ge=0, description="brightness of the flakes")
    budget: float = Field(0.2, gt=0, le=1, description="largest mean intensity of flakes in each region of 32x32 pixels")


class GaborThreat(ThreatSettings):
    """Gabor noise added to the image; the attack chooses the impulses that a random kernel spreads."""

    step_in_eps: ClassVar[bool] = False
    eps_in_pixels: ClassVar[bool] = True
    threat: CliSuppress[Literal["gabor"]] = "gabor"
    eps: Fraction = Field(12.5 / 255, ge=0, le=1, description="strength in [0, 1] pixel units, e.g. 12.5/255")
    density: float = Field(1 / 14, gt=0, le=1, description="share of pixels with an impulse")


class WoodThreat(ThreatSettings):
    """Dark rings around the middle, as of wood; the attack bends them."""

    threat: CliSuppress[Literal["wood"]] = "wood"
    eps: Fraction = Field(0.05, ge=0, description="largest displacement of a ring, in half image sides")
    rings: float = Field(4.0, gt=0, description="rings from the middle to the border")
    cells: int = Field(32, ge=2, description="side of the grid of displacements, at most that of the image")


class GlitchThreat(ThreatSettings):
    """Stripes of rows whose colour channels are shifted sideways."""

    threat: CliSuppress[Literal["glitch"]] = "glitch"
    eps: Fraction = Field(0.05, ge=0, le=1, description="largest shift, in half image widths")
    lines: int = Field(56, ge=1, description="stripes, at most one a row")


class KaleidoscopeThreat(ThreatSettings):
    """Translucent polygons and discs with outlines over the image; the attack chooses colours, and how bright outlines are."""

    step_in_eps: ClassVar[bool] = False
    step_in_radii: ClassVar[bool] = True
    threat: CliSuppress[Literal["kaleidoscope"]] = "kaleidoscope"
    eps: Fraction = Field(
        0.1, ge=0, le=1, description="largest change of a colour from the one drawn at random, and of an outline from black"
    )
    shapes: int = Field(40, ge=1, description="how many shapes")
    size: float = Field(15 / 224, gt=0, le=1, description="diameter of a disc, side of a square, as a share of the image's side")
    transparency: float = Field(0.1, ge=0, lt=1, description="share of the image that shines through")
    outline: float = Field(
        2 / 224, ge=0, le=1, description="width of an outline, as a share of the image's side, a pixel or more; 0: none"
    )


class PixelThreat(ThreatSettings):
    """Blocks blended with the colour of their first pixel; the attack chooses how far each is, and each channel."""

    threat: CliSuppress[Literal["pixel"]] = "pixel"
    norm: Literal["linf", "l2"] = Field("l2", description="norm over the shares of all blocks")
    eps: Fraction = Field(5.0, ge=0, description="radius; a share is at most 1 in any case")
    size: float = Field(16 / 224, gt=0, le=1, description="side of a block, as a share of the image's side")


class ElasticThreat(ThreatSettings):
    """Pixels displaced by a smooth flow."""

    threat: CliSuppress[Literal["elastic"]] = "elastic"
    eps: Fraction = Field(0.5, ge=0, description="largest displacement in pixels, before smoothing")
    std: float = Field(3.0, gt=0, description="standard deviation of the smoothing in pixels")


class StAdvThreat(ThreatSettings):
    """Pixels displaced each on its own."""

    threat: CliSuppress[Literal["stadv"]] = "stadv"
    eps: Fraction = Field(0.05, ge=0, le=1, description="largest displacement, in half image sides")


class JpegThreat(ThreatSettings):
    """Quantised DCT coefficients of the image moved inside a ball."""

    threat: CliSuppress[Literal["jpeg"]] = "jpeg"
    norm: Literal["linf", "l2", "l1"] = Field("linf", description="norm of the ball, over all coefficients")
    eps: Fraction = Field(0.125, ge=0, description="radius in quantisation steps (l1: 512 is the published 1024 at 256x256)")


class RecolorThreat(ThreatSettings):
    """Colours moved by a smooth map of colours onto colours, in CIE-LUV."""

    threat: CliSuppress[Literal["recolor"]] = "recolor"
    eps: Fraction = Field(
        0.06, ge=0, le=1, description="largest move of a colour, in shares of CIE-LUV's axes: of 100 in L, of 200 in u and v"
    )
    grid: tuple[int, int, int] = Field((16, 32, 32), description="knots of the map along L, u and v")

    @model_validator(mode="after")
    def _check(self) -> "RecolorThreat":
        if min(self.grid) < 2:
            raise ValueError(f"grid {self.grid} needs two knots or more along each axis")
        return self


class PerceptualThreat(ThreatSettings):
    """Pixels moved as far as LPIPS, unlearned and unsquared, allows."""

    threat: CliSuppress[Literal["perceptual"]] = "perceptual"
    eps: Fraction = Field(
        0.25,
        ge=0,
        description="radius in LPIPS as `net` measures it (published for ImageNet-100, by alex: 0.25 in training, 0.5 in "
        "evaluations; the published 0.5 for CIFAR-10 is by an AlexNet made for it, whose unit is another)",
    )
    net: Literal["alex", "vgg", "squeeze"] = Field("alex", description="the network whose features are compared")
    weights: str = Field(
        "pretrained", min_length=1, description="its weights: pretrained (torchvision's, from the torch cache), a file, or random"
    )


class FilterThreat(ThreatSettings):
    """A small convolution, one kernel a channel, whose weights sum to 1."""

    threat: CliSuppress[Literal["filter"]] = "filter"
    eps: Fraction = Field(0.1, ge=0, description="largest weight of a neighbour, positive or negative")
    size: int = Field(3, ge=3, description="side of the kernel in pixels, odd")
    mix: bool = Field(False, description="also mix the colours: each channel takes up to eps of every other")

    @model_validator(mode="after")
    def _check(self) -> "FilterThreat":
        if self.size % 2 == 0:
            raise ValueError(f"size is {self.size}, but a kernel needs a middle; give an odd size")
        return self


THREATS: tuple[type[ThreatSettings], ...] = (
    ImageThreat,
    LatentThreat,
    FogThreat,
    JointThreat,
    SnowThreat,
    GaborThreat,
    WoodThreat,
    GlitchThreat,
    KaleidoscopeThreat,
    PixelThreat,
    ElasticThreat,
    StAdvThreat,
    JpegThreat,
    RecolorThreat,
    PerceptualThreat,
    FilterThreat,
)
"""All threats. Each is a term of an objective and a row of an evaluation; `dmat_ray.threats` says what they do."""

ON_MANIFOLD = (LatentThreat, JointThreat)
"""Threats that move w: they need on-manifold images and the generator."""


def named(threat: type[ThreatSettings]) -> str:
    """The name of a threat: what `threat` says in YAML."""
    return str(threat.model_fields["threat"].default)


def joined(search: type[S], written: Sequence[type[S]]) -> dict[str, type[S]]:
    """Every threat together with a kind of search in one flat model, by the threat's name.

    `written` are those that code needs to name; all others are made here, and the module of `search` gives them their names.
    """
    found = {named(one): one for one in written}  # type: ignore[arg-type]
    for threat in THREATS:
        if named(threat) not in found:
            name = threat.__name__.removesuffix("Threat") + search.__name__
            both: Any = (search, threat)
            found[named(threat)] = create_model(name, __base__=both, __doc__=threat.__doc__, __module__=search.__module__)
    return {named(threat): found[named(threat)] for threat in THREATS}
