"""Settings of data, generators and projection."""

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


class GeneratorConfig(Section):
    """The generator whose range stands for the image manifold."""

    path: str = Field("mnist32", description="'mnist32' (shipped) or a folder with generator.safetensors and card.json")


class StyleGAN2Config(Section):
    """Shape of a StyleGAN 2 generator and of the discriminator trained against it."""

    resolution: int = Field(32, ge=8, le=1024, description="image height and width in pixels, a power of two")
    channels: Channels = Field(1, description="image channels: 1 (grey) or 3 (RGB)")
    num_classes: int = Field(0, ge=0, description="classes of a conditional generator; 0 = unconditional")
    z_dim: int = Field(64, ge=1, description="dimensions of the input noise z")
    w_dim: int = Field(64, ge=1, description="dimensions of one w vector")
    mapping_layers: int = Field(4, ge=1, description="fully connected layers from z to w")
    mapping_rate: float = Field(0.1, gt=0, le=1, description="learning rate of those layers relative to the others")
    channel_base: int = Field(512, ge=8, description="feature channels at a resolution r are channel_base / r ...")
    channel_max: int = Field(128, ge=1, description="... but at most this many")
    noise: bool = Field(False, description="per-layer noise; after training the buffers are fixed")

    @model_validator(mode="after")
    def _check(self) -> "StyleGAN2Config":
        if self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution {self.resolution} is not a power of two")
        if self.num_classes > self.z_dim:
            raise ValueError(f"num_classes {self.num_classes} is more than z_dim {self.z_dim}, which chooses the class")
        return self

    @property
    def resolutions(self) -> list[int]:
        """4, 8, ... up to the image's own."""
        return [2**k for k in range(2, self.resolution.bit_length())]

    @property
    def num_ws(self) -> int:
        """Number of w vectors that a W+ code holds."""
        return 2 * len(self.resolutions)

    def width(self, resolution: int) -> int:
        """Feature channels at `resolution`."""
        return max(1, min(self.channel_base // resolution, self.channel_max))


class GanConfig(Section):
    """Training of a generator: non-saturating logistic loss, lazy R1, EMA, style mixing."""

    architecture: StyleGAN2Config = StyleGAN2Config()
    kimg: float = Field(300.0, gt=0, description="length of training in thousands of real images shown")
    batch_size: int = Field(32, ge=4, description="images a step, over all workers")
    lr_generator: float = Field(0.01, gt=0, description="Adam's learning rate of the generator")
    lr_discriminator: float = Field(0.004, gt=0, description="Adam's learning rate of the discriminator")
    fade: float = Field(0.3, ge=0, le=1, description="share of the training at the end in which both rates fall to 0")
    r1_gamma: float = Field(1.0, ge=0, description="weight of the R1 gradient penalty")
    mode_seeking: float = Field(0.1, ge=0, description="weight of the term that keeps two z of one class apart")
    r1_interval: int = Field(8, ge=1, description="steps between two R1 penalties (lazy regularisation)")
    ema_kimg: float = Field(5.0, gt=0, description="half-life of the averaged generator in thousands of images")
    style_mixing: float = Field(0.5, ge=0, le=1, description="probability that two z share one image")
    augment: float = Field(0.3, ge=0, le=0.8, description="probability of a small affine warp of what the critic sees")
    report_kimg: float = Field(10.0, gt=0, description="thousands of images between two reports")
    seed: int = Field(0, ge=0, description="seed of weights, noise and order")


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
