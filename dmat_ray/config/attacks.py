"""Settings of threats, attacks, training objectives and evaluation suites.

A threat's settings (its ball) and an attack's (the search) are separate classes; a training term and an evaluation row
are both joined in one flat model, so that `objective.image.eps` and a row of a suite read the same.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import CliSuppress

from dmat_ray.config.base import Fraction, Section


class ImageThreat(Section):
    """Pixels moved inside a ball around x: clip(x + delta)."""

    threat: CliSuppress[Literal["image"]] = "image"
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball")
    eps: Fraction = Field(4 / 255, ge=0, description="radius in [0, 1] pixel units, e.g. 4/255")

    @model_validator(mode="after")
    def _in_pixel_units(self) -> "ImageThreat":
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps is {self.eps:g}, but pixels are in [0, 1]; did you mean {self.eps:g}/255?")
        return self


class LatentThreat(Section):
    """A move along the manifold: g(w + lambda)."""

    threat: CliSuppress[Literal["latent"]] = "latent"
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball, over the whole W+ code")
    eps: Fraction = Field(0.02, ge=0, description="radius (eta in the paper) in units of `scale`")
    scale: Literal["raw", "std"] = Field("raw", description="unit of eps: raw W, or the standard deviation of each w")


class FogThreat(Section):
    """Diamond-square fog laid over the image; the attack chooses the noise of every level."""

    threat: CliSuppress[Literal["fog"]] = "fog"
    eps: Fraction = Field(128 / 255, ge=0, le=1, description="density in [0, 1] pixel units, e.g. 128/255")
    wibble_decay: float = Field(2.0, gt=0, description="how much weaker each finer level is")


class AttackConfig(Section):
    """Search inside a threat: sign- or norm-steepest ascent with projection (FGSM is one step of it)."""

    steps: int = Field(5, ge=1, description="gradient steps")
    step_size: Fraction | None = Field(
        None, gt=0, description="length of a step in theta's units (eps's; fog: its unit box); null = 2.5 times across / steps"
    )
    random_start: bool = Field(True, description="start at a random point of the ball")
    restarts: int = Field(1, ge=1, description="independent searches; each example keeps its worst")


class Term(AttackConfig):
    """One weighted term of a training objective."""

    weight: float = Field(0.0, ge=0, description="weight in the sum; 0 switches the term off")
    divergence: Literal["ce", "kl"] = Field("ce", description="ce: cross entropy; kl: KL to the clean output (TRADES)")

    @model_validator(mode="after")
    def _check(self) -> "Term":
        if self.weight > 0 and self.divergence == "kl" and not self.random_start:
            raise ValueError("divergence=kl needs random_start: the gradient of KL is zero at the clean image")
        return self


class ImageTerm(Term, ImageThreat):
    """Worst case over an image ball."""


class LatentTerm(Term, LatentThreat):
    """Worst case over a ball in W+."""


class FogTerm(Term, FogThreat):
    """Worst case over fog."""


class CleanTerm(Section):
    """Cross entropy on the unattacked image."""

    weight: float = Field(1.0, ge=0, description="weight in the sum; 0 switches the term off")


class ObjectiveConfig(Section):
    """Training loss: sum of weight x worst-case loss over each threat. DMAT is image 1/2 + latent 1/2."""

    clean: CleanTerm = CleanTerm()
    image: ImageTerm = ImageTerm()
    latent: LatentTerm = LatentTerm()
    fog: FogTerm = FogTerm()
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if not any(term.weight > 0 for term in (self.clean, *self.adversarial.values())):
            names = ", ".join(["clean", *self.adversarial])
            raise ValueError(f"every term has weight 0; give at least one of {names} a weight, or name a preset such as dmat")
        return self

    @property
    def adversarial(self) -> dict[str, "ImageTerm | LatentTerm | FogTerm"]:
        """The terms that attack, by name, whatever their weight."""
        return {"image": self.image, "latent": self.latent, "fog": self.fog}


class Row(AttackConfig):
    """One attack of the evaluation table."""

    name: str = Field(min_length=1, description="name of the column, unique in the suite")


class ImageRow(Row, ImageThreat):
    """Image-space attack."""


class LatentRow(Row, LatentThreat):
    """On-manifold attack; only for the on-manifold test set, where w is known."""


class FogRow(Row, FogThreat):
    """Fog attack."""


class CleanRow(Section):
    """No attack."""

    threat: CliSuppress[Literal["clean"]] = "clean"
    name: str = Field("clean", min_length=1, description="name of the column, unique in the suite")


AttackRow = Annotated[CleanRow | ImageRow | LatentRow | FogRow, Field(discriminator="threat")]


class EvaluationConfig(Section):
    """Attacks to run on every model and test set."""

    attacks: tuple[AttackRow, ...] = Field((CleanRow(),), description="the suite, one row a column of the table")
    sets: tuple[Literal["on_manifold", "natural"], ...] = Field(
        ("on_manifold", "natural"), description="test images: g(w), natural, or both"
    )
    batch_size: int = Field(100, ge=1, description="images attacked together")
    seed: int = Field(0, ge=0, description="seed of random starts")

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        names = [row.name for row in self.attacks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"attack names must be unique; given more than once: {', '.join(twice)}")
        if not names or not self.sets:
            raise ValueError("evaluation needs at least one attack and one test set")
        if "natural" in self.sets and all(isinstance(row, LatentRow) for row in self.attacks):
            raise ValueError("natural images have no w, and every attack is latent; give sets=on_manifold or another attack")
        return self
