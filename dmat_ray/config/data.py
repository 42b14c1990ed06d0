"""Settings of natural images."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dmat_ray.config.base import Section

# a command line brings text, which a Literal of numbers does not take
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda v: int(v) if v in ("1", "3") else v)]


class DataConfig(Section):
    """Where natural images come from, and how they are split."""

    source: str = Field(
        "mnist5k",
        description="'mnist5k' (5,000 embedded digits), a folder with one sub-folder a class, a Parquet file or a folder of "
        "them, or a folder with the files of CIFAR-10, CIFAR-100 or MNIST; folders and files may be s3:// and gs:// URLs",
    )
    resolution: int = Field(
        32, ge=8, le=1024, description="height and width in pixels; images of another size are scaled and cropped at the centre"
    )
    channels: Channels = Field(1, description="1 (grey) or 3 (RGB)")
    test_share: float = Field(0.2, gt=0, lt=1, description="share of every class that goes to the test split")
    official_split: bool = Field(
        True, description="whether the test set that CIFAR and MNIST come with is the test split; false = split all by test_share"
    )
    train_limit: int | None = Field(None, ge=1, description="at most this many training images, the classes in turn; null = all")
    test_limit: int | None = Field(None, ge=1, description="at most this many test images, the classes in turn; null = all")
    max_rejected: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images above which a run fails instead of leaving them out"
    )
    max_pixels: int = Field(
        50_000_000, ge=64, description="pixels above which an image is rejected without being decoded (a decompression bomb)"
    )
    image_column: str = Field("image", min_length=1, description="Parquet: column of encoded images, binary or struct{bytes}")
    label_column: str = Field(
        "label",
        min_length=1,
        description="Parquet: column of labels, integers or names; CIFAR-100: coarse_label for its 20 classes instead of 100",
    )
    id_column: str | None = Field(None, description="Parquet: column of unique ids; null = file name and row")
    seed: int = Field(0, ge=0, description="seed of the split and of the subsets")
