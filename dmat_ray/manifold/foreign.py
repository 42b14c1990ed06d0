"""Generators out of other projects' checkpoints: which network a file holds, and ours with its weights.

`checkpoints` reads the file, `layouts` knows the names; here the network is found, and its tensors are checked and read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.formats import checkpoints, layouts_stylegan2
from dmat_ray.formats.layouts import Draft, Tensors, listed
from dmat_ray.formats.layouts_stylegan1 import stylegan1
from dmat_ray.formats.layouts_stylegan2 import RECORDED, Attributes
from dmat_ray.formats.stored import Module, RefusedError, Storage, Stored, TensorFlowNetwork, shown
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.validated import describe

KNOWN = (
    "StyleGAN 1 of InterFaceGAN, HiGAN and GenForce; StyleGAN 2 of rosinality's stylegan2-pytorch and of NVlabs' "
    "stylegan2-ada-pytorch, stylegan2-ada and stylegan2"
)
# where a file with several networks keeps the one to use, the averaged one first
PLACES = (
    ("g_ema",), ("generator_smooth",), ("models", "generator_smooth"), ("models", "generator"), ("generator",), ("g",),
    ("state_dict",),
)  # fmt: skip
AVERAGED = ("g_ema", "generator_smooth")
# names of tensors by which a layout is known: the first that any name matches
SIGNS = (
    (r"synthesis\.early_layer\.", "is a StyleGAN 2 of GenForce or HiGAN, which is not known; convert NVlabs' .pkl itself"),
    (r"synthesis\.(L\d+_|input\.)", "is a StyleGAN 3, which is not known"),
    (r"mapping\.dense\d+\.linear\.", "interfacegan"),
    (r"mapping\.dense\d+\.fc\.", "higan"),
    (r"mapping\.dense\d+\.(weight|bias)", "genforce"),
    (r"(convs\.\d+|conv1|to_rgb1)\.conv\.modulation\.", "rosinality"),
    (r"mapping\.fc\d+\.", "is only the tensors of an NVlabs network; give its .pkl, which records its settings too"),
    (r"final_linear\.|final_conv\.|input\d+\.weight|b4\.out\.|convs\.0\.0\.weight", "is a discriminator, not a generator"),
    (r"(layer0|output0)\.", "is a Progressive GAN, which has no W; StyleGAN 1 and 2 are known"),
)
FORMATS = {
    "interfacegan": "InterFaceGAN .pth (StyleGAN 1, the layout of the DMAT paper)",
    "higan": "HiGAN .pth (StyleGAN 1)",
    "genforce": "GenForce .pth (StyleGAN 1)",
    "rosinality": "rosinality stylegan2-pytorch .pt (StyleGAN 2)",
    "nvlabs": "NVlabs PyTorch .pkl (StyleGAN 2)",
    "tensorflow": "NVlabs TensorFlow .pkl (StyleGAN 2)",
}
# of a pickled network; its parts may be shared, so that a small file could claim very many
MAX_PARTS, MAX_DEPTH, MAX_NAME = 20_000, 16, 200
MAX_MESSAGE = 400  # letters


@dataclass(frozen=True)
class Imported:
    """A generator of ours with the weights of a checkpoint, and what there is to say about where they come from."""

    generator: StyleGAN1 | StyleGAN2
    format: str
    notes: list[str]


def _flatten(network: Any, prefix: str, tensors: Tensors, attributes: Attributes, depth: int = 0, seen: int = 0) -> int:
    """The tensors of a pickled PyTorch module by their state-dict names, and the plain attributes of its parts.

    Returns how many parts were looked at, which is `seen` more than its own.
    """
    if not isinstance(network, Module) or depth > MAX_DEPTH:
        raise UserError("holds a network that is not built of modules")
    state = network.state
    plain = {key: state[key] for key in RECORDED if isinstance(state.get(key, ()), str | int | float | None)}
    attributes[prefix.removesuffix(".")] = plain
    for kind in ("_parameters", "_buffers", "_modules"):
        children = state.get(kind)
        for name, child in children.items() if isinstance(children, dict) else ():
            seen = _one_more(seen)
            if not isinstance(name, str) or len(name) > MAX_NAME:
                raise UserError("holds a network whose parts have no names")
            if kind == "_modules" and child is not None:
                seen = _flatten(child, f"{prefix}{name}.", tensors, attributes, depth + 1, seen)
            elif isinstance(child, Stored):
                tensors[f"{prefix}{name}"] = child
    return seen


def _one_more(seen: int) -> int:
    if seen >= MAX_PARTS:
        raise UserError(f"holds a network of more than {MAX_PARTS} parts")
    return seen + 1


def _number(value: float) -> Stored:
    raw = torch.tensor([value]).numpy().tobytes()
    return Stored().place(Storage(torch.float32, 1, lambda begin, end: raw[begin:end]), 0, (), ())


def _variables(network: Any, prefix: str, tensors: Tensors, depth: int = 0, seen: int = 0) -> int:
    """The variables of a pickled TensorFlow network and its components, by their paths; returns as `_flatten`."""
    state = network.state if isinstance(network, TensorFlowNetwork) and hasattr(network, "state") else {}
    variables, components = state.get("variables"), state.get("components")
    if not isinstance(variables, list) or not isinstance(components, dict) or len(components) > 8 or depth > 2:
        raise UserError("holds a TensorFlow network without variables")
    for item in variables:
        seen = _one_more(seen)
        name, value = item if isinstance(item, tuple) and len(item) == 2 else (None, None)
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise UserError("holds a TensorFlow network whose variables have no names")
        if isinstance(value, int | float):  # single numbers come as such
            value = _number(float(value))
        if isinstance(value, Stored):
            tensors[f"{prefix}{name}"] = value
    for name, component in components.items():
        seen = _variables(component, f"{prefix}{shown(name)}/", tensors, depth + 1, seen)
    return seen


def _from_modules(network: Module) -> tuple[str, Tensors, Draft]:
    if "Discriminator" in network.class_name:
        raise UserError("is a discriminator, not a generator")
    tensors: Tensors = {}
    attributes: Attributes = {}
    _flatten(network, "", tensors, attributes)
    if any(re.match(r"synthesis\.(L\d+_|input\.)", name) for name in tensors):
        raise UserError("is a StyleGAN 3, which is not known")
    if not any(name.startswith("synthesis.b4.") for name in tensors):
        raise UserError(f"holds a network of class {shown(network.class_name)}, which is not known; known: {KNOWN}")
    return "nvlabs", tensors, layouts_stylegan2.nvlabs(tensors, attributes)


def _from_tensorflow(network: TensorFlowNetwork) -> tuple[str, Tensors, Draft]:
    tensors: Tensors = {}
    _variables(network, "", tensors)
    settings = network.state.get("static_kwargs")
    if any(re.match(r"(\d+x\d+/FromRGB|FromRGB_lod)", name) for name in tensors):
        raise UserError("is a discriminator, not a generator")
    return "tensorflow", tensors, layouts_stylegan2.tensorflow(tensors, settings if isinstance(settings, dict) else {})


def _from_state(tree: dict[Any, Any]) -> tuple[str, Tensors, Draft]:
    """A network out of a dict of tensors, or of several such dicts."""
    place: tuple[str, ...] = ()
    found = tree
    for place in (*PLACES, ()):
        found = tree
        for key in place:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if isinstance(found, dict) and any(isinstance(value, Stored) for value in found.values()):
            break
    tensors = {key if isinstance(key, str) else shown(key): value for key, value in found.items() if isinstance(value, Stored)}
    if tensors and all(name.startswith("module.") for name in tensors):  # written by DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    average = tensors.pop("latent_avg", tree.get("latent_avg"))
    layout = next((what for sign, what in SIGNS if any(re.match(sign, name) for name in tensors)), None)
    if layout is None and not tensors and any(key in tree for key in ("d", "discriminator", "D")):
        layout = "holds a discriminator and no generator"
    if layout is None:
        holds = f"its tensors are {listed(tensors)}" if tensors else f"it holds {listed(tree) or 'nothing'}"
        raise UserError(f"holds no known generator ({holds}); known: {KNOWN}")
    if layout not in FORMATS:
        raise UserError(layout)
    if layout == "rosinality":
        draft = layouts_stylegan2.rosinality(tensors, average if isinstance(average, Stored) else None)
    else:
        draft = stylegan1(tensors, layout)
    if place and place[-1] not in AVERAGED and place != ("state_dict",):
        draft.notes.append(f"the file has no averaged generator; '{'.'.join(place)}' is taken")
    return layout, tensors, draft


def _recognise(tree: Any) -> tuple[str, Tensors, Draft]:
    """The format, the tensors and the shape of the generator in a file's contents."""
    if isinstance(tree, tuple | list) and len(tree) == 3 and all(isinstance(part, TensorFlowNetwork) for part in tree):
        return _from_tensorflow(tree[2])  # (G, D, Gs), of which the last is the averaged one
    if isinstance(tree, TensorFlowNetwork):
        return _from_tensorflow(tree)
    if isinstance(tree, Module):
        return _from_modules(tree)
    if not isinstance(tree, dict):
        raise UserError(f"holds a {type(tree).__name__} and no generator; known: {KNOWN}")
    for key in ("G_ema", "G"):
        if isinstance(tree.get(key), Module):
            format_, tensors, draft = _from_modules(tree[key])
            if key == "G":
                draft.notes.append("the file has no averaged generator; 'G' is taken")
            return format_, tensors, draft
    if any(isinstance(value, Module) for value in tree.values()):
        raise UserError(f"holds no generator but {listed(tree)}; a generator is called G_ema or G")
    return _from_state(tree)


def _read(draft: Draft, tensors: Tensors, size: int) -> dict[str, Tensor]:
    """The tensors by our names, each of the shape that the architecture needs, and finite."""
    needed = {key: tuple(value.shape) for key, value in generators.blueprint(draft.kind, draft.architecture).items()}
    if sum(tensors[theirs].nbytes for theirs, _ in draft.rows.values()) > size:
        raise UserError("names more weights than it has bytes")
    state = dict(draft.random)
    for ours, (theirs, turn) in draft.rows.items():
        stored, name = tensors[theirs], shown(theirs)
        if not stored.dtype.is_floating_point:
            raise UserError(f"tensor '{name}' is of {stored.dtype}, not of floating-point numbers")
        value = stored.read().float()
        try:
            turned = turn(value).contiguous()
        except (RuntimeError, IndexError):  # not even the axes are there
            turned = value
        if tuple(turned.shape) != needed[ours]:
            raise UserError(
                f"tensor '{name}' has the shape {stored.shape}, which does not go with the other tensors "
                f"({needed[ours]} in our order of axes)"
            )
        if not bool(torch.isfinite(turned).all()):
            raise UserError(f"tensor '{name}' is not finite")
        state[ours] = turned
    return state


def import_checkpoint(path: Path) -> Imported:
    """The generator in a file of another project, in eval mode; `w_mean` is the file's where it has one.

    Raises UserError, in one line, for a file that cannot be read, holds no known generator, or whose tensors do not go
    together. Nothing in the file is executed (see `checkpoints`).
    """
    contents = checkpoints.read(path)
    try:
        layout, tensors, draft = _recognise(contents.tree)
        state = _read(draft, tensors, contents.size)
        generator = generators.build(draft.kind, draft.architecture)
        has_mean = "w_mean" in state
        generator.load_state_dict({"w_mean": generator.w_mean, "w_std": generator.w_std, **state})
        generator.eval().requires_grad_(False).measure_w(mean=not has_mean)
    except ValidationError as error:
        what = shown(describe(error), MAX_MESSAGE)
        raise UserError(f"checkpoint '{path}' holds a generator of a shape that is not known: {what}") from None
    except (UserError, RefusedError) as error:
        text = str(error)
        raise UserError(text if text.startswith("checkpoint '") else f"checkpoint '{path}': {text}") from None
    except Exception as error:  # sizes and numbers of a forged file can make torch and Python raise anything
        reason = f"{type(error).__name__}: {shown(str(error), 120)}"
        raise UserError(f"checkpoint '{path}' holds no generator that can be built ({reason})") from None
    notes = [*draft.notes, f"w_mean is {'that of the file' if has_mean else 'measured'}, w_std is measured"]
    return Imported(generator, FORMATS[layout], notes)
