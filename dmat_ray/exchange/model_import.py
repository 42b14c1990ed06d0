"""Classifiers by others as folders like those of trainings: a state dict of a network known by name, or a program.

State dicts are read without running anything (`formats.checkpoints`), programs are looked through first
(`formats.programs`), and whatever comes in is tried on images before it is written.
"""

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.config.training import of_levels
from dmat_ray.errors import UserError
from dmat_ray.formats import checkpoints
from dmat_ray.formats.layouts import listed
from dmat_ray.formats.programs import kind_of, load_and_pack, reason
from dmat_ray.formats.stored import RefusedError, Stored, shown
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers, wide_resnet
from dmat_ray.storage.files import sha256

Tensors = dict[str, Tensor | Stored]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

# keys under which training programs keep a state dict, averaged weights first
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model_state", "model", "net"),
    *("network", "classifier", "params", "weights"),
)
# what wrappers put before a network's own names: DataParallel, compile, and sequences of normalisation and network
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "1.", "0.")
NORMALISATION = re.compile(
    r"(?:(?:normali[sz]er?|normalization|normalize_layer|norm_layer|input_norm|preprocess)\.)?(?:new_)?(mean|std|mu|sigma)"
)
# counters that evaluation does not use, and the copy of the network that MadryLab's robustness keeps in its attacker
COUNTERS = re.compile(r"(?:.*\.)?(?:num_batches_tracked|n_averaged)|attacker\..*")
IDENTITY: Normalisation = ((0.0,), (1.0,))


@dataclass
class Imported:
    """A classifier in eval mode, what it was, and what there is to say about it; `program` is its file, if it is one."""

    network: classifiers.Classifier
    config: ClassifierConfig
    format: str
    notes: list[str] = field(default_factory=list)
    program: tuple[str, bytes] | None = None


def read_class_names(path: Path) -> tuple[str, ...]:
    """The names in a JSON list, in the order of the logits. Raises UserError for anything else."""
    try:
        names = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"--classes '{path}' is no file; give a JSON list of class names") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--classes '{path}' is no JSON: {error}") from None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f"--classes '{path}' must hold a list of two class names or more, in the order of the logits")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--classes '{path}' names the class '{twice}' twice")
    return tuple(names)


def _read(path: Path, notes: list[str]) -> tuple[str, Tensors]:
    """The format of a file, and the state dict in it."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:  # the length of its header
        try:
            return "safetensors", dict(load_file(path))
        except SafetensorError as error:
            raise UserError(f"checkpoint '{path}' is damaged: {shown(str(error), 200)}") from None
    tree = checkpoints.read(path).tree
    found, place = _state_dict(tree)
    if not found:
        holds = listed(tree) if isinstance(tree, Mapping) else "one tensor" if isinstance(tree, Stored) else shown(tree)
        raise UserError(f"checkpoint '{path}' holds no state dict, but {holds or 'nothing'}; save network.state_dict()")
    if place:
        notes.append(f"the weights are those under '{place}'")
    return "state dict of torch.save", found


def _state_dict(tree: Any, depth: int = 0) -> tuple[Tensors, str]:
    """The first state dict in the wrappers' order, and where it was; without any, the tensors of the tree itself."""
    if not isinstance(tree, dict):
        return {}, ""
    for key in WRAPPERS if depth < 2 else ():
        found, place = _state_dict(tree.get(key), depth + 1)
        if found:
            return found, f"{key}.{place}" if place else key
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Stored)}, ""


def _stripped(key: str, expected: Container[str]) -> str:
    """A name without what wrappers put before it."""
    while key not in expected:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            break
        key = key.removeprefix(prefix)
    return key


def _numbers(value: Tensor | Stored) -> Tensor:
    return value.read() if isinstance(value, Stored) else value


def _by_name(path: Path, tensors: Tensors, expected: Mapping[str, Tensor], others: Mapping[str, str]) -> dict[str, str]:
    """The network's name of a tensor -> its name in the file. `others` are what files of other code call it -> the network's."""
    names: dict[str, str] = {}
    if not any(theirs.endswith(wide_resnet.FIRST_OF_TRADES) for theirs in tensors):
        others = {}
    for theirs in tensors:
        ours = _stripped(theirs, others or expected)
        if others and ours.startswith(wide_resnet.UNUSED_BY_TRADES):
            continue
        ours = others.get(ours, ours)
        if ours in names and ours not in expected:
            ours = theirs  # no name of this network: what is missing will be said
        if ours in names and not COUNTERS.fullmatch(ours):
            raise UserError(f"checkpoint '{path}' holds '{shown(ours)}' twice: as {shown(names[ours])} and as {shown(theirs)}")
        names[ours] = theirs
    return names


def _normalisation(
    path: Path, tensors: Tensors, expected: Container[str], channels: int, notes: list[str]
) -> Normalisation | None:
    """What the file's own buffers say, which are given by their stripped names and taken out of `tensors`.

    Those that the network itself has, as `expected`, are its own.
    """
    found = {match[1]: key for key in tensors if key not in expected and (match := NORMALISATION.fullmatch(key))}
    for mean, std in (("mean", "std"), ("mu", "sigma")):
        if mean not in found or std not in found:
            continue
        values = []
        for key in (found[mean], found[std]):
            shape = tuple(tensors[key].shape)
            numbers = _numbers(tensors.pop(key)).float().flatten().tolist() if max(shape, default=1) <= 3 else []
            if len(numbers) not in (1, channels) or not all(map(_is_number, numbers)):
                raise UserError(f"checkpoint '{path}' normalises by '{key}' of shape {shape}, images have {channels} channel(s)")
            values.append(tuple(round(number, 7) for number in numbers))
        if min(values[1]) <= 0:
            raise UserError(f"checkpoint '{path}' normalises by '{found[std]}' of {shown(values[1])}, which must be above 0")
        notes.append(f"it normalises inside: mean {shown(values[0])} and std {shown(values[1])} are the file's own")
        if of_levels(*values):
            notes.append("they are of levels up to 255: divided by 255, for images in [0, 1]")
            values = [tuple(number / 255 for number in numbers) for numbers in values]
        return values[0], values[1]
    return None


def _is_number(value: float) -> bool:
    return abs(value) < float("inf")


def _require_match(
    path: Path, name: str, tensors: Tensors, names: Mapping[str, str], expected: Mapping[str, Tensor], num_classes: int
) -> None:
    """Raise UserError that says how the file's tensors differ from the network's."""
    shapes = {key: (tuple(tensors[key].shape), tuple(expected[key].shape)) for key in expected if key in tensors}
    for key, (found, wanted) in shapes.items():
        if found == wanted:
            continue
        if found[1:] == wanted[1:] and wanted[:1] == (num_classes,):
            raise UserError(
                f"checkpoint '{path}' knows {found[0]} classes ({shown(names[key])}), there are {num_classes} class names"
            )
        if len(found) == 4 and found[:1] + found[2:] == wanted[:1] + wanted[2:] and {found[1], wanted[1]} == {1, 3}:
            raise UserError(
                f"checkpoint '{path}' takes images of {found[1]} channel(s) ({shown(names[key])}), here they have {wanted[1]}"
            )
    missing = [key for key in expected if key not in tensors and not COUNTERS.fullmatch(key)]
    extra = [names[key] for key in tensors if key not in expected and not COUNTERS.fullmatch(key)]
    odd = [f"{key} {found} instead of {wanted}" for key, (found, wanted) in shapes.items() if found != wanted]
    wrong = [
        *([f"{len(missing)} of its {len(expected)} tensors are missing ({listed(missing)})"] if missing else []),
        *([f"{len(extra)} {'has' if len(extra) == 1 else 'have'} no place in it ({listed(extra)})"] if extra else []),
        *([f"{len(odd)} have another shape ({listed(odd)})"] if odd else []),
    ]
    if wrong:
        raise UserError(f"checkpoint '{path}' does not fit classifier.name '{name}': {'; '.join(wrong)}")


def _from_state(path: Path, config: ClassifierConfig, given: Normalisation | None, channels: int, num_classes: int) -> Imported:
    notes: list[str] = []
    format_, tensors = _read(path, notes)
    network = classifiers.build(config.model_copy(update={"mean": (0.0,), "std": (1.0,)}), channels, num_classes)
    expected = network.network.state_dict()
    names = _by_name(path, tensors, expected, wide_resnet.names_of_trades(network.network))
    ours: Tensors = {key: tensors[theirs] for key, theirs in names.items()}
    own = _normalisation(path, ours, expected, channels, notes)
    _require_match(path, config.name, ours, names, expected, num_classes)
    state = {}
    for key, value in expected.items():
        if key not in ours:  # a counter
            continue
        found = _numbers(ours[key])
        if found.dtype.is_floating_point != value.dtype.is_floating_point:
            raise UserError(f"checkpoint '{path}': {shown(names[key])} is of {found.dtype}, not of {value.dtype}")
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"checkpoint '{path}': {shown(names[key])} is not finite")
        state[key] = found.to(value.dtype)
    network.network.load_state_dict(state, strict=False)
    if own is not None and given is not None and own != given:
        notes.append("--classifier.mean and --classifier.std take their place")
    mean, std = given or own or IDENTITY
    if given is None and own is None:
        notes.append("no normalisation is beside the network and none was given: images go in as they are, in [0, 1]")
    config = config.model_copy(update={"mean": mean, "std": std})
    classifiers.require_normalisation(config, channels)
    return Imported(classifiers.Classifier(network.network, mean, std), config, format_, notes)


def _from_program(path: Path, given: Normalisation | None, channels: int) -> Imported:
    kind = kind_of(path)
    assert kind is not None
    program, packed = load_and_pack(path, kind, torch.device("cpu"))
    mean, std = given or IDENTITY
    config = ClassifierConfig(name=classifiers.PROGRAM, mean=mean, std=std)
    classifiers.require_normalisation(config, channels)
    network = classifiers.Classifier(classifiers.Program(program), mean, std)
    around = f"images go in normalised by mean {shown(mean)} and std {shown(std)}, besides what the program does inside"
    notes = [around if given else "images go in as they are, in [0, 1]"]
    return Imported(network, config, kind, notes, (kind, packed))


def read_model(
    path: Path, config: ClassifierConfig, given: Normalisation | None, channels: int, resolution: int, num_classes: int
) -> Imported:
    """The classifier in a file, tried on images of this shape. `given` is the normalisation that the user asks for.

    Without it a state dict's own buffers (normalize.mean, mu, ...) are used, or images go in as they are. Of a program,
    `config.name` is of no account. Raises UserError that names what was found; nothing in the file is executed but a
    program's arithmetic.
    """
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint '{path}'" if not path.exists() else f"checkpoint '{path}' is a folder; give a file"
        )
    try:
        is_program = kind_of(path) is not None
        found = _from_program(path, given, channels) if is_program else _from_state(path, config, given, channels, num_classes)
    except RefusedError as error:
        raise UserError(f"checkpoint '{path}' {error}; nothing in it was run") from None
    found.network.eval()
    try_out(found.network, str(path), channels, resolution, num_classes)
    return found


def try_out(network: torch.nn.Module, what: str, channels: int, resolution: int, num_classes: int) -> None:
    """Raise UserError unless the network makes one finite logit a class, of an image alone as among others, with a gradient."""
    shape = (channels, resolution, resolution)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    logits, alone = _logits(network, x, what), torch.cat([_logits(network, row, what) for row in x.split(1)])
    if logits.shape != (3, num_classes):
        found = f"{logits.shape[1]} classes" if logits.dim() == 2 else f"logits of shape {tuple(logits.shape)}"
        raise UserError(f"'{what}' puts out {found} for 3 images, there are {num_classes} class names")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"'{what}' puts out values that are not finite")
    if not torch.allclose(logits, alone, atol=classifiers.ROUNDING * float(logits.abs().max()), rtol=0):
        raise UserError(f"'{what}' sees an image otherwise alone than among others; call .eval() before saving or exporting it")
    x.requires_grad_(True)
    with torch.enable_grad():
        out = network(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradient = torch.autograd.grad((out * weights).sum(), x, allow_unused=True)[0] if out.requires_grad else None
    if gradient is None or not gradient.any() or not bool(torch.isfinite(gradient).all()):
        raise UserError(f"no finite gradient reaches the images through '{what}'; export it without no_grad, detach or rounding")


@torch.no_grad()
def _logits(network: torch.nn.Module, x: Tensor, what: str) -> Tensor:
    size = "x".join(map(str, x.shape[1:]))
    try:
        logits = network(x)
    except Exception as error:  # whatever a foreign network raises
        raise UserError(f"'{what}' fails on {len(x)} image(s) of {size} ({reason(error)}); is that its shape?") from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"'{what}' makes {found} of {len(x)} image(s) of {size}, not one logit a class")
    return logits


def save_model(
    found: Imported, path: Path, config: Config, class_names: tuple[str, ...], channels: int, resolution: int, folder: Path
) -> None:
    """Write what `read_model` found in `path` as a folder that `checkpoint.load_classifier` reads."""
    config = config.model_copy(update={"classifier": found.config})
    source = {"file": path.name, "sha256": sha256(path), "format": found.format, "notes": found.notes}
    about = checkpoint.describe_run(config, class_names, channels, resolution, None, None)
    run = {**about, "source": source, "finished": True, "history": []}
    if found.program is None:
        checkpoint.save(folder, found.network, run)
    else:
        kind, content = found.program
        checkpoint.save_program(folder, content, kind, found.network, run)
