"""Settings of natural images."""

from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dmat_ray.config.base import MOST_SEED, Section

# a command line brings text, which a Literal of numbers does not take
Channels = Annotated[Literal[1, 3], BeforeValidator(lambda v: int(v) if v in ("1", "3") else v)]


# what is done without a word on them, which names of sets and trainings must not change with
LATER: dict[str, Any] = {"resize": "crop", "grey_levels": 65536, "official_split": None, "classes": [], "balanced": False}


class ClassList(Section):
    """A class that is made of some of a source's own: what it is called, and which they are."""

    name: str = Field(min_length=1, description="name of the class")
    members: tuple[tuple[str, ...], ...] = Field(
        min_length=1,
        description="the source's classes in it, each by the names it may have: of its folder, or its label in Parquet",
    )


def _text(name: Any) -> str:
    """The name of a class, or its number, as text; ValueError for what YAML makes of words such as yes, null and 1.0."""
    if isinstance(name, bool) or not isinstance(name, str | Integral):
        raise ValueError(
            f"{name!r} is no name of a class; write names that YAML reads as something else (yes, null, 1.0) in quotes"
        )
    return str(name)


def _class_lists(value: Any) -> Any:
    """{dog: [n02085620, [n02085782, 152]]}, as files have it, to a list of classes, which keeps its order on every way."""
    if not isinstance(value, dict):
        return value
    lists = []
    for name, members in value.items():
        if not isinstance(members, list | tuple):
            raise ValueError(f"class '{name}' must be a list of folders or labels, not {members!r}")
        named = [[_text(n) for n in (m if isinstance(m, list | tuple) else [m])] for m in members]
        lists.append({"name": _text(name), "members": named})
    return lists


class DataConfig(Section):
    """Where natural images come from, and how they are split."""

    source: str = Field(
        "mnist5k",
        min_length=1,
        description="'mnist5k' (5,000 embedded digits), a folder with one sub-folder a class, a Parquet file or a folder of "
        "them, or a folder with the files of CIFAR-10, CIFAR-100 or MNIST; folders and files may be s3:// and gs:// URLs",
    )
    resolution: int = Field(32, ge=8, le=1024, description="height and width in pixels")
    resize: Literal["crop", "stretch", "pad"] = Field(
        "crop",
        description="images of another size: scaled so that the shorter side fits and cropped at the centre; both sides scaled, "
        "whatever becomes of the aspect (arXiv 2009.02470); or put on black, scaled only if larger",
    )
    channels: Channels = Field(1, description="1 (grey) or 3 (RGB)")
    grey_levels: int = Field(
        65536,
        ge=256,
        le=65536,
        description="levels that grey PNG and TIFF of 16 bits a pixel have, of which the highest is white: 4096 for values of 12 "
        "bits that lie in 16; an image with a higher one is rejected",
    )
    test_share: float = Field(0.2, gt=0, lt=1, description="share of every class that goes to the test split")
    official_split: bool | None = Field(
        None,
        description="true: the source's own test set is the test split (CIFAR's, MNIST's; Parquet files and folders named train "
        "and test or val); false: its training part alone is split, by test_share; null: true for CIFAR and MNIST, and with "
        "data.classes where there is one; else a source that has parts, or looks so, is refused",
    )
    classes: Annotated[tuple[ClassList, ...], BeforeValidator(_class_lists)] = Field(
        (),
        description="classes made of the source's own, in the order of their labels, e.g. {pet: [cat, dog], bird: [hen]}; images "
        "of no class are left out; empty = the source's own. Layer a file, such as preset mixed10_classes",
    )
    balanced: bool = Field(
        False, description="as many images of every class in each split as the class with the fewest has there"
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
    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of the split and of the subsets")

    def settled(self) -> dict[str, Any]:
        """As JSON, without what came when sets and models had been made without it, where it is at its default."""
        values = self.model_dump(mode="json")
        return {k: v for k, v in values.items() if k not in LATER or v != LATER[k]}

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        owner: dict[str, str] = {}
        for one in self.classes:
            if not all(names and all(names) for names in one.members):
                raise ValueError(
                    f"classes: an entry of '{one.name}' is empty; give the name of a class of the source, or several"
                )
            for name in (name for names in one.members for name in names):
                if name in owner:
                    also = "twice in class" if owner[name] == one.name else f"in class '{owner[name]}' and in class"
                    raise ValueError(f"classes: '{name}' is {also} '{one.name}'; an image has one label")
                owner[name] = one.name
        names = [one.name for one in self.classes]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"classes: two are called '{twice}'")
        return self
