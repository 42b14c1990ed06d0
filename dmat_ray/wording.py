"""Pieces of what jobs say, of lines and of messages alike."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dmat_ray.config.base import NAME

WORDS = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a table"),
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "missing": "is missing",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must be {pattern}",
    "extra_forbidden": "there is no such setting",
}
"""What pydantic says of a value, by the type of its error, as a user of a command line would."""
PATTERNS = {NAME: "letters, digits, _ . and -, the first a letter or a digit"}


def number_of(number: int, noun: str, least: int | None = None) -> str:
    """A number with its noun: "1 shard", "20 shards"; of fewer, down to `least`: "2 to 20 shards"."""
    few = "" if least in (None, number) else f"{least:,} to "
    return f"{few}{number:,} {noun}{'' if number == 1 else 's'}"


def be(number: int) -> str:
    """The verb to a number of things."""
    return "is" if number == 1 else "are"


def choices(name: str, known: Sequence[str]) -> str:
    """What may be given in place of a `name` that stands for none of the package's own YAML files."""
    return f"{did_you_mean(name, known)}choose from {', '.join(known)}, or give the path of a YAML file"


def duration(seconds: float) -> str:
    """How long something takes, as precisely as one would say it: "40 s", "12 minutes", "3.5 hours", "2.1 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def to_go(metrics: Mapping[str, float], kimg: float) -> str:
    """How long a training of `kimg` thousand images takes from here, to stand behind a report; nothing at its end."""
    left, speed = kimg - metrics["kimg"], metrics["images_per_second"]
    losses = sum(value for name, value in metrics.items() if name.startswith("loss"))
    return f", about {duration(1000 * left / speed)} to go" if left > 1e-9 and speed > 0 and math.isfinite(losses) else ""


def wrong(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, of one of the errors that pydantic tells."""
    if (words := WORDS.get(error["type"])) is None:
        return str(error["msg"]).removeprefix("Value error, ")
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in error.get("ctx", {}).items()}
    if (pattern := shown.get("pattern")) is not None:
        shown["pattern"] = PATTERNS.get(pattern, f"of the form {pattern}")
    return words.format(**shown)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """For the message about a `name` that is not known: "did you mean X? " of the one that is most like it, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""
