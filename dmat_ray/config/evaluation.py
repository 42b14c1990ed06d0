"""Settings of evaluation suites: rows, each a threat and a search, and columns that are made of them."""

import functools
import operator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import CliSuppress

from dmat_ray.config.attacks import AttackConfig, require_reach
from dmat_ray.config.base import MOST_SEED, Fraction, Section
from dmat_ray.config.threats import (
    ON_MANIFOLD,
    FogThreat,
    ImageThreat,
    LatentThreat,
    ThreatSettings,
    joined,
    require_own_eps,
    require_pixel_units,
)

ON_CURVE = " @ "  # between the name of a row and the eps of its curve


class Row(AttackConfig, ThreatSettings):
    """One attack of the evaluation table."""

    name: str = Field(min_length=1, description="name of the column, unique in the suite")
    loss: Literal["ce", "dlr"] = Field("ce", description="what is raised: cross entropy, or the difference of logits ratio")
    targets: int = Field(
        0, ge=0, description="0: away from the label; n: one search towards each of the n likeliest other classes"
    )
    early_exit: bool = Field(
        False, description="leave an example alone once a search has broken it; the others go on with restarts and targets"
    )
    group: str = Field(
        "",
        description="rows of one group are one attack and one column: each meets only what stands on clean images and under the "
        "rows of the group before it",
    )
    curve: tuple[Fraction, ...] = Field((), description="other eps at which it is run as well, for accuracy as a curve over eps")

    @model_validator(mode="after")
    def _in_one_place(self) -> "Row":
        if self.group and self.curve:
            raise ValueError("a row of a group has no curve: it meets only what others have left; give a row of its own")
        return self

    @model_validator(mode="after")
    def _has_one_loss(self) -> "Row":
        if self.method == "lpa" and (self.loss != "ce" or self.targets):
            raise ValueError("method lpa raises a margin of its own; give neither loss nor targets")
        return self

    @model_validator(mode="after")
    def _reaches(self) -> "Row":
        require_reach(self, self)
        return self

    @model_validator(mode="after")
    def _curve_of_rows(self) -> "Row":
        """Each point is a row, and takes no eps that the row would not."""
        shown: dict[str, float] = {}
        for eps in self.curve:
            try:
                # the length of its steps will be that share of the row's
                type(self).model_validate({**self.model_dump(), "eps": eps, "curve": (), "step_size": None})
            except ValidationError as error:
                raise ValueError(f"curve, eps {eps:.3g}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
            if shown.setdefault(f"{eps:.4g}", eps) != eps:
                raise ValueError(
                    f"curve: {shown[f'{eps:.4g}']!r} and {eps!r} are one in the four digits by which points are named"
                )
        return self


class ImageRow(Row, ImageThreat):
    """Image-space attack."""


class LatentRow(Row, LatentThreat):
    """On-manifold attack; only for the on-manifold test set, where w is known."""


class FogRow(Row, FogThreat):
    """Fog attack."""


ROWS = joined(Row, [ImageRow, LatentRow, FogRow])
"""The rows that search a threat, by its name."""
globals().update({row.__name__: row for row in ROWS.values()})  # where pickle looks for them


class AutoAttackRow(Section):
    """A part of AutoAttack (arXiv 2003.01690) as its authors' library runs it, in image space."""

    eps_in_pixels: ClassVar[bool] = True
    threat: CliSuppress[Literal["autoattack"]] = "autoattack"
    name: str = Field(min_length=1, description="name of the column, unique in the suite")
    part: Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"] = Field(
        "apgd-ce", description="which attack of the library; the standard version is apgd-ce, apgd-t, fab-t, square in one group"
    )
    norm: Literal["linf", "l2", "l1"] = Field("linf", description="norm of the ball")
    eps: Fraction = Field(4 / 255, gt=0, description="radius in [0, 1] pixel units, e.g. 4/255")
    group: str = Field(
        min_length=1, description="as of any other row; the library, too, attacks what is right on clean images and still stands"
    )

    @model_validator(mode="after")
    def _in_pixel_units(self) -> "AutoAttackRow":
        require_pixel_units(self.norm, self.eps)
        return self

    @model_validator(mode="after")
    def _eps_is_in_its_unit(self) -> "AutoAttackRow":
        require_own_eps(self)
        return self


class CleanRow(Section):
    """No attack."""

    threat: CliSuppress[Literal["clean"]] = "clean"
    name: str = Field("clean", min_length=1, description="name of the column, unique in the suite")


Noise = Literal["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"]
Blur = Literal["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"]
Weather = Literal["snow", "fog", "brightness", "spatter"]
Digital = Literal["contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"]


class CorruptionRow(Section):
    """A common corruption; no attack."""

    threat: CliSuppress[Literal["corruption"]] = "corruption"
    name: str = Field(min_length=1, description="name of the column, unique in the suite")
    kind: Literal[Noise, Blur, Weather, Digital] = Field(description="what is done to the image")
    severity: int = Field(ge=1, le=5, description="1 to 5: how much of it, as published for images of about that size")


if TYPE_CHECKING:
    AttackRow: TypeAlias = CleanRow | CorruptionRow | AutoAttackRow | Row
else:
    AttackRow = Annotated[
        functools.reduce(operator.or_, [CleanRow, CorruptionRow, AutoAttackRow, *ROWS.values()]), Field(discriminator="threat")
    ]


class Summary(Section):
    """A column that is made of others."""

    name: str = Field(min_length=1, description="name of the column, unique in the suite")
    how: Literal["worst", "mean", "uar"] = Field(
        "worst",
        description="worst: share of examples that are right on the clean image and stand under every one; mean: mean of the "
        "accuracies; uar: their sum over that of models trained against each (arXiv 1908.08016)",
    )
    of: tuple[str, ...] = Field(min_length=1, description="names of groups, and of rows that are in none")
    trained: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="uar: for each of `of` the accuracy in [0, 1] of a model that was trained against it"
    )

    @model_validator(mode="after")
    def _check(self) -> "Summary":
        if self.how != "uar" and self.trained:
            raise ValueError(f"`trained` belongs to uar; '{self.name}' is {self.how}")
        if self.how == "uar" and len(self.trained) != len(self.of):
            raise ValueError(f"uar of {len(self.of)} rows needs as many accuracies in `trained`, here are {len(self.trained)}")
        return self


class EvaluationConfig(Section):
    """Attacks to run on every model and test set."""

    suites: tuple[str, ...] = Field(
        (), description="tables of attacks that ship with the package, or YAML files of your own; `attacks` of the same name win"
    )
    attacks: tuple[AttackRow, ...] = Field((CleanRow(),), description="the suite, one row a column of the table")
    summaries: tuple[Summary, ...] = Field((), description="columns that are made of others")
    transfer: tuple[str, ...] = Field(
        (), description="rows whose images are shown to all other models as well: do attacks on one model break another?"
    )
    sets: tuple[Literal["on_manifold", "natural"], ...] = Field(
        ("on_manifold", "natural"), description="test images: g(w), natural, or both"
    )
    limit: int | None = Field(None, ge=1, description="evaluate at most so many test images, drawn by `seed`; null = all")
    batch_size: int = Field(100, ge=1, description="images attacked together")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of random starts, and of which images `limit` takes")
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="arithmetic of the network while it is attacked (by AutoAttack's own code: always float32); what it says of "
        "the attacked image is always float32",
    )
    lpips: Literal["none", "alex", "vgg"] = Field(
        "none", description="backbone of the LPIPS distance in the rows; none = left out"
    )
    lpips_weights: str = Field(
        "pretrained",
        min_length=1,
        description="'pretrained' (torchvision's, from the torch cache), a file or URL of them, or 'random'",
    )
    check_examples: int = Field(
        100, ge=0, description="images, at most a batch, on which gradients, inputs and noise are looked at; 0 = not"
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        names = [row.name for row in self.attacks]
        if odd := [name for name in names if ON_CURVE in name]:
            raise ValueError(f"'{odd[0]}': '{ON_CURVE}' in a name says that it is a row's at another eps; choose another name")
        if any(row.name == "clean" and not isinstance(row, CleanRow) for row in self.attacks):
            raise ValueError("'clean' is the name of the row without an attack; choose another")
        grouped = {row.name: group for row in self.attacks if (group := str(getattr(row, "group", "")))}
        groups = list(dict.fromkeys(grouped.values()))
        every = [*names, *groups, *(summary.name for summary in self.summaries)]
        if "clean" in groups or any(summary.name == "clean" for summary in self.summaries):
            raise ValueError("'clean' is the name of the row without an attack; choose another for the group or summary")
        twice = sorted({name for name in every if every.count(name) > 1})
        if twice:
            raise ValueError(f"names of attacks, groups and summaries must be unique; given more than once: {', '.join(twice)}")
        if not self.suites:
            for where, wanted in (*((s.name, s.of) for s in self.summaries), ("transfer", self.transfer)):
                # rows of a group meet other examples for every model
                alone = [name for name in names if name not in grouped]
                choices = alone if where == "transfer" else [*alone, *groups]
                # in a summary evaluations refuse them (`require_suite`), but models have recorded such settings
                taken = choices if where == "transfer" else [*choices, *grouped]
                if unknown := [name for name in wanted if name not in taken]:
                    raise ValueError(f"{where} names '{unknown[0]}', which is none of {', '.join(choices)}")
        if not names or not self.sets:
            raise ValueError("evaluation needs at least one attack and one test set")
        if "natural" in self.sets and all(isinstance(row, ON_MANIFOLD) for row in self.attacks):
            raise ValueError("natural images have no w, and every attack moves w; give sets=on_manifold or another attack")
        return self
