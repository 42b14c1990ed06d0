"""Values as settings, or a message in plain words: what pydantic finds wrong, by the dotted names that users know."""

from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.wording import did_you_mean, wrong


def validate(values: dict[str, Any]) -> Config:
    """A Config from nested values; raises UserError naming every wrong key, what was found and what is allowed."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error, Config)) from None


def describe(error: ValidationError, kind: type[BaseModel] | None = None, hidden: Collection[str] = ()) -> str:
    """A pydantic error as one line: each wrong setting by its dotted name, with what was found.

    For one that there is not, also the one of `kind`, which the values were for, that is most like it and not `hidden`.
    """
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        found = item["input"]
        shown = "" if isinstance(found, dict | Config) or item["type"] == "value_error" else f" (found {found!r})"
        near = _near(kind, item["loc"], hidden) if kind and item["type"] == "extra_forbidden" else ""
        parts.append(f"{where}: {wrong(item)}{shown}{near}")
    return "; ".join(parts)


def _near(kind: type[BaseModel], loc: Sequence[Any], hidden: Collection[str]) -> str:
    """The field that was meant, where one is like it; of a section of `kind` that pydantic's `loc` leads to."""
    section: Any = kind
    for part in loc[:-1]:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
    hint = did_you_mean(str(loc[-1]), [name for name in section.model_fields if name not in hidden]).rstrip()
    return f"; {hint}" if hint else ""
