"""StyleGAN 1 as InterFaceGAN, HiGAN and GenForce name its tensors (the DMAT paper's file is of the first layout).

Written from the names and shapes in their public code.
"""

import math
from dataclasses import dataclass

from dmat_ray.errors import UserError
from dmat_ray.formats.layouts import (
    Draft,
    Rows,
    Tensors,
    axis,
    check_filters,
    check_names,
    check_resolution,
    count,
    mapping,
    same,
    square,
    widths,
)
from dmat_ray.formats.stored import shown

HARMLESS = r"truncation\.truncation|synthesis\.lod|synthesis\.output\d+\.(conv\.)?(weight|bias)|synthesis\.\S*blur\.kernel"


@dataclass(frozen=True)
class StyleGAN1Names:
    """The endings by which the three projects differ."""

    dense: tuple[str, str]
    const: str
    conv: str
    fused: str
    style: tuple[str, str]
    epilogue: str
    image: str


STYLEGAN1 = {
    "interfacegan": StyleGAN1Names(
        ("linear.weight", "wscale.bias"), "first_layer", "conv.weight", "weight",
        ("epilogue.style_mod.dense.linear.weight", "epilogue.style_mod.dense.wscale.bias"), "epilogue.", "conv.weight",
    ),
    "higan": StyleGAN1Names(
        ("fc.weight", "wscale.bias"), "const", "conv.weight", "weight",
        ("epilogue.style_mod.dense.fc.weight", "epilogue.style_mod.dense.wscale.bias"), "epilogue.", "conv.weight",
    ),
    "genforce": StyleGAN1Names(
        ("weight", "bias"), "const", "weight", "weight", ("style.weight", "style.bias"), "", "weight",
    ),
}  # fmt: skip


def stylegan1(tensors: Tensors, project: str) -> Draft:
    """The layout of InterFaceGAN, HiGAN or GenForce."""
    if "mapping.label_weight" in tensors:
        raise UserError("is a class-conditional StyleGAN 1; only unconditional ones are known")
    names = STYLEGAN1[project]
    layers = count(tensors, r"synthesis\.layer(\d+)\.")
    resolutions = check_resolution(2 ** ((layers + 1) // 2 + 1))
    last, fused = len(resolutions) - 1, []
    dense = [f"mapping.dense{i}." for i in range(max(1, count(tensors, r"mapping\.dense(\d+)\.")))]
    rows: Rows = {"w_mean": ("truncation.w_avg", same)}
    for i, prefix in enumerate(dense):
        rows[f"map.layers.{i}.weight"] = (prefix + names.dense[0], same)
        # theirs is lrelu(sqrt(2) a + b), our shared mapping sqrt(2) lrelu(a + b), and lrelu is positively homogeneous
        rows[f"map.layers.{i}.bias"] = (prefix + names.dense[1], lambda b: b / math.sqrt(2.0))
    for k in range(2 * len(resolutions)):
        prefix, ours = f"synthesis.layer{k}.", "synth.first." if k == 0 else f"synth.layers.{k - 1}.epilogue."
        if k == 0:
            rows["synth.const"] = (prefix + names.const, same)
        elif project != "genforce" and prefix + names.fused in tensors and k % 2 == 0:
            fused.append(resolutions[k // 2])
            rows[f"synth.layers.{k - 1}.weight"] = (prefix + names.fused, lambda x: x.permute(3, 2, 0, 1))
        else:
            rows[f"synth.layers.{k - 1}.weight"] = (prefix + names.conv, same)
        rows[f"{ours}bias"] = (f"{prefix}{names.epilogue}bias", same)
        rows[f"{ours}noise_strength"] = (f"{prefix}{names.epilogue}apply_noise.weight", same)
        rows[f"{ours}noise"] = (f"{prefix}{names.epilogue}apply_noise.noise", square)
        rows[f"{ours}affine.weight"] = (prefix + names.style[0], same)
        rows[f"{ours}affine.bias"] = (prefix + names.style[1], same)
    rows["synth.image_weight"] = (f"synthesis.output{last}.{names.image}", same)
    rows["synth.image_bias"] = (f"synthesis.output{last}.bias", same)
    check_names(tensors, rows, HARMLESS, optional=("w_mean",))
    check_filters(tensors, r"synthesis\.\S*blur\.kernel", [1.0, 2.0, 1.0])
    lod = tensors.get("synthesis.lod")
    if lod is not None and (lod.numel != 1 or float(lod.read()) != 0):
        found = shown(lod.read().item()) if lod.numel == 1 else f"{lod.numel} numbers"
        raise UserError(f"is from the midst of progressive growing: synthesis.lod is {found}, not 0")
    notes = ["images of lower resolutions (synthesis.output*) are dropped"]
    if project == "genforce":
        fused = [r for r in resolutions if r >= 128]
        notes.append("GenForce's defaults are taken: fused scale from 128 on, no tanh at the end, learning rates equalised")
    if fused != resolutions[len(resolutions) - len(fused) :]:
        raise UserError(f"fuses upsampling and convolution at {fused} only; it must be from one resolution upwards")
    seconds = {r: axis(tensors, f"synthesis.layer{2 * i + 1}.{names.conv}", 0) for i, r in enumerate(resolutions)}
    architecture = {
        "resolution": resolutions[-1],
        "channels": axis(tensors, f"synthesis.output{last}.bias", 0),
        **mapping(tensors, [prefix + names.dense[0] for prefix in dense]),
        **widths(seconds),
        "fused_from": fused[0] if fused else 2 * resolutions[-1],
    }
    return Draft("stylegan1", architecture, rows, notes=notes)
