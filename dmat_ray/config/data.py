"""Settings of data and projection."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from dmat_ray.config.base import Section

# a command line brings text, which a Literal of numbers does not take
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda v: int(v) if v in ("1", "3") else v)]


class DataConfig(Section):
    """Where natural images come from, and how they are split."""

    source: str = Field("mnist5k", description="'mnist5k' (5,000 embedded digits) or a folder with one sub-folder a class")
    resolution: int = Field(
        32, ge=8, le=1024, description="height and width in pixels; images of another size are scaled and cropped at the centre"
    )
    channels: Channels = Field(1, description="1 (grey) or 3 (RGB)")
    test_share: float = Field(0.2, gt=0, lt=1, description="share of every class that goes to the test split")
    train_limit: int | None = Field(None, ge=1, description="at most this many training images, the classes in turn; null = all")
    test_limit: int | None = Field(None, ge=1, description="at most this many test images, the classes in turn; null = all")
    max_rejected: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images above which a run fails instead of leaving them out"
    )
    seed: int = Field(0, ge=0, description="seed of the split and of the subsets")


class ProjectionConfig(Section):
    """Search for w with g(w) close to an image: Adam in W+ on LPIPS + L1 + L2."""

    steps: int = Field(1000, ge=1, description="optimisation steps an image")
    lr: float = Field(0.1, gt=0, description="Adam's base learning rate, in W units a step")
    lr_rampup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate grows linearly")
    lr_rampdown: float = Field(0.25, ge=0, le=1, description="share of the steps at the end with cosine decay")
    noise: float = Field(0.05, ge=0, description="strength of the noise on w, in units of w_std")
    noise_ramp: float = Field(0.75, gt=0, le=1, description="share of the steps after which that noise is zero")
    lpips: float = Field(1.0, ge=0, description="weight of LPIPS")
    l1: float = Field(100.0, ge=0, description="weight of the mean absolute pixel error")
    l2: float = Field(0.0, ge=0, description="weight of the mean squared pixel error")
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field("vgg", description="backbone of LPIPS")
    lpips_weights: str = Field(
        "pretrained",
        description="'pretrained' (torchvision's, from the torch cache), 'random' (seeded, not perceptual), or a file "
        "with the backbone's state dict",
    )
    start: Literal["mean", "nearest"] = Field(
        "mean", description="first w: the mean, or the closest (pixel L2) of `candidates` random samples"
    )
    candidates: int = Field(2048, ge=1, description="samples that start=nearest chooses from")
    batch_size: int = Field(10, ge=1, description="images optimised together")
    poor_l1: float = Field(0.1, gt=0, description="mean absolute pixel error above which an image is marked poor")
    seed: int = Field(0, ge=0, description="seed of noise, candidates and of a random LPIPS backbone")

    @model_validator(mode="after")
    def _check(self) -> "ProjectionConfig":
        if self.lpips + self.l1 + self.l2 == 0:
            raise ValueError("lpips, l1 and l2 are all 0: there is nothing to minimise")
        return self
