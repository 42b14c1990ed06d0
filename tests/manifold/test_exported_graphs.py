"""Exports that would run code when torch loads them are refused, and what only torch would run is left behind."""

import contextlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_decoders import W_DIM, Decoder, edited, example, load_fixture, made_fixture, module  # noqa: F401  (fixtures)

from dmat_ray.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (str(self.marker), "w")


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def graph_edit(edit: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        program = json.loads(content)
        edit(program)
        return json.dumps(program).encode()

    return change


def replaced(old: str, new: str) -> Callable[[str, bytes], bytes]:
    """The graph's JSON with a piece of text replaced everywhere."""
    return lambda name, content: content.replace(old.encode(), new.encode()) if name == "models/model.json" else content


def first_pickled(marker: Path) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name == "data/weights/model_weights_config.json":
            return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        return saved(Evil(marker)) if name == "data/weights/weight_0" else content

    return change


def in_spec(marker: Path) -> Callable[[str, bytes], bytes]:
    (marker.parent / "made_by_spec.py").write_text(f"open({str(marker)!r}, 'w')")
    context = json.dumps([{"__enum__": True, "fqn": "made_by_spec:x", "name": "y"}])
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
    return graph_edit(lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec))


def target(marker: Path) -> Callable[[str, bytes], bytes]:
    values = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 10}}
    arguments = [{"name": name, "arg": value, "kind": 1} for name, value in values.items()]
    operator = {"target": "torch.ops.aten.from_file.default", "inputs": arguments}
    return graph_edit(lambda p: p["graph_module"]["graph"]["nodes"][1].update(operator))


EVIL_EXPORTS: dict[str, tuple[Callable[[Path], Callable[[str, bytes], bytes]], str]] = {
    "weight": (first_pickled, "holds 'first.weight' as a pickled object, which is not loaded"),
    "expression": (lambda m: replaced("Symbol(", f"open('{m}', 'w') and Symbol("), "as expr_str in its graph"),
    "name": (lambda m: replaced('"w"', f"\"w=open('{m}', 'w')\""), "in its graph"),
    "spec": (in_spec, "is not a function of one tensor"),
    "operator": (target, r"uses 'torch\.ops\.aten\.from_file\.default'"),
    "function": (lambda m: replaced("torch.ops.aten.linear.default", "torch.os.system"), r"uses 'torch\.os\.system'"),
}


@pytest.mark.parametrize("what", EVIL_EXPORTS)
def test_exports_that_would_run_code_are_refused(
    made: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    marker = tmp_path / "marker"
    edit, message = EVIL_EXPORTS[what]
    path = edited(made(Decoder, "export"), tmp_path / "evil.pt2", edit(marker))
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    run_by_torch(path)
    assert marker.exists() or what == "function", "torch alone runs all but functions, which is why the graph is searched"


def run_by_torch(path: Path) -> None:
    """Load and call a program as torch does it, whatever comes of it."""
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(torch.zeros(2, W_DIM))


@pytest.mark.parametrize("what", ["sample inputs", "guards"])
def test_what_only_torch_would_run_is_left_behind(made: Any, load: Any, tmp_path: Path, what: str) -> None:
    """Every export carries sample inputs as a pickle; neither they nor the guards, which are Python, are needed."""
    marker = tmp_path / "marker"
    guards = graph_edit(lambda p: p.update(guards_code=[f"open({str(marker)!r}, 'w')"]))

    def samples(name: str, content: bytes) -> bytes:
        return saved(Evil(marker)) if name == "data/sample_inputs/model.pt" else content

    path = edited(made(Decoder, "export"), tmp_path / "evil.pt2", samples if what == "sample inputs" else guards)
    generator, w = load(path), example(count=4)
    torch.testing.assert_close(generator.synthesis(w[:, None]), module(Decoder)(w), atol=1e-6, rtol=0)
    assert not marker.exists()
    run_by_torch(path)
    assert marker.exists()


@pytest.mark.parametrize(
    "record",
    [
        "data/constants/opaque_obj_0",
        "data/constants/custom_obj_0",
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/aotinductor/model/model.so",
        "models/second.json",
        "data/weights/../../../x",
    ],
)
def test_exports_with_other_records_are_refused(made: Any, load: Any, tmp_path: Path, record: str) -> None:
    content = pickle.dumps(Evil(tmp_path / "marker"))
    path = edited(made(Decoder, "export"), tmp_path / "more.pt2", lambda name, old: old, **{record: content})
    with pytest.raises(UserError, match=f"holds '.*{re.escape(record)}', which is not code, graph or plain tensors"):
        load(path)
    assert not (tmp_path / "marker").exists()


def test_an_export_of_before_2_8_is_refused(load: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", saved(Evil(tmp_path / "marker")))
    with pytest.raises(UserError, match=r"export it again, with torch 2\.13"):
        load(tmp_path / "old.pt2")
    assert not (tmp_path / "marker").exists()
