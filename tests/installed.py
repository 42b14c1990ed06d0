"""A package of somebody's as an installer leaves it on the path, without a registry."""

import tomllib
from pathlib import Path


def install(folder: Path, project: str, **modules: str) -> Path:
    """Modules by their text, and beside them what says whose they are and which entry points they have."""
    about = tomllib.loads(project)["project"]
    named = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    points = about["entry-points"].items()
    lines = [line for group, found in points for line in (f"[{group}]", *(f"{name} = {value}" for name, value in found.items()))]
    (named / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder
