"""What every section of settings shares. Imports neither torch nor ray."""

import functools
import hashlib
import json
import os
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from dmat_ray.errors import UserError

MOST_SEED = 2**63 - 1  # that a torch.Generator takes
NAME = r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$"  # what folders may be called


def parse_fraction(value: Any) -> Any:
    """'8/255' -> 0.0314; anything else is left to pydantic."""
    if isinstance(value, str) and value.count("/") == 1:
        top, bottom = value.split("/")
        try:
            return float(top) / float(bottom)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"'{value}' is not a fraction such as 8/255") from None
    return value


Fraction = Annotated[float, BeforeValidator(parse_fraction)]


@functools.cache
def _types_in(annotation: Any) -> frozenset[type]:
    """The types of the values that an annotation allows, those in a list as well."""
    if get_origin(annotation) is Literal:
        return frozenset(type(choice) for choice in get_args(annotation))
    if parts := get_args(annotation):
        return frozenset().union(*(_types_in(part) for part in parts))
    return frozenset({annotation} if isinstance(annotation, type) else ())


def _takes_numbers(annotation: Any) -> bool:
    types = _types_in(annotation)
    return bool(types & {int, float}) and not types & {bool, str}


def _truths_as_text(value: Any) -> Any:
    """Of a number, or numbers: text for true and false, which pydantic would take for 1 and 0."""
    if isinstance(value, list | tuple):
        return [_truths_as_text(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else value


def _path_as_text(value: Any) -> Any:
    """A path as text; of a Location of an object store, which has none on this machine, its URL."""
    if not isinstance(value, os.PathLike):
        return value
    try:
        return os.fsdecode(value)
    except UserError:
        return str(value)


class Section(BaseModel):
    """Base of all settings: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, values: Any) -> Any:
        """A setting that names a file is a text; from Python it may come as anything that is a path. That true is no number, text
        shows.
        """
        if not isinstance(values, dict):
            return values
        numbers = {name for name, field in cls.model_fields.items() if _takes_numbers(field.annotation)}
        return {name: _truths_as_text(v) if name in numbers else _path_as_text(v) for name, v in values.items()}

    @field_validator("*")
    @classmethod
    def _text_can_be_a_path(cls, value: Any) -> Any:
        """The system ends a path at a NUL, and Python raises ValueError wherever one is looked for."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{value!r} holds a NUL, which no text of settings may")
        return value

    @classmethod
    def recorded(cls, values: Any) -> Any:
        """Values that `model_dump` of an older version gave, as this one gives them: what they lack came later, with what was
        done before as its default. Those that this version does not take are given back as they are.
        """
        try:
            return cls.model_validate(values).model_dump(mode="json")
        except ValidationError:
            return values

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever any setting changes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
