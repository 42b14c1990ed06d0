"""Settings of attacks and training objectives.

A threat's settings (its ball) and an attack's (the search) are separate classes; a training term and an evaluation row
are both joined in one flat model, so that `objective.image.eps` and a row of a suite read the same.
"""

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from dmat_ray.config.base import Fraction, Section
from dmat_ray.config.threats import FogThreat, ImageThreat, LatentThreat, ThreatSettings, joined

LPA_ROUNDS = 5


class AttackConfig(Section):
    """Search inside a threat: sign- or norm-steepest ascent with projection (FGSM is one step of it)."""

    steps: int = Field(5, ge=1, description="gradient steps")
    step_size: Fraction | None = Field(
        None,
        gt=0,
        description="length of a step in the units of eps; of fog, snow and gabor in those of their unit box, of joint and "
        "kaleidoscope as a share of the radius; null = 2.5 radii (fog, snow, gabor: at least 2.5 boxes) / steps, of lagrange "
        "and lpa one radius",
    )
    random_start: bool = Field(True, description="start at a random point of the ball")
    restarts: int = Field(1, ge=1, description="independent searches; each example keeps its worst (needs random_start)")
    method: Literal["pgd", "momentum", "apgd", "lagrange", "lpa", "square", "random"] = Field(
        "pgd",
        description="pgd; momentum: along all gradients so far; apgd: steps that halve themselves (step_size is not used); "
        "lagrange: out of the budget and back; lpa: that in five rounds, on a margin; without gradients, a query a step: square "
        "(image linf, l2), random (points)",
    )

    @model_validator(mode="after")
    def _restarts_differ(self) -> "AttackConfig":  # not _check: that is the threats' own
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} without random_start would be as many copies of one search")
        return self

    @model_validator(mode="after")
    def _has_rounds(self) -> "AttackConfig":
        if self.method == "lpa" and self.steps < LPA_ROUNDS:
            raise ValueError(f"method lpa goes in {LPA_ROUNDS} rounds; {self.steps} steps are too few")
        return self


def require_reach(attack: AttackConfig, threat: ThreatSettings) -> None:
    """Raise ValueError for steps too short to get from the ball's middle to its border, as when a preset's meet another eps.

    Those in unit boxes are held to it before they begin, by `dmat_ray.attack.search`: models have recorded such settings.
    """
    if threat.step_in_eps:
        require_steps(attack, getattr(threat, "eps", 0.0), "eps")
    elif threat.step_in_radii:
        require_steps(attack, 1.0, "the radius, of which a step is a share,")


def require_steps(attack: AttackConfig, radius: float, name: str, default: str = "radii") -> None:
    """Raise ValueError if the steps do not get as far as a radius of that name, in their units.

    By default they go 2.5 of what `default` says.
    """
    step = attack.step_size
    if step is None or attack.method not in ("pgd", "momentum"):
        return
    if attack.steps * step < radius * (1 - 1e-6):
        raise ValueError(
            f"{attack.steps} steps of step_size {step:.3g} end {attack.steps * step:.3g} from where they begin, and {name} is "
            f"{radius:.3g}: a weak attack; give step_size null (2.5 {default} / steps), or {radius / attack.steps:.3g} or more"
        )


class Term(AttackConfig, ThreatSettings):
    """One weighted term of a training objective."""

    weight: float = Field(0.0, ge=0, description="weight in the sum; 0 switches the term off")
    divergence: Literal["ce", "kl"] = Field("ce", description="ce: cross entropy; kl: KL to the clean output (TRADES)")

    @model_validator(mode="after")
    def _divergence_has_a_slope(self) -> "Term":  # not _check: that is the threats' own, which stands beside it
        if self.weight > 0 and self.divergence == "kl" and not self.random_start:
            raise ValueError("divergence=kl needs random_start: the gradient of KL is zero at the clean image")
        if self.divergence == "kl" and self.method == "lpa":
            raise ValueError("method lpa raises a margin of its own; give divergence ce")
        return self

    @model_validator(mode="after")
    def _reaches(self) -> "Term":
        if self.weight > 0:
            require_reach(self, self)
        return self


class ImageTerm(Term, ImageThreat):
    """Worst case over an image ball."""


class LatentTerm(Term, LatentThreat):
    """Worst case over a ball in W+."""


class FogTerm(Term, FogThreat):
    """Worst case over fog."""


TERMS = joined(Term, [ImageTerm, LatentTerm, FogTerm])
"""The terms there are, by the name of their threat."""
globals().update({term.__name__: term for term in TERMS.values()})  # where pickle looks for them

if TYPE_CHECKING:
    AdversarialTerm: TypeAlias = Term
else:
    AdversarialTerm = Annotated[functools.reduce(operator.or_, TERMS.values()), Field(discriminator="threat")]


class CleanTerm(Section):
    """Cross entropy on the unattacked image."""

    weight: float = Field(1.0, ge=0, description="weight in the sum; 0 switches the term off")


class ObjectiveConfig(Section):
    """Training loss: sum of weight x worst-case loss over each threat. DMAT is image 1/2 + latent 1/2."""

    clean: CleanTerm = CleanTerm()
    image: ImageTerm = ImageTerm()
    latent: LatentTerm = LatentTerm()
    fog: FogTerm = FogTerm()
    more: dict[str, AdversarialTerm] = Field(
        default_factory=dict,
        description="more terms by names of your own, each with its `threat`, e.g. {snow: {threat: snow, weight: 0.5}}",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")
    terms: Literal["sum", "sample"] = Field(
        "sum",
        description="sum: every step has all terms; sample: one of them, drawn by weight, times the sum of weights, which is the "
        "same loss in the mean at the cost of one term",
    )
    batch_norm: Literal["separate", "joint", "per_term", "frozen"] = Field(
        "separate",
        description="statistics in training: each term's own (as published); joint: of all terms' images together; per_term: "
        "each term's own and kept apart, so that each attack meets its term's (the model has clean's, or the mean of all); "
        "frozen: those it starts with",
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        if taken := self.more.keys() & {"clean", "image", "latent", "fog"}:
            raise ValueError(f"more: '{min(taken)}' is the name of a term that is always there; choose another")
        if taken := self.more.keys() & {"", "robust"}:
            raise ValueError(f"more: '{min(taken)}' cannot be the name of a term; choose another")
        if self.clean.weight == 0 and not any(term.weight > 0 for term in self.adversarial.values()):
            names = ", ".join(["clean", *self.adversarial])
            raise ValueError(f"every term has weight 0; give at least one of {names} a weight, or name a preset such as dmat")
        return self

    @property
    def adversarial(self) -> dict[str, AdversarialTerm]:
        """The terms that attack, by name, whatever their weight."""
        return {"image": self.image, "latent": self.latent, "fog": self.fog, **self.more}
