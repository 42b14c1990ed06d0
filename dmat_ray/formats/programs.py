"""Programs by others, read without running anything that is not arithmetic: TorchScript and torch.export files.

Loading such a file is not the harmless act that it looks like. In torch 2.13, before a program is ever called,

- `torch.jit.load` runs a scripted `__setstate__`, and evaluates the default values of function arguments; both may call
  operators that write files (`aten::save`, `aten::from_file`);
- `torch.export.load` unpickles the sample inputs, constants and tensor subclasses of the archive with `weights_only=False`
  (sample inputs if a first attempt without that fails), evaluates shape expressions with `sympify` (which is `eval`), writes
  names and guards into Python source that it executes, imports the modules that a tree spec names, and opens compiled
  libraries; the graph may call `aten::from_file` as well.

So neither gets the file itself. Its records are read with `zipfile`, looked through, and packed anew in memory: of a
TorchScript its code (refused if it so much as mentions one of those names), constants and weights; of an exported program
the raw weights and a copy of the graph in which every text is of a known form, without samples, guards and notes. After
loading, and before the first call, every operator of a TorchScript is held against the list of what is allowed. On the way the
devices that a program names become the one that it is loaded on.

This keeps a program from running Python and from touching files and processes. It is no sandbox against bugs of torch's own.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from dmat_ray.errors import UserError
from dmat_ray.formats.archives import check_zip
from dmat_ray.formats.opcodes import Budget
from dmat_ray.formats.sources import check_program
from dmat_ray.formats.stored import RefusedError, shown

Kind = Literal["torchscript", "torch_export"]
Records = dict[str, bytes]

# records by their names below the archive's own folder
TORCHSCRIPT = r"code/.*\.py|constants\.pkl|constants/\d+|data\.pkl|data/\d+|version|\.data/version|byteorder"
TORCH_EXPORT = (
    r"models/model\.json|data/weights/model_weights_config\.json|data/weights/weight_\d+|"
    r"data/constants/model_constants_config\.json|data/constants/tensor_\d+|archive_format|archive_version|"
    r"\.data/version|byteorder"
)
# left behind: source texts for error messages, sample inputs (pickled), files that the user added
UNUSED = r"code/.*\.debug_pkl|traced_inputs\.pkl|traced_inputs/\d+|data/sample_inputs/model\.pt|extra/.*|\.data/serialization_id"

MAX_CODE = 16 << 20  # bytes
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# aten operators that leave the realm of arithmetic: files, and switches of the whole process
FORBIDDEN = ("save", "from_file", "set_grad_enabled", "manual_seed", "seed", "_cufft_set_plan_cache_max_size")
# an identifier cannot be split or spelled in another way, so that these need no parser; `classes` are torch.classes, C++
SUSPECT = re.compile(rb"\b(?:__setstate__|classes|ops(?!\.(?:aten|prim)\.)|" + "|".join(FORBIDDEN).encode() + rb")\b")
PRIMS = {
    *("Constant", "ConstantChunk", "DictConstruct", "GetAttr", "If", "ListConstruct", "ListUnpack", "Loop", "NumToTensor"),
    *("RaiseException", "TupleConstruct", "TupleIndex", "TupleSlice", "TupleUnpack", "Uninitialized", "abs", "data"),
    *("device", "dtype", "isinstance", "layout", "max", "min", "rangelist", "requires_grad", "shape"),
    *("type", "unchecked_cast", "unchecked_unwrap_optional"),
}

# a device as TorchScript's code writes it; one within a string has backslashes before its quotation marks
DEVICE = re.compile(rb'\btorch\.device\("[a-z]+(?::\d+)?"\)')
# an attribute of a module that holds one, which lies among the pickled
PLACE = re.compile(rb"^  (\w+) : (?:Device|Optional\[Device\])$", re.MULTILINE)

# what the texts of an exported graph may look like, by their keys; any other text is a NAME
NAME = re.compile(r"(?!.*__\w+__)[\w.]*", re.ASCII)
VARIABLE = re.compile(r"(?!.*__\w+__)[A-Za-z_]\w*|", re.ASCII)
SYMBOL = r"Symbol\('[su]\d+'(?:, (?:positive|nonnegative|negative|integer|real)=(?:True|False))*\)"
FUNCTION = (
    r"(?:Integer|Rational|Add|Mul|Pow|Min|Max|FloorDiv|CeilDiv|CleanDiv|Mod|PythonMod|ModularIndexing|Identity|Equality|"
    r"Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not)(?=\()"
)
FORMS = {
    "name": VARIABLE,
    "as_name": VARIABLE,
    "forward_arg_names": VARIABLE,
    "expr_str": re.compile(rf"(?:{SYMBOL}|{FUNCTION}|true|false|[\d(), -])*"),
    "target": re.compile(
        rf"torch\.ops\.aten\.(?!__|(?:{'|'.join(FORBIDDEN)})\.)\w+\.(?!__)\w+|torch\.sym_(?:int|float|ite|max|min|not|sqrt)|"
        r"_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)|math\.trunc",
        re.ASCII,
    ),
    # arguments of operators, which see them as data
    "as_string": re.compile(r"(?s:.*)"),
    "as_strings": re.compile(r"(?s:.*)"),
    "as_float": re.compile(r"-?Infinity|NaN"),
    "as_floats": re.compile(r"-?Infinity|NaN"),
    "torch_version": re.compile(r"[\w.+<=]*", re.ASCII),
}
ONLY = "a program may use torch's built-in tensor operators only, without no_grad or autocast in it"
# keys for graphs inside graphs, functions as arguments, and C++ objects
REFUSED = ("as_graph", "as_operator", "as_custom_obj")
# torch's notes to itself; the guards are Python source
EMPTIED: dict[str, Any] = {"metadata": {}, "guards_code": [], "treespec_namedtuple_fields": {}}

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
ONE_ARGUMENT = {"type": "builtins.tuple", "context": "null", "children_spec": [LEAF]}
NO_KEYWORDS = {"type": "builtins.dict", "context": "[]", "children_spec": []}
IN_SPEC = [1, {"type": "builtins.tuple", "context": "null", "children_spec": [ONE_ARGUMENT, NO_KEYWORDS]}]
OUT_SPEC = [1, LEAF]


def kind_of(path: Path) -> Kind | None:
    """What the file's content says it is; None for anything else, such as a checkpoint of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            full = archive.namelist()
    except Exception:  # a damaged directory makes zipfile raise anything
        return None
    names = {name.partition("/")[2] for name in full}
    if "archive_format" in names or "serialized_exported_program.json" in full:
        return "torch_export"
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "torchscript"
    return None


def reason(error: BaseException) -> str:
    """One line of an exception of torch's; TorchScript puts its point last, everything else first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # (an export's deserialiser puts a traceback of its own into the message, whose point is last as well)
    wrapped = "TorchScript interpreter" in lines[0] or any(line.startswith("Traceback") for line in lines)
    return shown(lines[-1 if wrapped else 0], 300)


def _records(path: Path, wanted: str) -> Records:
    """The archive's records by name; raises UserError for a damaged file, or a record that has no place in a plain program."""
    records: Records = {}
    try:
        with zipfile.ZipFile(path) as archive:
            found = [(info, info.filename.partition("/")[2]) for info in archive.infolist()]
            found = [(info, name) for info, name in found if not re.fullmatch(UNUSED, name)]
            for info, name in found:
                if not re.fullmatch(wanted, name):
                    raise UserError(
                        f"'{path}' holds '{shown(info.filename)}', which is not code, graph or plain tensors: pickled objects "
                        "and compiled libraries are not loaded; export it again, with torch 2.13 and ordinary parameters"
                    )
            code = [info for info, name in found if name.startswith("code/")]  # torch compresses it
            if sum(info.file_size for info in code) > MAX_CODE or any(info.compress_type not in PACKINGS for info in code):
                raise RefusedError(f"holds more than {MAX_CODE >> 20} MiB of code, or packed in a way that torch does not know")
            check_zip([info for info, _ in found], path.stat().st_size, packed=lambda name: "/code/" in name)
            for info, name in found:
                if name in records:
                    raise RefusedError("holds two files of one name")
                with archive.open(info) as file:
                    records[name] = file.read(info.file_size)  # without a number it would unpack all there is
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"'{path}' {error}; export it again") from None
    except Exception as error:  # zipfile reports a damaged file by whatever it trips over first
        raise UserError(f"'{path}' is damaged ({reason(error)}); copy or export it again") from None
    return records


def _packed(records: Records) -> io.BytesIO:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"program/{name}", content)
    packed.seek(0)
    return packed


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _allowed(kind: str) -> bool:
    namespace, _, name = kind.partition("::")
    if namespace == "prim":
        return name in PRIMS or name.startswith("is_")
    return namespace == "aten" and name not in FORBIDDEN


def _checked_torchscript(path: Path) -> Records:
    records = _records(path, TORCHSCRIPT)
    budget = Budget(sum(map(len, records.values())))
    for name, content in records.items():
        try:
            check_program(name, content, budget)
        except RefusedError as error:
            raise UserError(f"'{path}' {error}: {shown(name)}; export it again") from None
        found = SUSPECT.search(content) if name.startswith("code/") else re.search(rb"torch\.classes", content)
        if found and name.endswith((".py", ".pkl")):
            raise UserError(
                f"'{path}' mentions '{found[0].decode()}' in {name}: a program that may touch files or run code while it is "
                "loaded is refused; rename or remove it and export again"
            )
    return records


def _load_torchscript(records: Records, path: Path, device: torch.device) -> nn.Module:
    # torch moves the tensors, and not what is said of devices: tracing writes the device of x.device down as that of its example
    said = f'torch.device("{device}")'.encode()
    moved = {name: DEVICE.sub(said, content) if name.startswith("code/") else content for name, content in records.items()}
    program: nn.Module = torch.jit.load(_packed(moved), map_location=device)
    code = [content for name, content in records.items() if name.startswith("code/")]
    names = {name.decode() for content in code for name in PLACE.findall(content)}
    for module in program.modules():
        for name in names:
            if isinstance(getattr(module, name, None), torch.device):
                setattr(module, name, device)
    # every call inlined: what cannot be (interfaces, forks) shows up as an operator that is not on the list
    if strange := sorted(kind for kind in {node.kind() for node in _nodes(program.inlined_graph)} if not _allowed(kind)):
        raise UserError(f"'{path}' uses {', '.join(strange)}; {ONLY}")
    return program.eval()


def _checked(value: Any, key: str, path: Path) -> Any:
    """A copy of a value of the graph's JSON, on the CPU and without notes; raises UserError for an unknown form of text."""
    if isinstance(value, list):
        return [_checked(item, key, path) for item in value]
    if isinstance(value, dict):
        if key in ("device", "as_device"):
            return {"type": "cpu", "index": None}
        if found := [name for name in REFUSED if name in value] or [key] * (key in FORMS):
            raise UserError(f"'{path}' has a strange '{found[0]}' in its graph; {ONLY}")
        copy = {name: EMPTIED[name] if name in EMPTIED else _checked(item, name, path) for name, item in value.items()}
        for name in copy:
            _checked(name, "", path)
        return copy
    if isinstance(value, str) and key not in ("in_spec", "out_spec") and not FORMS.get(key, NAME).fullmatch(value):
        what = f"uses {value[:80]!r}" if key == "target" else f"has {value[:80]!r} as {shown(key) or 'a name'} in its graph"
        raise UserError(f"'{path}' {what}; {ONLY}")
    return value


def _checked_graph(content: bytes, path: Path) -> bytes:
    program = json.loads(content)
    # the first entry describes the whole; the rest is for splitting the graph into modules again
    calls = program["graph_module"]["module_call_graph"] = program["graph_module"]["module_call_graph"][:1]
    signature = calls[0]["signature"]
    if (json.loads(signature["in_spec"]), json.loads(signature["out_spec"])) != (IN_SPEC, OUT_SPEC):
        raise UserError(
            f"'{path}' is not a function of one tensor that returns one tensor; export a decoder w -> image, or x -> logits"
        )
    return json.dumps(_checked(program, "", path)).encode()


def _checked_payload(content: bytes, path: Path) -> bytes:
    config = {_checked(name, "", path): _checked(entry, "", path) for name, entry in json.loads(content)["config"].items()}
    for name, entry in config.items():
        if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
            raise UserError(f"'{path}' holds '{name}' as a pickled object, which is not loaded; export with ordinary parameters")
    return json.dumps({"config": config}).encode()


def _checked_torch_export(path: Path) -> Records:
    records = _records(path, TORCH_EXPORT)
    for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        records[name] = _checked_payload(records[name], path)
    records["models/model.json"] = _checked_graph(records["models/model.json"], path)
    # without sample inputs there is nothing to unpickle, and the shapes are checked by the graph's own metadata
    return {**records, "data/sample_inputs/model.pt": b""}


def _load_torch_export(records: Records, path: Path, device: torch.device) -> nn.Module:
    exported = torch.export.load(_packed(records))
    return (exported if device.type == "cpu" else move_to_device_pass(exported, device)).module()


# by kind: what looks a file through, and what makes a program of the records that are left
KINDS: dict[str, tuple[Callable[[Path], Records], Callable[[Records, Path, torch.device], nn.Module]]] = {
    "torchscript": (_checked_torchscript, _load_torchscript),
    "torch_export": (_checked_torch_export, _load_torch_export),
}


def load_program(path: Path, kind: Kind, device: torch.device) -> nn.Module:
    """The program on `device`, with frozen parameters.

    Call it like a function; an exported one has no eval() or train(). Raises UserError, naming the file, for one that is
    damaged, of another kind, or that could do more than arithmetic on tensors (see above).
    """
    return _load(path, kind, device)[0]


def load_and_pack(path: Path, kind: Kind, device: torch.device) -> tuple[nn.Module, bytes]:
    """`load_program`, and a file to keep in place of this one: all that is in it was looked through."""
    program, records = _load(path, kind, device)
    return program, _packed(records).getvalue()


def _load(path: Path, kind: Kind, device: torch.device) -> tuple[nn.Module, Records]:
    if kind_of(path) != kind:
        found = kind_of(path) or "damaged, or neither a TorchScript nor a torch.export file"
        raise UserError(f"'{path}' should be {kind}, but it is {found}; copy or export it again")
    check, load = KINDS[kind]
    try:
        records = check(path)
        program = load(records, path, device)
    except UserError:
        raise
    except Exception as error:  # torch reports a damaged program by whatever it trips over first
        raise UserError(f"torch {torch.__version__} cannot load '{path}' ({reason(error)}); export it again") from None
    for parameter in program.parameters():
        parameter.requires_grad_(False)
    return program, records
