"""Refusing a foreign file, and showing what stands in it. Needs no torch, as processes that only read images have none."""


class RefusedError(Exception):
    """Why a file is not read; `checkpoints.read` makes it a UserError with the file's name."""


def shown(value: object, length: int = 80) -> str:
    """A value out of a foreign file, safe to print: one line, printable, short. Of what may be large, only its type."""
    if isinstance(value, str):
        text = value[: length + 1]
    elif isinstance(value, int) and value.bit_length() > 128:
        text = f"a number of {value.bit_length()} bits"
    elif value is None or isinstance(value, int | float) or type(value).__name__ == "dtype":
        text = str(value)
    elif isinstance(value, tuple | list) and len(value) <= 8 and all(isinstance(v, int | float) for v in value):
        inner = ", ".join(shown(v) for v in value)
        text = f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    else:
        text = f"a {type(value).__name__}"
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= length else line[: length - 3] + "..."
