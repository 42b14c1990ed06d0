"""The direction of imports: config and types, then the core, then the cluster; ray and mlflow in the cluster only."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import dmat_ray
from dmat_ray import config

ROOT = Path(dmat_ray.__file__).parent


def dotted(path: Path) -> str:
    return ".".join(["dmat_ray", *path.relative_to(ROOT).with_suffix("").parts])


SOURCES = {dotted(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
CORE = [name for name in SOURCES if not name.startswith("dmat_ray.cluster.")]
CONFIG = [name for name in SOURCES if name.startswith("dmat_ray.config.")]


def imports_of(module: str, source: str) -> Iterator[str]:
    """Every module that a source imports, at its top or inside a function, absolute or relative or by a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def within(modules: Iterable[str], *packages: str) -> list[str]:
    return [m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages)]


def test_the_walk_sees_imports_of_every_kind() -> None:
    source = """
import torch
def f():
    import ray.train as t
    from ..config import Config
    from . import balls
    importlib.import_module("mlflow.client")
    from dmat_ray import presets
"""
    expected = ["torch", "ray.train", "dmat_ray.config.Config", "dmat_ray.threats.balls", "mlflow.client", "dmat_ray.presets"]
    assert sorted(imports_of("dmat_ray.threats.image", source)) == sorted(expected)
    assert within(["rayon", "ray", "ray.data"], "ray") == ["ray", "ray.data"]
    assert len(CORE) > 25
    assert len(CONFIG) >= 4


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_neither_ray_nor_mlflow_nor_the_cluster(module: str) -> None:
    assert within(imports_of(module, SOURCES[module]), "ray", "mlflow", "dmat_ray.cluster") == []


@pytest.mark.parametrize("module", CONFIG)
def test_config_imports_nothing_but_itself_and_errors(module: str) -> None:
    found = list(imports_of(module, SOURCES[module]))
    own = within(found, "dmat_ray")
    assert within(own, "dmat_ray.config", "dmat_ray.errors") == own
    assert within(found, "torch", "torchvision", "lpips", "numpy", "pyarrow") == []


def test_types_rest_on_positions_and_random_numbers_only() -> None:
    own = set(within(imports_of("dmat_ray.types", SOURCES["dmat_ray.types"]), "dmat_ray"))
    assert own == {"dmat_ray.positions.Index", "dmat_ray.positions.positions", "dmat_ray.rng.Draws"}
    own = set(within(imports_of("dmat_ray.positions", SOURCES["dmat_ray.positions"]), "dmat_ray"))
    assert own == {"dmat_ray.errors.UserError"}
    assert within(imports_of("dmat_ray.rng", SOURCES["dmat_ray.rng"]), "dmat_ray") == []


def room_of(module: str) -> str:
    """The folder of a module or, of one that is in none, the module itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def ways(rooms: dict[str, set[str]], start: str) -> set[str]:
    """The rooms that one imports, those that these import, and so on."""
    found, ahead = set[str](), [start]
    while ahead:
        new = rooms.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found


def test_no_room_imports_one_that_imports_it() -> None:
    """By no way round: so each can be read after those that it rests on."""
    rooms: dict[str, set[str]] = {}
    for module, source in SOURCES.items():
        if (here := room_of(module)) not in ("", "__init__"):
            found = {room_of(name) for name in within(imports_of(module, source), "dmat_ray")}
            rooms.setdefault(here, set()).update(found - {here, ""})
    assert len(rooms) > 30
    assert ways({"a": {"b"}, "b": {"c"}, "c": {"a"}}, "a") == {"a", "b", "c"}, "a way round is seen"
    assert [name for name in rooms if name in ways(rooms, name)] == []


def defined(source: str) -> set[str]:
    """What a module's own code gives a name: what it defines, sets and imports, not inside of functions and classes."""
    found, ahead = set[str](), list[ast.AST](ast.parse(source).body)
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            ahead += node.orelse
        else:
            ahead += ast.iter_child_nodes(node)
    return found


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_what_scripts_import_of_the_package_is_there() -> None:
    """Benchmarks too, which most runs of the tests do not start."""
    folders = [ROOT.parent / name for name in ("benchmarks", "jobs", "tests", "tune_spaces")]
    scripts = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    names = {name for path in scripts for name in within(imports_of(path.stem, path.read_text()), "dmat_ray")}
    assert len(names) > 200
    modules = {name.removesuffix(".__init__"): source for name, source in SOURCES.items()}
    # a folder need not have a file of its own
    there = {".".join(name.split(".")[:k]) for name in modules for k in range(1, name.count(".") + 2)}
    there |= {f"{name}.{one}" for name, source in modules.items() for one in defined(source)}
    # what is fetched when it is asked for, and what is made in a loop
    there |= {f"dmat_ray.{name}" for name in dmat_ray.__all__} | {f"dmat_ray.config.{name}" for name in dir(config)}
    assert {"dmat_ray.train", "dmat_ray.config.Config", "dmat_ray.presets"} <= there
    assert sorted(names - there) == []


@pytest.mark.slow
def test_the_core_imports_where_ray_and_mlflow_do_not() -> None:
    modules = [name.removesuffix(".__init__") for name in CORE]
    code = f"""
import importlib, sys
sys.modules["ray"] = sys.modules["mlflow"] = None
for name in {modules!r}:
    importlib.import_module(name)
try:
    import ray
except ImportError:
    print("ray is blocked,", len({modules!r}), "modules imported")
"""
    assert in_fresh_python(code).strip() == f"ray is blocked, {len(modules)} modules imported"


def test_the_command_line_answers_without_torch() -> None:
    """A typing error should not cost the seconds that torch takes to import."""
    code = "import sys; from dmat_ray import cli; cli.parse('x', ['--training.epochs', '3']); print('torch' in sys.modules)"
    assert in_fresh_python(code).strip() == "False"


def test_what_reads_and_writes_shards_needs_no_torch() -> None:
    """Those processes are many on a cluster; torch would be most of their memory."""
    code = "import sys, dmat_ray.cluster.shard_tasks as tasks; print(tasks.read_shard.__module__, 'torch' in sys.modules)"
    assert in_fresh_python(code).strip() == "dmat_ray.cluster.shard_tasks False"
