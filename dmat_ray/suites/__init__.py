"""Suites of attacks by name: YAML files, each a table of rows, summaries of them, and other suites that it includes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from dmat_ray import yaml_file
from dmat_ray.config import AttackRow, EvaluationConfig, Section, Summary
from dmat_ray.errors import UserError
from dmat_ray.wording import did_you_mean, wrong

FOLDER = Path(__file__).parent
KEYS = {"include", "attacks", "summaries"}
_ROW: TypeAdapter[Any] = TypeAdapter(AttackRow)
_SUMMARY: TypeAdapter[Any] = TypeAdapter(Summary)
_ROWS: dict[str, type[Section]] = {row.model_fields["threat"].default: row for row in get_args(get_args(AttackRow)[0])}


def names() -> list[str]:
    """The suites that ship with the package."""
    return yaml_file.names(FOLDER)


def load(name: str, above: Mapping[Path, str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Rows and summaries of a suite, by name or by path (anything with a dot or a slash), those of included ones first.

    A row of a name that an included suite has takes that one's place.

    Raises UserError for one that does not exist, is not of this form, or includes itself.
    """
    file = yaml_file.named(name, "suite", FOLDER, above)
    values = file.values
    if not isinstance(values, dict) or (unknown := values.keys() - KEYS):
        what = f"'{min(map(str, unknown))}'" if isinstance(values, dict) else f"a {type(values).__name__}"
        raise UserError(f"suite '{name}' holds {what}; a suite has {', '.join(sorted(KEYS))}")
    for key in sorted(KEYS):
        if not isinstance(found := values.get(key) or [], list):
            raise UserError(f"suite '{name}': {key} is {found!r}; give a list, [{found}]")
    others = values.get("include") or []
    if odd := [other for other in others if not isinstance(other, str)]:
        raise UserError(f"suite '{name}': include has {odd[0]!r}; give names or paths of suites")
    parts = [*(load(other, file.chain) for other in file.beside(others)), values]
    return {key: _joined([row for part in parts for row in part.get(key) or []]) for key in ("attacks", "summaries")}


def _joined(rows: list[Any]) -> list[Any]:
    """Rows in the order in which their names first come, each as it comes last. What is no row stays, for pydantic to name."""
    named = [row["name"] if isinstance(row, dict) and isinstance(row.get("name"), str) else None for row in rows]
    last = {name: row for name, row in zip(named, rows, strict=True) if name is not None}
    first = {name: place for place, name in reversed(list(enumerate(named)))}
    return [last.get(name, rows[place]) for place, name in enumerate(named) if name is None or first[name] == place]


def resolved(config: EvaluationConfig) -> EvaluationConfig:
    """The settings with the rows of their suites after their own, whose names win; of two suites' rows of one name the last.

    Raises UserError for what `load` refuses and for a row that is wrong, pydantic's ValidationError for rows that do not go
    together.
    """
    if not config.suites:
        return config
    values, theirs = config.model_dump(mode="json"), list[tuple[str, Any]]()
    for name in config.suites:
        for key, rows in load(name).items():
            for row in rows:
                _require_valid(name, key, row)
                theirs.append((key, row))
    for key in ("attacks", "summaries"):
        values[key] = _joined([*values[key], *(row for kind, row in theirs if kind == key), *values[key]])
    return EvaluationConfig.model_validate({**values, "suites": ()})


def _require_valid(suite: str, key: str, row: Any) -> None:
    """Raise UserError that names a suite's row, as its author does, and what is wrong with it."""
    named = f"'{row['name']}'" if isinstance(row, dict) and "name" in row else repr(row)
    where = f"suite '{suite}', {'attack' if key == 'attacks' else 'summary'} {named}"
    try:
        (_ROW if key == "attacks" else _SUMMARY).validate_python(row)
    except ValidationError as error:
        item = error.errors()[0]
        if item["type"] == "union_tag_invalid":
            hint = did_you_mean(str(item["ctx"]["tag"]), _ROWS)
            known = ", ".join(map(repr, _ROWS))
            raise UserError(f"{where}: there is no threat '{item['ctx']['tag']}'; {hint}known are {known}") from None
        place = [str(part) for part in item["loc"]]
        field = ".".join(place[1:] if key == "attacks" else place)  # the first is the threat
        if item["type"] == "extra_forbidden":
            fields = list(_ROWS[place[0]].model_fields if key == "attacks" else Summary.model_fields)
            hint = did_you_mean(field, fields).rstrip() or f"there are {', '.join(fields)}"
            raise UserError(f"{where}: there is no such setting as {field}; {hint}") from None
        raise UserError(f"{where}: {f'{field}: ' if field else ''}{wrong(item)}") from None
