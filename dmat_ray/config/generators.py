"""Settings of generators: their shapes, their training, and where the one in use comes from."""

from typing import Literal

from pydantic import Field, model_validator

from dmat_ray.config.base import MOST_SEED, Section
from dmat_ray.config.data import Channels


class GeneratorConfig(Section):
    """The generator whose range stands for the image manifold."""

    path: str = Field(
        "mnist32",
        min_length=1,
        description="'mnist32' (shipped), or a folder or URL with what train_generator.py or import_generator.py wrote",
    )
    precision: Literal["reference", "fast", "bf16"] = Field(
        "reference",
        description="'reference' arithmetic as in the papers, 'fast' float32 with folded constants, or 'bf16' on top of that",
    )
    recompute: bool = Field(
        False, description="compute activations anew for gradients instead of keeping them: less memory, a third more time"
    )


class StyleGANConfig(Section):
    """What StyleGAN 1 and 2 share: sizes of the mapping, and feature widths by resolution."""

    resolution: int = Field(32, ge=8, le=1024, description="image height and width in pixels, a power of two")
    channels: Channels = Field(1, description="image channels: 1 (grey) or 3 (RGB)")
    num_classes: int = Field(0, ge=0, le=100_000, description="classes of a conditional generator; 0 = unconditional")
    z_dim: int = Field(64, ge=1, le=65536, description="dimensions of the input noise z")
    w_dim: int = Field(64, ge=1, le=65536, description="dimensions of one w vector")
    mapping_layers: int = Field(4, ge=1, le=64, description="fully connected layers from z to w")
    mapping_width: int | None = Field(None, ge=1, le=65536, description="features between those layers; null = w_dim")
    mapping_rate: float = Field(0.1, gt=0, le=1, description="learning rate of those layers relative to the others")
    channel_base: int = Field(512, ge=8, le=1 << 20, description="feature channels at a resolution r are channel_base / r ...")
    channel_max: int = Field(128, ge=1, le=16384, description="... but at most this many")

    @model_validator(mode="after")
    def _check(self) -> "StyleGANConfig":
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

    @property
    def mapping_widths(self) -> list[int]:
        """Features before, between and after the mapping's layers."""
        first = self.z_dim + (self.w_dim if self.num_classes else 0)
        return [first, *[self.mapping_width or self.w_dim] * (self.mapping_layers - 1), self.w_dim]

    def width(self, resolution: int) -> int:
        """Feature channels at `resolution`."""
        return max(1, min(self.channel_base // resolution, self.channel_max))


class StyleGAN1Config(StyleGANConfig):
    """Shape of a StyleGAN 1 generator. The defaults are those of the paper's 256x256 generator of ImageNet."""

    resolution: int = Field(256, ge=16, le=1024, description="image height and width in pixels, a power of two")
    channels: Channels = Field(3, description="image channels: 1 (grey) or 3 (RGB)")
    num_classes: Literal[0] = Field(0, description="0: only unconditional generators are known")
    z_dim: int = Field(512, ge=1, le=65536, description="dimensions of the input noise z")
    w_dim: int = Field(512, ge=1, le=65536, description="dimensions of one w vector")
    mapping_layers: int = Field(8, ge=1, le=64, description="fully connected layers from z to w")
    mapping_rate: float = Field(0.01, gt=0, le=1, description="learning rate of those layers relative to the others")
    channel_base: int = Field(16384, ge=8, le=1 << 20, description="feature channels at a resolution r are channel_base / r ...")
    channel_max: int = Field(512, ge=1, le=16384, description="... but at most this many")
    fused_from: int = Field(
        128, ge=8, description="resolution from which upsampling and convolution are one transposed convolution (fused scale)"
    )


class StyleGAN2Config(StyleGANConfig):
    """Shape of a StyleGAN 2 generator and of the discriminator trained against it."""

    noise: bool = Field(False, description="per-layer noise; after training the buffers are fixed")
    conv_clamp: float | None = Field(None, gt=0, description="bound on every layer's output, as in -ADA; null = none")


Augmentation = Literal[
    "flip", "rotate90", "translate", "scale", "tilt", "rotate", "stretch", "brightness", "contrast", "saturation"
]


class QualityConfig(Section):
    """How samples are judged while a generator trains."""

    network: str = Field(
        "classifier",
        min_length=1,
        description="features for FID, precision and recall: 'classifier' (trained on the labelled images when training "
        "starts), 'inception' (the usual one, needs `weights`), a folder of a trained classifier, or 'none'",
    )
    weights: str = Field(
        "pretrained", min_length=1, description="file with Inception's weights; 'pretrained' = from the torch cache"
    )
    samples: int = Field(
        2000, ge=8, description="how many samples are compared with as many real images; for collapse at least 60 of each class"
    )
    epochs: int = Field(8, ge=1, description="epochs that network 'classifier' is trained for")
    diversity_floor: float = Field(
        0.4,
        ge=0,
        le=1,
        description="mean pixel distance of two samples of a class, over that of two real images, below which (in its lowest "
        "class) the generator counts as collapsed",
    )


class GanConfig(Section):
    """Training of a StyleGAN 2: non-saturating logistic loss, lazy R1, EMA, style mixing, and what small data needs."""

    architecture: StyleGAN2Config = StyleGAN2Config()
    kimg: float = Field(300.0, gt=0, description="length of training in thousands of real images shown")
    batch_size: int = Field(32, ge=4, description="images a step, over all workers")
    lr_generator: float = Field(0.01, gt=0, description="Adam's learning rate of the generator")
    lr_discriminator: float = Field(0.004, gt=0, description="Adam's learning rate of the discriminator")
    fade: float = Field(0.3, ge=0, le=1, description="share of the training at the end in which both rates fall to 0")
    r1_gamma: float = Field(1.0, ge=0, description="weight of the R1 gradient penalty")
    r1_interval: int = Field(8, ge=1, description="steps between two R1 penalties (lazy regularisation)")
    path_length: float = Field(0.0, ge=0, description="weight of path-length regularisation (StyleGAN 2's paper: 2)")
    path_interval: int = Field(4, ge=1, description="steps between two path-length penalties")
    mode_seeking: float = Field(0.1, ge=0, description="weight of the term that keeps two z of one class apart")
    ema_kimg: float = Field(5.0, gt=0, description="half-life of the averaged generator in thousands of images")
    style_mixing: float = Field(0.5, ge=0, le=1, description="probability that two z share one image")
    augment: float = Field(0.3, ge=0, le=0.8, description="probability of each augmentation; with ada_target its first value")
    augmentations: tuple[Augmentation, ...] = Field(
        ("translate", "scale", "tilt"), description="what is done, each by that probability, to all that the critic sees"
    )
    ada_target: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="adapt the probability until this is the mean sign of D on real images (paper: 0.6); null = leave it",
    )
    ada_kimg: float = Field(100.0, gt=0, description="thousands of images in which that probability may go from 0 to 1")
    precision: Literal["float32", "tf32", "bf16"] = Field(
        "float32",
        description="'float32', 'tf32' for products and convolutions on GPUs, or 'bf16': forward passes in bfloat16, "
        "penalties on gradients, mapping and augmentation as with tf32",
    )
    report_kimg: float = Field(10.0, gt=0, description="thousands of images between two reports of losses")
    snapshot_kimg: float = Field(
        20.0, gt=0, description="thousands of images between two checkpoints, each with samples and their quality"
    )
    keep: Literal["best", "last"] = Field("best", description="which snapshot is the result: that of the lowest FID, or the last")
    quality: QualityConfig = QualityConfig()
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of weights, noise and order")

    @model_validator(mode="after")
    def _check(self) -> "GanConfig":
        if len(set(self.augmentations)) < len(self.augmentations):
            raise ValueError(f"augmentations {self.augmentations} name one twice")
        if self.ada_target is not None and not self.augmentations:
            raise ValueError("ada_target adapts the probability of augmentations, and there are none")
        if self.snapshot_kimg < self.report_kimg:
            raise ValueError(f"snapshot_kimg {self.snapshot_kimg} must be a multiple of report_kimg {self.report_kimg}, not less")
        if self.architecture.conv_clamp is not None:
            raise ValueError("architecture.conv_clamp belongs to imported generators; training here does without")
        return self
