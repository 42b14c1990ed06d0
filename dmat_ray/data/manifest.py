"""What the manifest of an on-manifold set says, key by key."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class Shapes(BaseModel):
    """Shapes in a manifest: (C, H, W) of images, (L, D) of w."""

    model_config = ConfigDict(strict=True)
    on_manifold: Annotated[list[Size], Field(min_length=3, max_length=3)]
    w: Annotated[list[Size], Field(min_length=2, max_length=2)]

    @field_validator("on_manifold")
    @classmethod
    def _square(cls, shape: list[int]) -> list[int]:
        channels, height, width = shape
        if channels not in (1, 3) or height != width:
            raise ValueError(f"{shape} is no shape of square grey or RGB images")
        return shape


class Described(BaseModel):
    """The keys that readers of a set look up; every manifest of this version has them."""

    model_config = ConfigDict(strict=True, extra="allow")
    data: dict[str, Any]
    generator_sha256: str
    class_names: Annotated[list[str], Field(min_length=1)]
    shards: dict[str, Count]
    shapes: Shapes
    count: Count
    splits: dict[str, Count]
    status: dict[str, Count]
    usable: dict[str, Count]
    means: dict[str, FiniteFloat]
    rejected: dict[str, str]
    versions: dict[str, str]
