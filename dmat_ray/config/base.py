"""What every section of settings shares. Imports neither torch nor ray."""

import hashlib
import json
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


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


class Section(BaseModel):
    """Base of all settings: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: Any) -> Any:
        """A setting that names a file is a text; from Python it may come as a Path."""
        if not isinstance(values, dict):
            return values
        return {name: str(value) if isinstance(value, PurePath) else value for name, value in values.items()}

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever any setting changes."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
