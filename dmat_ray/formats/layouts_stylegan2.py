"""StyleGAN 2 as rosinality's stylegan2-pytorch and NVlabs' PyTorch and TensorFlow code name its tensors.

Written from the names and shapes in their public code.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from dmat_ray.errors import UserError
from dmat_ray.formats.layouts import (
    Draft,
    Part,
    Rows,
    Tensors,
    axis,
    check_filters,
    check_names,
    check_resolution,
    count,
    number,
    same,
    square,
    widths,
)
from dmat_ray.formats.stored import Stored, shown

Attributes = dict[str, dict[str, Any]]  # of each part of a network, where a file records them
RECORDED = ("architecture", "activation", "bias_gain", "conv_clamp", "use_fp16")  # those that change its images


@dataclass(frozen=True)
class StyleGAN2Names:
    """Where one project keeps the parts of a StyleGAN 2: of each part of ours, their ending and what makes ours of it.

    `layer(k, r)` is the prefix of the k-th convolution, at resolution r; the noise buffers have names of their own.
    """

    dense: Callable[[int], str]
    layer: Callable[[int, int], str]
    image: Callable[[int, int], str]
    noise: Callable[[int, int], str]
    const: Part
    dense_parts: dict[str, Part]
    layer_parts: dict[str, Part]
    image_parts: dict[str, Part]
    upsampling_parts: dict[str, Part] = field(default_factory=dict)  # where layers that upsample differ


PLAIN: dict[str, Part] = {
    "conv.weight": (".weight", same), "conv.affine.weight": (".affine.weight", same), "conv.affine.bias": (".affine.bias", same),
    "bias": (".bias", same),
}  # fmt: skip


def _nvlabs_layer(k: int, r: int) -> str:
    return f"synthesis.b{r}.conv{1 if k == 0 else (k + 1) % 2}"


NVLABS = StyleGAN2Names(
    dense=lambda i: f"mapping.fc{i}",
    layer=_nvlabs_layer,
    image=lambda k, r: f"synthesis.b{r}.torgb",
    noise=lambda k, r: _nvlabs_layer(k, r) + ".noise_const",
    const=("synthesis.b4.const", lambda x: x[None]),
    dense_parts={"weight": (".weight", same), "bias": (".bias", same)},
    layer_parts={**PLAIN, "noise_strength": (".noise_strength", same)},
    image_parts=PLAIN,
)
ROSINALITY = StyleGAN2Names(
    dense=lambda i: f"style.{i + 1}",
    layer=lambda k, r: f"convs.{k - 1}" if k else "conv1",
    image=lambda k, r: f"to_rgbs.{k - 1}" if k else "to_rgb1",
    noise=lambda k, r: f"noises.noise_{k}",
    const=("input.input", same),
    dense_parts={"weight": (".weight", same), "bias": (".bias", same)},
    layer_parts={
        "conv.weight": (".conv.weight", lambda x: x.reshape(x.shape[1:])),
        "conv.affine.weight": (".conv.modulation.weight", same),
        "conv.affine.bias": (".conv.modulation.bias", same),
        "bias": (".activate.bias", same),
        "noise_strength": (".noise.weight", lambda x: x.reshape(())),
    },
    image_parts={
        "conv.weight": (".conv.weight", lambda x: x.reshape(x.shape[1:])),
        "conv.affine.weight": (".conv.modulation.weight", same),
        "conv.affine.bias": (".conv.modulation.bias", same),
        "bias": (".bias", lambda x: x.reshape(x.shape[1])),
    },
)
MODULATED: dict[str, Part] = {
    "conv.weight": ("/weight", lambda x: x.permute(3, 2, 0, 1)),
    "conv.affine.weight": ("/mod_weight", lambda x: x.mT),
    "conv.affine.bias": ("/mod_bias", lambda x: x + 1.0),
    "bias": ("/bias", same),
}
TENSORFLOW = StyleGAN2Names(
    dense=lambda i: f"mapping/Dense{i}",
    layer=lambda k, r: f"synthesis/{r}x{r}/" + ("Conv" if k == 0 else "Conv0_up" if k % 2 else "Conv1"),
    image=lambda k, r: f"synthesis/{r}x{r}/ToRGB",
    noise=lambda k, r: f"synthesis/noise{k}",
    const=("synthesis/4x4/Const/const", same),
    dense_parts={"weight": ("/weight", lambda x: x.mT), "bias": ("/bias", same)},
    layer_parts={**MODULATED, "noise_strength": ("/noise_strength", lambda x: x.reshape(()))},
    image_parts=MODULATED,
    # TensorFlow's layers that upsample mirror their kernels
    upsampling_parts={"conv.weight": ("/weight", lambda x: x.permute(3, 2, 0, 1).flip(2, 3))},
)


def stylegan2_rows(names: StyleGAN2Names, resolutions: list[int], dense: int, noise: bool) -> Rows:
    """Every tensor of a StyleGAN 2 but w_mean."""
    rows: Rows = {"synth.const": names.const}

    def put(ours: str, theirs: str, parts: dict[str, Part]) -> None:
        for part, (ending, turn) in parts.items():
            if part != "noise_strength" or noise:
                rows[f"{ours}.{part}"] = (theirs + ending, turn)

    for i in range(dense):
        put(f"map.layers.{i}", names.dense(i), names.dense_parts)
    for k, r in enumerate(resolutions):
        put(f"synth.images.{k}", names.image(k, r), names.image_parts)
    for k in range(2 * len(resolutions) - 1):
        r = resolutions[(k + 1) // 2]
        put(f"synth.convs.{k}", names.layer(k, r), names.layer_parts | (names.upsampling_parts if k % 2 else {}))
        if noise:
            rows[f"synth.convs.{k}.noise"] = (names.noise(k, r), square)
    return rows


def stylegan2_shape(tensors: Tensors, rows: Rows, resolutions: list[int], dense: int) -> dict[str, Any]:
    """Sizes of a StyleGAN 2 whose tensors are all there."""
    outputs = {r: axis(tensors, rows[f"synth.convs.{2 * i}.bias"][0], 0) for i, r in enumerate(resolutions)}
    first, last = (rows[f"map.layers.{i}.bias"][0] for i in (0, dense - 1))
    inner, w_dim = axis(tensors, first, 0), axis(tensors, last, 0)
    return {
        "resolution": resolutions[-1],
        "channels": math.prod(tensors[rows["synth.images.0.bias"][0]].shape),
        "w_dim": w_dim,
        "mapping_layers": dense,
        "mapping_width": inner if dense > 1 and inner != w_dim else None,
        **widths(outputs),
    }


def rosinality(tensors: Tensors, average: Stored | None, seed: int = 0) -> Draft:
    """The layout of stylegan2-pytorch; noise buffers, which old files lack, are drawn with `seed`."""
    if any(".iwt." in name for name in tensors):
        raise UserError("is a SWAGAN, whose layers are wavelets; only StyleGAN 2 is known")
    resolutions = check_resolution(2 ** ((count(tensors, r"convs\.(\d+)\.") + 1) // 2 + 2))
    dense = max(1, count(tensors, r"style\.(\d+)\.") - 1)
    rows = stylegan2_rows(ROSINALITY, resolutions, dense, noise=True)
    draft = Draft("stylegan2", {}, rows)
    if not any(name.startswith("noises.") for name in tensors):
        rng = torch.Generator().manual_seed(seed)
        for k in range(2 * len(resolutions) - 1):
            size = resolutions[(k + 1) // 2]
            del rows[f"synth.convs.{k}.noise"]
            draft.random[f"synth.convs.{k}.noise"] = torch.randn(size, size, generator=rng)
        draft.notes.append(f"the file has no noise buffers: they are drawn with seed {seed}")
    check_names(tensors, rows, r"\S+\.kernel")
    check_filters(tensors, r"\S+\.kernel", [1.0, 3.0, 3.0, 1.0])
    shape = stylegan2_shape(tensors, rows, resolutions, dense)
    draft.architecture = {**shape, "z_dim": axis(tensors, "style.1.weight", 1), "mapping_rate": 0.01, "noise": True}
    if average is not None and average.numel == shape["w_dim"]:
        tensors["latent_avg"] = average
        rows["w_mean"] = ("latent_avg", lambda x: x.reshape(-1))
    return draft


def _one(values: Iterable[Any], what: str, choices: tuple[Any, ...], default: Any) -> Any:
    """The one value that all parts of a network share. Raises UserError if they do not, or if it is not a known one."""
    found = list(dict.fromkeys(values)) or [default]
    if len(found) > 1 or (choices and found[0] not in choices):
        known = f"; known: {', '.join(map(str, choices))}" if choices else ""
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"has {what} {', '.join(shown(v) for v in found[:5])}{more}{known}")
    return found[0]


def nvlabs(tensors: Tensors, attributes: Attributes) -> Draft:
    """The layout of stylegan2-ada-pytorch; `attributes` are those that the pickle records of each part of the network."""

    def recorded(key: str, pattern: str = r"synthesis\..*") -> list[Any]:
        return [part[key] for name, part in attributes.items() if key in part and re.fullmatch(pattern, name)]

    _one(recorded("architecture"), "the architecture", ("skip",), "skip")
    _one(recorded("activation", r"mapping\.fc\d+|synthesis\.b\d+\.conv[01]"), "the activation", ("lrelu",), "lrelu")
    resolutions = check_resolution(count(tensors, r"synthesis\.b(\d+)\.") - 1)
    dense = max(1, count(tensors, r"mapping\.fc(\d+)\."))
    noise = any(name.endswith(".noise_const") for name in tensors)
    rows = stylegan2_rows(NVLABS, resolutions, dense, noise)
    rows["w_mean"] = ("mapping.w_avg", same)
    for part in ("weight", "bias"):
        rows[f"map.embed.{part}"] = (f"mapping.embed.{part}", same)
    if "mapping.embed.weight" not in tensors:
        del rows["map.embed.weight"], rows["map.embed.bias"]
    check_names(tensors, rows, r"synthesis\.\S*resample_filter", optional=("w_mean",))
    check_filters(tensors, r"synthesis\.\S*resample_filter", [1.0, 3.0, 3.0, 1.0])
    shape = stylegan2_shape(tensors, rows, resolutions, dense)
    classes = axis(tensors, "mapping.embed.weight", 1) if "map.embed.weight" in rows else 0
    notes = []
    if classes:
        notes.append(f"class-conditional: the class is the largest of the first {classes} coordinates of z")
    if half := sum(value is True for value in recorded("use_fp16")):
        notes.append(f"trained with half precision in {half} resolutions, run with single precision here")
    rate = "the mapping's learning rate"
    architecture = {
        **shape,
        "z_dim": axis(tensors, "mapping.fc0.weight", 1) - (shape["w_dim"] if classes else 0),
        "num_classes": classes,
        "mapping_rate": number(_one(recorded("bias_gain", r"mapping\.fc\d+"), rate, (), 0.01), rate),
        "noise": noise,
        "conv_clamp": number(_one(recorded("conv_clamp"), "different bounds of layers:", (), None), "conv_clamp"),
    }
    return Draft("stylegan2", architecture, rows, notes=notes)


# what the settings of a TensorFlow network must be, and those that do not change its images or that its tensors show
TENSORFLOW_FIXED: dict[str, tuple[Any, ...]] = {
    "label_size": (0,), "architecture": ("skip",), "mapping_nonlinearity": ("lrelu",), "nonlinearity": ("lrelu",),
    "resample_kernel": ([1, 3, 3, 1], (1, 3, 3, 1)), "normalize_latents": (True,), "fmap_decay": (1, 1.0),
}  # fmt: skip
TENSORFLOW_FREE = {
    "latent_size", "dlatent_size", "resolution", "num_channels", "mapping_layers", "label_fmaps", "mapping_fmaps",
    "mapping_lrmul", "w_avg_beta", "fmap_base", "fmap_max", "fmap_min", "num_fp16_res", "conv_clamp", "use_noise",
    "truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure", "dlatent_avg_beta", "fused_modconv", "func_name",
}  # fmt: skip


def tensorflow(tensors: Tensors, settings: dict[str, Any]) -> Draft:
    """The layout of the TensorFlow stylegan2 and stylegan2-ada; `settings` are the network's static_kwargs."""
    if any("/StyleMod/" in name for name in tensors):
        raise UserError("is a TensorFlow pickle of StyleGAN 1; convert it with InterFaceGAN's or HiGAN's code first")
    for key, value in settings.items():
        if key in TENSORFLOW_FIXED and value is not None and value not in TENSORFLOW_FIXED[key]:
            raise UserError(f"has {key} {shown(value)}; known: {TENSORFLOW_FIXED[key][0]}")
        if key not in TENSORFLOW_FIXED and key not in TENSORFLOW_FREE:
            raise UserError(f"has a setting that is not known: {shown(key)} {shown(value)}")
    if any(re.match(r"(synthesis/)?ToRGB_lod", name) or name.endswith("/Skip/weight") for name in tensors):
        raise UserError("has the architecture orig or resnet; known: skip")
    resolutions = check_resolution(count(tensors, r"synthesis/(\d+)x") - 1)
    dense = max(1, count(tensors, r"mapping/Dense(\d+)/"))
    noise = any(name.endswith("/noise_strength") for name in tensors)
    rows = stylegan2_rows(TENSORFLOW, resolutions, dense, noise)
    rows["w_mean"] = ("dlatent_avg", same)
    check_names(tensors, rows, r"lod|synthesis/lod|synthesis/noise\d+", optional=("w_mean",))
    rate, clamp = (number(settings.get(key), key) for key in ("mapping_lrmul", "conv_clamp"))
    architecture = {
        **stylegan2_shape(tensors, rows, resolutions, dense),
        "z_dim": axis(tensors, "mapping/Dense0/weight", 0),
        "mapping_rate": 0.01 if rate is None else rate,
        "noise": noise,
        "conv_clamp": clamp,
    }
    return Draft("stylegan2", architecture, rows)
