"""What the documents say of settings is what the settings are. `python tests/test_docs.py` writes the tables anew."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

from dmat_ray.config import AttackRow, Row, Section

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "docs" / "evaluation.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
SEARCHED = set(Row.model_fields)


def field(section: type[Section], name: str) -> str:
    """A field with its choices and its default, in one cell's words."""
    info = section.model_fields[name]
    choices = [str(choice) for choice in get_args(info.annotation) if isinstance(choice, str)]
    given = "" if info.is_required() else f" = {shown(info.default, 'pixel units' in str(info.description))}"
    return f"`{name}`{given}" + (f" ({', '.join(choices)})" if 1 < len(choices) <= 8 else "")


def shown(value: object, levels: bool) -> str:
    """A default as YAML has it; in pixel units as a fraction."""
    if isinstance(value, float):
        return f"{value * 255:g}/255" if levels else f"{value:.4g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else {"": '""', "()": "[]"}.get(str(value), str(value))


def fields() -> str:
    """The fields of every search, then those of each threat."""
    lines = ["| of every attack | |", "|---|---|"]
    for name in (n for n in Row.model_fields if n not in ("threat", "name")):
        lines.append(f"| {field(Row, name)} | {Row.model_fields[name].description} |")
    lines += ["", "| `threat` | fields of its own |", "|---|---|"]
    for row in get_args(get_args(AttackRow)[0]):
        common = {"threat", "name"} | (SEARCHED if issubclass(row, Row) else set())
        own = [name for name in row.model_fields if name not in common]
        described = [f"{field(row, name)}: {row.model_fields[name].description}" for name in own]
        lines.append(f"| `{row.model_fields['threat'].default}` | {'; '.join(described) or 'none'} |")
    return "\n".join(lines)


def parts() -> tuple[str, str, str]:
    """The document before, between and after the marks."""
    before, rest = PLACE.read_text(encoding="utf-8").split(BEGIN)
    between, after = rest.split(END)
    return before, between, after


def test_the_fields_of_rows_are_documented() -> None:
    assert parts()[1].strip() == fields(), "python tests/test_docs.py"


def test_the_plans_are_those_of_the_measured_rates() -> None:
    told = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--price", "3"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rates = {row["stage"]: row for row in json.loads((ROOT / "benchmarks" / "rates_h100.json").read_text())["rows"]}
    days = 1_300_000 / rates["project paper, fast"]["images_per_second"] / 86_400
    assert f"| 1,300,000 | projection, preset `paper` (1,000 steps) | {days:.0f} d |" in told.stdout


if __name__ == "__main__":
    before, _, after = parts()
    PLACE.write_text(f"{before}{BEGIN}\n{fields()}\n{END}{after}", encoding="utf-8")
