"""YAML as users write it: presets, suites, the methods of a study."""

from pathlib import Path
from typing import Any

import yaml

from dmat_ray.errors import UserError

MERGE = "tag:yaml.org,2002:merge"  # of the key <<


class _TwiceError(Exception):
    """A mapping that gives a key twice; says where."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice, which YAML forbids: PyYAML takes the last without a word."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # not where values are made of it: by then it may hold what << has merged into it
        mapping = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise _TwiceError(f"line {line}: '{key.value}' is there already, in line {lines[name]}; give it once")
                lines[name] = line
        return mapping


def read(path: Path, what: str) -> Any:
    """What a YAML file holds; {} if nothing. Raises UserError, which calls the file `what`, for one that is no YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except _TwiceError as error:
        raise UserError(f"{what}, {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-01 is a date that there is not
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
