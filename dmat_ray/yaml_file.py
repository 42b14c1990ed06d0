"""YAML as users write it: presets, suites, the methods of a study."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dmat_ray.errors import UserError
from dmat_ray.wording import choices

MERGE = "tag:yaml.org,2002:merge"  # of the key <<
PLAIN = re.compile(r"[-+]?(0|[1-9]\d*|[1-9]\d{0,2}(_\d{3})+|0[xb][\da-fA-F_]+)")
"""Whole numbers that nobody reads otherwise than YAML: 010 is 8 there, 1_0 is 10, and 12:30 is 750."""


class _UnclearError(Exception):
    """What is not taken although PyYAML would; says where."""


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML takes without a word for something else.

    A mapping that gives a key twice, which YAML forbids (PyYAML takes the last), also by two words for one value, such as yes and
    on; and a whole number that only YAML 1.1 reads so.
    """

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # not where values are made of it: by then it may hold what << has merged into it
        mapping = super().compose_mapping_node(anchor)
        given: dict[Any, yaml.ScalarNode] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                value = self.construct_object(key)
                if first := given.get(value):
                    what = f"line {key.start_mark.line + 1}: '{key.value}' is there already, "
                    where = f"in line {first.start_mark.line + 1}"
                    same = f"as '{first.value}' {where}, and YAML reads both as {value}; write what is text in quotes"
                    raise _UnclearError(what + (f"{where}; give it once" if first.value == key.value else same))
                given[value] = key
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if not PLAIN.fullmatch(node.value):
            line = node.start_mark.line + 1
            raise _UnclearError(f"line {line}: {node.value} is the number {number} in YAML; write {number}, or '{node.value}'")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path: Path, what: str) -> Any:
    """What a YAML file holds; {} if nothing. Raises UserError, which calls the file `what`, for one that is no YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except _UnclearError as error:
        raise UserError(f"{what}, {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-01 is a date that there is not
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Included:
    """A file that may include others, with what it holds; `chain` is itself and those that include it, as they were named."""

    path: Path
    values: Any
    chain: dict[Path, str]

    def beside(self, others: Iterable[str]) -> list[str]:
        """What it includes, with files looked for beside it."""
        return [str(self.path.parent / other) if _is_path(other) else other for other in others]


def names(folder: Path) -> list[str]:
    """The files of a folder that ships with the package, by name."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def named(name: str, kind: str, folder: Path, above: Mapping[Path, str] | None = None) -> Included:
    """The file in `folder` of this name, or one by its path (anything with a dot or a slash), which `above` include.

    Raises UserError, which calls it a `kind`, for one that does not exist, includes itself, or is no YAML.
    """
    path = Path(name) if _is_path(name) else folder / f"{name}.yaml"
    if not path.is_file():
        hint = "" if _is_path(name) else f"; {choices(name, names(folder))}"
        raise UserError(f"{kind} '{name}' does not exist{hint}")
    if (here := path.resolve()) in (above := above or {}):
        raise UserError(f"{kind} '{name}' includes itself ({' > '.join([*above.values(), name])})")
    return Included(path, read(path, f"{kind} '{name}'"), {**above, here: name})


def _is_path(name: str) -> bool:
    return "/" in name or "." in name
