"""Generators of others as random tensors, by the names that each project's code gives them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from foreign_files import EasyDict, Network, torch_saved
from torch import Tensor

from dmat_ray.manifold import foreign

State = dict[str, Tensor]
TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0, mapping: str = "mapping|style") -> State:
    """Random values for everything; the mapping's are as large as its learning rate of 0.01 makes them in training."""
    rng = torch.Generator().manual_seed(seed)
    large = tuple(mapping.split("|"))
    return {
        name: torch.randn(shape, generator=rng) * (100.0 if name.startswith(large) and "w_avg" not in name else 1.0)
        for name, shape in shapes.items()
    }


def normalised(z: Tensor) -> Tensor:
    return z / (z.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


# resolution -> feature channels: min(128 // resolution, 12)
WIDTHS = {4: 12, 8: 12, 16: 8, 32: 4, 64: 2, 128: 1}
Z, HIDDEN, W = 10, 14, 12


def stylegan1_shapes(project: str, resolution: int, fused_from: int, layers: int = 3) -> dict[str, tuple[int, ...]]:
    dense = {"interfacegan": "linear.weight", "higan": "fc.weight", "genforce": "weight"}[project]
    biased, epilogue = ("bias", "") if project == "genforce" else ("wscale.bias", "epilogue.")
    style = "style." if project == "genforce" else "epilogue.style_mod.dense."
    conv = "weight" if project == "genforce" else "conv.weight"
    sizes = [Z, *[HIDDEN] * (layers - 1), W]
    shapes: dict[str, tuple[int, ...]] = {"truncation.w_avg": (W,), "synthesis.lod": ()}
    for i in range(layers):
        shapes[f"mapping.dense{i}.{dense}"] = (sizes[i + 1], sizes[i])
        shapes[f"mapping.dense{i}.{biased}"] = (sizes[i + 1],)
    for i, r in enumerate(r for r in WIDTHS if r <= resolution):
        c = WIDTHS[r]
        for k in (2 * i, 2 * i + 1):
            layer = f"synthesis.layer{k}."
            inputs = WIDTHS[r // 2] if k % 2 == 0 and r > 4 else c
            if k == 0:
                shapes[layer + ("first_layer" if project == "interfacegan" else "const")] = (1, c, 4, 4)
            elif k % 2 == 0 and r >= fused_from and project != "genforce":
                shapes[layer + "weight"] = (3, 3, inputs, c)
            else:
                shapes[layer + conv] = (c, inputs, 3, 3)
            shapes[f"{layer}{epilogue}bias"] = (c,)
            shapes[f"{layer}{epilogue}apply_noise.weight"] = (c,)
            shapes[f"{layer}{epilogue}apply_noise.noise"] = (1, 1, r, r)
            shapes[f"{layer}{style}{dense}"] = (2 * c, W)
            shapes[f"{layer}{style}{biased}"] = (2 * c,)
        shapes[f"synthesis.output{i}.{conv}"] = (3, c, 1, 1)
        shapes[f"synthesis.output{i}.bias"] = (3,)
    return shapes


def stylegan1_state(project: str, resolution: int, fused_from: int = 128, layers: int = 3) -> State:
    state = random_tensors(stylegan1_shapes(project, resolution, fused_from, layers))
    blur = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    state["synthesis.lod"] = torch.zeros(())
    state["synthesis.layer2.blur.kernel"] = blur.expand(WIDTHS[8], 1, 3, 3).clone()
    if project == "higan":
        state["truncation.truncation"] = torch.ones(1, 2, 1)
    return state


def double(state: State) -> State:
    return {name: value.double() for name, value in state.items()}


def check(imported: foreign.Imported, mapping: Callable[[Tensor], Tensor], synthesis: Callable[[Tensor], Tensor]) -> None:
    """The same W from z, and the same images from W+, in float64."""
    generator = imported.generator.double()
    rng = torch.Generator().manual_seed(9)
    z = torch.randn(3, generator.z_dim, generator=rng, dtype=torch.float64)
    w = torch.randn(2, generator.num_ws, generator.w_dim, generator=rng, dtype=torch.float64)
    expected = mapping(z)
    assert expected.std() > 0.05
    torch.testing.assert_close(generator.mapping(z)[:, 0], expected, atol=1e-6, rtol=1e-5)
    expected = synthesis(w)
    assert expected.std() > 0.1
    torch.testing.assert_close(generator.synth(w), expected, atol=1e-6, rtol=1e-5)


def rosinality_state(size: int = 32, style_dim: int = W, dense: int = 3) -> State:
    shapes: dict[str, tuple[int, ...]] = {"input.input": (1, WIDTHS[4], 4, 4)}
    for i in range(dense):
        shapes[f"style.{i + 1}.weight"] = (style_dim, style_dim)
        shapes[f"style.{i + 1}.bias"] = (style_dim,)

    def put(prefix: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{prefix}.conv.weight"] = (1, outputs, inputs, kernel, kernel)
        shapes[f"{prefix}.conv.modulation.weight"] = (inputs, style_dim)
        shapes[f"{prefix}.conv.modulation.bias"] = (inputs,)
        if kernel == 3:
            shapes[f"{prefix}.noise.weight"] = (1,)
            shapes[f"{prefix}.activate.bias"] = (outputs,)
        else:
            shapes[f"{prefix}.bias"] = (1, outputs, 1, 1)

    resolutions = [r for r in WIDTHS if r <= size]
    for i, r in enumerate(resolutions):
        c = WIDTHS[r]
        if i:
            put(f"convs.{2 * i - 2}", WIDTHS[r // 2], c, 3)
        put(f"convs.{2 * i - 1}" if i else "conv1", c, c, 3)
        put(f"to_rgbs.{i - 1}" if i else "to_rgb1", c, 3, 1)
    for k in range(2 * len(resolutions) - 1):
        r = resolutions[(k + 1) // 2]
        shapes[f"noises.noise_{k}"] = (1, 1, r, r)
    state = random_tensors(shapes)
    kernel = torch.from_numpy(np.outer(TAPS, TAPS)).float() * 4
    return state | {"convs.0.conv.blur.kernel": kernel, "to_rgbs.0.upsample.kernel": kernel}


def nvlabs_state(classes: int = 0, noise: bool = True, size: int = 32) -> State:
    sizes = [Z + (W if classes else 0), HIDDEN, W]
    shapes: dict[str, tuple[int, ...]] = {"mapping.w_avg": (W,), "synthesis.b4.const": (WIDTHS[4], 4, 4)}
    for i in range(2):
        shapes[f"mapping.fc{i}.weight"], shapes[f"mapping.fc{i}.bias"] = (sizes[i + 1], sizes[i]), (sizes[i + 1],)
    if classes:
        shapes["mapping.embed.weight"], shapes["mapping.embed.bias"] = (W, classes), (W,)
    for r, c in WIDTHS.items():
        layers = {"conv0": (WIDTHS.get(r // 2, 0), c, 3), "conv1": (c, c, 3), "torgb": (c, 3, 1)}
        for name, (inputs, outputs, kernel) in layers.items():
            if r > size or (r == 4 and name == "conv0"):
                continue
            prefix = f"synthesis.b{r}.{name}."
            shapes |= {prefix + "weight": (outputs, inputs, kernel, kernel), prefix + "bias": (outputs,)}
            shapes |= {prefix + "affine.weight": (inputs, W), prefix + "affine.bias": (inputs,)}
            if kernel == 3 and noise:
                shapes |= {prefix + "noise_const": (r, r), prefix + "noise_strength": ()}
    state = random_tensors(shapes, mapping="mapping.fc")
    filters = torch.from_numpy(np.outer(TAPS, TAPS)).float()
    return state | {f"synthesis.b{r}.resample_filter": filters for r in WIDTHS if r <= size}


def nvlabs_attributes(clamp: float | None = None, rate: float = 0.01, **more: Any) -> dict[str, dict[str, Any]]:
    attributes: dict[str, dict[str, Any]] = {}
    for i in range(2):
        attributes[f"mapping.fc{i}"] = {"activation": "lrelu", "bias_gain": rate}
    for r in (4, 8, 16, 32):
        attributes[f"synthesis.b{r}"] = {"architecture": "skip", "use_fp16": r > 16}
        for name in ("conv0", "conv1"):
            if r > 4 or name == "conv1":
                attributes[f"synthesis.b{r}.{name}"] = {"activation": "lrelu", "conv_clamp": clamp, "use_noise": True}
        attributes[f"synthesis.b{r}.torgb"] = {"conv_clamp": clamp}
    for name, values in more.items():
        attributes.setdefault(name.replace("__", "."), {}).update(values)
    return attributes


def tensorflow_networks(state: State, **settings: Any) -> tuple[Network, ...]:
    """The tensors of an NVlabs network as TensorFlow keeps them: axes (height, width, in, out), biases of styles less 1."""
    mapping, synthesis = [], []
    for name, value in state.items():
        part = name.split(".")[-1]
        array = value.numpy()
        if name.startswith("mapping.fc"):
            mapping.append((f"Dense{name[10]}/{part}", array.T))
        elif name == "synthesis.b4.const":
            synthesis.append(("4x4/Const/const", array[None]))
        elif ".conv" in name or ".torgb" in name:
            r, layer = int(name.split(".")[1][1:]), name.split(".")[2]
            k = 0 if r == 4 else 2 * int(np.log2(r)) - (5 if layer == "conv0" else 4)
            path = f"{r}x{r}/" + {"conv0": "Conv0_up", "conv1": "Conv" if r == 4 else "Conv1", "torgb": "ToRGB"}[layer]
            if name.endswith("affine.weight"):
                synthesis.append((f"{path}/mod_weight", array.T))
            elif name.endswith("affine.bias"):
                synthesis.append((f"{path}/mod_bias", array - 1))
            elif part == "noise_const":
                synthesis.append((f"noise{k}", array[None, None]))
            elif part == "weight":
                array = array.transpose(2, 3, 1, 0)
                synthesis.append((f"{path}/weight", array[::-1, ::-1] if layer == "conv0" else array))
            else:
                synthesis.append((f"{path}/{part}", array if array.ndim else np.float32(array)))
    components = {
        "mapping": Network(version=4, build_module_src="raise SystemExit", variables=mapping, components={}),
        "synthesis": Network(version=4, build_module_src="raise SystemExit", variables=synthesis, components={}),
    }
    settings = {"resolution": 32, "num_channels": 3, "label_size": 0, "mapping_fmaps": HIDDEN, **settings}
    variables = [("lod", np.float32(0)), ("dlatent_avg", state["mapping.w_avg"].numpy())]
    whole = Network(version=4, static_kwargs=EasyDict(settings), variables=variables, components=components)
    return Network(version=4, variables=[], components={}), Network(version=4, variables=[], components={}), whole


def changed(state: State, **changes: Any) -> State:
    """The state with tensors added, replaced, or (None) taken away; '__' stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | changes).items() if value is not None}


def ros(**changes: Any) -> bytes:
    return torch_saved({"g_ema": changed(rosinality_state(), **changes)})
