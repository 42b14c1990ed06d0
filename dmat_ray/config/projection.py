"""Settings of projection, and of the encoder that it may start from."""

from typing import Literal

from pydantic import Field, model_validator

from dmat_ray.config.base import MOST_SEED, Section


class ProjectionConfig(Section):
    """Search for w with g(w) close to an image: Adam in W+ on LPIPS + L1 + L2.

    The defaults are those of the code of arXiv 2009.02470, but for its perceptual distance, whose place LPIPS takes.
    """

    steps: int = Field(1000, ge=1, description="optimisation steps an image, at most")
    lr: float = Field(0.1, gt=0, description="Adam's base learning rate, in W units a step")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's memory of squared gradients; short searches want it short")
    lr_rampup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate grows linearly")
    lr_rampdown: float = Field(0.25, ge=0, le=1, description="share of the steps at the end with cosine decay")
    noise: float = Field(
        0.05, ge=0, description="strength of the noise on every coordinate of w, in units of the length of w_std"
    )
    noise_ramp: float = Field(0.75, gt=0, le=1, description="share of the steps after which that noise is zero")
    axes: Literal["w", "principal"] = Field(
        "w",
        description="Adam scales the coordinates of w as they are ('w'), or each layer along the principal axes of the "
        "generator's gradient, which takes fewer steps",
    )
    stop_window: int = Field(
        0,
        ge=0,
        description="an image goes on to the ramp down when this many steps have improved its best loss too little; 0 = never",
    )
    stop_improvement: float = Field(0.01, gt=0, lt=1, description="what counts as too little, as a share of the loss")
    lpips: float = Field(1.0, ge=0, description="weight of LPIPS")
    l1: float = Field(200.0, ge=0, description="weight of the mean absolute pixel error (100 as published, in [-1, 1] units)")
    l1_smooth: float = Field(
        0.0, ge=0, description="width below which L1 is rounded off for the gradient, in pixel values; falls to 0 over the steps"
    )
    l2: float = Field(0.0, ge=0, description="weight of the mean squared pixel error")
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field("vgg", description="backbone of LPIPS")
    lpips_weights: str = Field(
        "pretrained",
        min_length=1,
        description="'pretrained' (torchvision's, from the torch cache), 'random' (seeded, not perceptual), or a file "
        "or URL of the backbone's state dict",
    )
    lpips_precision: Literal["float32", "bf16"] = Field("float32", description="arithmetic of the backbone of LPIPS")
    compile: bool = Field(False, description="torch.compile of generator and LPIPS: slow to start, for GPUs and large sets")
    start: Literal["mean", "nearest", "encoder"] = Field(
        "mean",
        description="first w: the mean, the closest (pixel L2) of `candidates` random samples, or what an encoder says",
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description="folder or URL written by train_encoder.py; null = OUTPUT/encoder if it is there, else the generator's own",
    )
    candidates: int = Field(2048, ge=1, description="samples that start=nearest chooses from")
    batch_size: int = Field(10, ge=1, description="images optimised together")
    shard_size: int = Field(256, ge=1, description="images a Parquet shard, the unit of work and of resume")
    poor_l1: float = Field(0.1, gt=0, description="mean absolute pixel error above which an image is marked poor")
    poor_lpips: float | None = Field(
        None, gt=0, description="LPIPS above which an image is marked poor, of a set made with lpips above 0; null = none is"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of noise, candidates and of a random LPIPS backbone")

    @model_validator(mode="after")
    def _check(self) -> "ProjectionConfig":
        if self.lpips + self.l1 + self.l2 == 0:
            raise ValueError("lpips, l1 and l2 are all 0: there is nothing to minimise")
        return self


class EncoderConfig(Section):
    """A small network from images to W+, trained on the generator's own samples, that projection may start from."""

    width: int = Field(16, ge=1, le=16384, description="feature channels at full resolution; they double where it is halved ...")
    width_max: int = Field(128, ge=1, le=16384, description="... up to this many, and as many before the last layer")
    kimg: float = Field(100.0, gt=0, description="length of training in thousands of samples")
    batch_size: int = Field(64, ge=1, description="samples a step, over all workers")
    lr: float = Field(2e-3, gt=0, description="Adam's learning rate; it grows over the first tenth, and falls to 0 by a cosine")
    w_weight: float = Field(0.03, ge=0, description="weight of the squared error of w, in units of w_std")
    l1_weight: float = Field(10.0, ge=0, description="weight of the mean absolute pixel error of g(encoder(x))")
    l2_weight: float = Field(50.0, ge=0, description="weight of the mean squared pixel error of g(encoder(x))")
    spread: float = Field(
        1.0, ge=0, description="noise on the w of every layer apart, in units of w_std: training then covers W+, not W alone"
    )
    style_mixing: float = Field(0.5, ge=0, le=1, description="probability that two z share one sample")
    precision: Literal["float32", "bf16"] = Field("float32", description="arithmetic of the encoder while it is trained")
    report_kimg: float = Field(10.0, gt=0, description="thousands of samples between two reports, each with a checkpoint")
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of weights and samples")

    @model_validator(mode="after")
    def _check(self) -> "EncoderConfig":
        if self.w_weight + self.l1_weight + self.l2_weight == 0:
            raise ValueError("w_weight, l1_weight and l2_weight are all 0: there is nothing to minimise")
        return self
