"""Writes the tables of settings in docs/configuration.md and docs/evaluation.md anew: python docs/tables.py

They are made of the models in dmat_ray/config, the presets and the jobs; tests/docs/test_docs.py holds that they are these.
"""

import argparse
import runpy
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

import annotated_types as at
from pydantic.fields import FieldInfo

from dmat_ray import cli, presets
from dmat_ray.config import AttackRow, Config, Row, Section
from dmat_ray.config.base import parse_fraction

ROOT = Path(__file__).parents[1]
SEARCHED = set(Row.model_fields)
ROWS: tuple[type[Section], ...] = get_args(get_args(AttackRow)[0])
LONG = 8  # choices that one cell holds


def shown(value: object, levels: bool) -> str:
    """A default as YAML has it; in pixel units as a fraction."""
    if isinstance(value, float):
        return f"{value * 255:g}/255" if levels else f"{value:.4g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else {"": '""', "()": "[]"}.get(str(value), str(value))


def field(section: type[Section], name: str) -> str:
    """A field with its choices and its default, in one cell's words."""
    info = section.model_fields[name]
    choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
    given = "" if info.is_required() else f" = {shown(info.default, 'pixel units' in str(info.description))}"
    return f"`{name}`{given}" + (f" ({', '.join(choices)})" if 1 < len(choices) <= LONG else "")


def fields() -> str:
    """The fields of every search, then those of each threat."""
    lines = ["| of every attack | |", "|---|---|"]
    for name in (n for n in Row.model_fields if n not in ("threat", "name")):
        lines.append(f"| {field(Row, name)} | {Row.model_fields[name].description} |")
    lines += ["", "| `threat` | fields of its own |", "|---|---|"]
    for row in ROWS:
        common = {"threat", "name"} | (SEARCHED if issubclass(row, Row) else set())
        own = [name for name in row.model_fields if name not in common]
        described = [f"{field(row, name)}: {row.model_fields[name].description}" for name in own]
        lines.append(f"| `{row.model_fields['threat'].default}` | {'; '.join(described) or 'none'} |")
    return "\n".join(lines)


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def cell(text: str) -> str:
    """A description as it stands in a table, where | and * would be signs."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def taken(kind: Any, metadata: list[Any]) -> str:
    """What a setting takes: its choices, or its type and its bounds."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return taken(kind, [*more, *metadata])
    if get_origin(kind) in (Union, types.UnionType):
        first, *rest = [part for part in get_args(kind) if part is not type(None)]
        assert not rest, kind
        return f"{taken(first, metadata)}, or `null`"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {many(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "terms by name"
    if kind is bool:
        return "`true`, `false`"
    if kind is float and any(getattr(part, "func", None) is parse_fraction for part in metadata):
        return "number or fraction" + bounds(metadata)
    return {int: "whole number", float: "number", str: "text"}[kind] + bounds(metadata)


def many(kind: Any) -> str:
    """What a list holds."""
    if get_origin(kind) is Literal:
        return taken(kind, [])
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        return "numbers" + bounds(metadata[0].metadata) if inner is float else "rows"
    return {str: "texts", float: "numbers"}.get(kind, "lists" if get_origin(kind) is tuple else "tables")


def bounds(metadata: list[Any]) -> str:
    """The bounds of a number, in words."""
    low = next((part for part in metadata if isinstance(part, at.Ge | at.Gt)), None)
    high = next((part for part in metadata if isinstance(part, at.Le | at.Lt)), None)
    if isinstance(low, at.Ge) and isinstance(high, at.Le):
        return f", {low.ge:,} to {_of_bits(high.le)}"
    told = {at.Ge: lambda b: f"{b.ge} or more", at.Gt: lambda b: f"above {b.gt}"} if low else {}
    ends = [told[type(low)](low)] if low else []
    if high is not None:
        ends.append(f"at most {high.le}" if isinstance(high, at.Le) else f"below {high.lt}")
    return "".join(f", {end}" for end in ends)


def _of_bits(number: Any) -> str:
    """A bound; the largest number of so many bits by how many they are."""
    bits = int(number).bit_length()
    return f"2^{bits} - 1" if bits >= 32 and number == 2**bits - 1 else f"{number:,}"


def default(info: FieldInfo) -> str:
    """A default as the command line has it."""
    value = info.get_default(call_default_factory=True)
    if value == {}:
        return "none"
    if isinstance(value, tuple):
        told = ",".join(getattr(one, "name", None) or shown(one, False) for one in value)
        return f"`{told}`" if told else "none"
    if value == "":
        return "empty"
    return f"`{shown(value, 'pixel units' in str(info.description))}`"


def table(section: type[Section], prefix: str, option: str = "--") -> list[str]:
    """The settings of a section itself, without those of the sections in it."""
    lines = ["| option | takes | default | |", "|---|---|---|---|"]
    for name, info in section.model_fields.items():
        if name == "threat" or is_section(info.annotation):
            continue
        given = "" if info.is_required() else default(info)
        dashes = option if get_origin(info.annotation) is not dict else ""
        lines.append(
            f"| `{dashes}{prefix}{name}` | {taken(info.annotation, info.metadata)} | {given} | {cell(str(info.description))} |"
        )
    return lines


def doc(section: type[Section]) -> str:
    """A section's docstring in one paragraph a line."""
    paragraphs = (section.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def sections(section: type[Section], prefix: str, depth: int) -> Iterator[str]:
    """The headings and tables of all that a section holds."""
    for name, info in section.model_fields.items():
        if not is_section(info.annotation):
            continue
        inner = typing.cast(type[Section], info.annotation)
        lines = [f"{'#' * depth} {prefix}{name}", "", doc(inner)]
        if threat := next((base for base in inner.__mro__[1:] if base.__name__.endswith("Threat")), None):
            lines.append(doc(threat))
        if any(not is_section(f.annotation) for f in inner.model_fields.values()):
            lines += ["", *table(inner, f"{prefix}{name}.")]
        yield "\n".join(lines)
        yield from sections(inner, f"{prefix}{name}.", depth + 1)
        yield from tables_of(inner, f"{prefix}{name}.", depth + 1)


def tables_of(section: type[Section], prefix: str, depth: int) -> Iterator[str]:
    """The fields of what a list holds, where these are tables of one form."""
    for name, info in section.model_fields.items():
        if get_origin(info.annotation) is tuple and is_section(inner := get_args(info.annotation)[0]):
            yield "\n".join(
                [f"{'#' * depth} An entry of {prefix}{name}", "", doc(inner), "", *table(inner, "", option="")]
            ).replace("| option |", "| field |")


def settings() -> str:
    """All settings, section by section."""
    whole = ["## Output and names", "", "Where results go, and what they are called.", "", *table(Config, "")]
    return "\n\n".join(["\n".join(whole), *sections(Config, "", 2)])


def leading(path: Path) -> str:
    """The comment that a file begins with, its first sentence."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    whole = " ".join(lines)
    end = whole.find(". ", 40)
    return cell(whole[: end + 1] if end > 0 else whole)


def shipped() -> str:
    """The presets that ship, each by what its file says it is."""
    rows = [f"| `{name}` | {leading(presets.FOLDER / f'{name}.yaml')} |" for name in presets.names()]
    return "\n".join(["| preset | |", "|---|---|", *rows])


class StopError(Exception):
    """A job has come to its command line."""


def asked(job: Path) -> tuple[list[str], Callable[[argparse.ArgumentParser], None] | None]:
    """The presets that a job takes if it is given none, and what puts options of its own on the parser."""
    found: dict[str, Any] = {}

    def parse(_: str, *__: Any, preset: Any = (), add: Any = None, **___: Any) -> None:
        found.update(preset=list(preset), add=add)
        raise StopError

    with mock.patch.object(cli, "parse", parse):
        try:
            runpy.run_path(str(job))["main"]()
        except StopError:
            return found["preset"], found["add"]
    raise AssertionError(f"{job} parses no command line")


def options() -> str:
    """The options that jobs have beside the settings."""
    lines = ["| job | presets it takes if none are given | options of its own |", "|---|---|---|"]
    for job in sorted((ROOT / "jobs").glob("*.py")):
        given, add = asked(job)
        parser = argparse.ArgumentParser(add_help=False)
        if add is not None:
            add(parser)
        own = []
        for action in parser._actions:
            value = f" {action.metavar or '...'}" if action.nargs != 0 else ""
            needed = " (needed)" if action.required else ""
            own.append(f"`{action.option_strings[0]}{value}`{needed}: {cell(str(action.help))}")
        names = " ".join(f"`{name}`" for name in given)
        lines.append(f"| `jobs/{job.name}` | {names or 'none'} | {'; '.join(own) or 'none'} |")
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "evaluation.md": {"fields": fields},
    "configuration.md": {"presets": shipped, "options": options, "settings": settings},
}
"""The tables of each document by the name in their marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""


def parts(text: str, name: str) -> tuple[str, str, str]:
    """A document before, between and after the marks of a table, the marks outside."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    before, rest = text.split(begin)
    between, after = rest.split(end)
    return before + begin, between, end + after


def main() -> None:
    for document, tables in TABLES.items():
        path = ROOT / "docs" / document
        for name, make in tables.items():
            before, _, after = parts(path.read_text(encoding="utf-8"), name)
            path.write_text(before + make() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
