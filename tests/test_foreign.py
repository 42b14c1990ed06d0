"""Imported generators against slow forward passes that read the foreign tensors themselves.

The slow ones are written from the papers (arXiv 1812.04948 and 1912.04958): one kernel for each example, explicit
zeros, scipy's filters. They know nothing of ours.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from foreign_files import Call, EasyDict, Network, modules_of, nvlabs_pickle, shared_lists, torch_saved, write
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.manifold.formats import foreign
from dmat_ray.manifold.formats.layouts import widths

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


# ---- StyleGAN 1: three layouts --------------------------------------------------------------------------------------

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


def slow_mapping1(state: State, z: Tensor, layers: int = 3) -> Tensor:
    x = normalised(z)
    for i in range(layers):
        weight = next(v for k, v in state.items() if k.startswith(f"mapping.dense{i}.") and k.endswith("weight"))
        bias = next(v for k, v in state.items() if k.startswith(f"mapping.dense{i}.") and k.endswith("bias"))
        # equalised learning rate: He's constant sqrt(2 / fan in), both times the learning rate
        x = F.leaky_relu(x @ (weight * 0.01 * (2 / weight.shape[1]) ** 0.5).T + bias * 0.01, 0.2)
    return x


def convolve(x: Tensor, taps: np.ndarray) -> Tensor:
    """Each channel with a fixed filter, zeros outside, the size kept."""
    return torch.from_numpy(np.stack([[scipy.signal.convolve2d(c, taps, mode="same") for c in image] for image in x.numpy()]))


def slow_stylegan1(state: State, w: Tensor, resolution: int, fused_from: int) -> Tensor:
    """AdaIN after each noisy layer; upsampling by doubled pixels, a convolution and a blur."""
    blur = np.outer([1, 2, 1], [1, 2, 1]) / 16

    def part(k: int, *endings: str) -> Tensor:
        return next(state[f"synthesis.layer{k}.{e}"] for e in endings if f"synthesis.layer{k}.{e}" in state)

    x = part(0, "first_layer", "const").expand(len(w), -1, -1, -1)
    for k in range(w.shape[1]):
        r = 2 ** (k // 2 + 2)
        if k > 0:
            fused = k % 2 == 0 and r >= fused_from
            kernel = part(k, "conv.weight", "weight")
            if fused and kernel.shape[:2] == (3, 3) and kernel.shape[2] == x.shape[1]:
                kernel = kernel.permute(3, 2, 0, 1)
            kernel = kernel * (2 / (9 * kernel.shape[1])) ** 0.5
            if k % 2 == 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            if fused:  # a transposed convolution mirrors the kernel of what would be a correlation
                kernel = kernel.flip(2, 3)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel)
            if k % 2 == 0:
                x = convolve(x, blur)
        noise = part(k, "epilogue.apply_noise.noise", "apply_noise.noise")
        x = x + noise * part(k, "epilogue.apply_noise.weight", "apply_noise.weight").reshape(1, -1, 1, 1)
        x = F.leaky_relu(x + part(k, "epilogue.bias", "bias").reshape(1, -1, 1, 1), 0.2)
        mean, variance = x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), keepdim=True, unbiased=False)
        dense = "epilogue.style_mod.dense."
        weight = part(k, dense + "linear.weight", dense + "fc.weight", "style.weight")
        style = w[:, k] @ (weight / weight.shape[1] ** 0.5).T + part(k, dense + "wscale.bias", "style.bias")
        scale, shift = style.reshape(len(w), 2, -1, 1, 1).unbind(1)
        x = (x - mean) / (variance + 1e-8).sqrt() * (1 + scale) + shift
    last = f"synthesis.output{w.shape[1] // 2 - 1}."
    weight = state.get(last + "conv.weight", state.get(last + "weight"))
    return F.conv2d(x, weight / weight.shape[1] ** 0.5) + state[last + "bias"].reshape(1, -1, 1, 1)


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


@pytest.mark.parametrize("project", ["interfacegan", "higan", "genforce"])
@pytest.mark.parametrize(("resolution", "fused_from"), [(16, 128), (16, 16), (16, 8), (128, 128)])
def test_stylegan1(tmp_path: Path, project: str, resolution: int, fused_from: int) -> None:
    state = stylegan1_state(project, resolution, fused_from)
    tree: Any = state
    if project == "genforce":
        fused_from = 128  # its keys do not say, its default does
        tree = {"models": {"generator": {k: v + 1 for k, v in state.items()}, "generator_smooth": state}, "iter": 3}
    imported = foreign.import_checkpoint(write(tmp_path, torch_saved(tree, zipped=resolution == 16)))
    exact = double(state)
    check(imported, lambda z: slow_mapping1(exact, z), lambda w: slow_stylegan1(exact, w, resolution, fused_from))
    assert torch.equal(imported.generator.w_mean.float(), state["truncation.w_avg"])
    config = imported.generator.config
    assert (config.z_dim, config.mapping_width, config.w_dim, config.mapping_layers) == (Z, HIDDEN, W, 3)
    assert project in imported.format.lower()


def test_the_statistics_that_a_file_lacks_are_measured(tmp_path: Path) -> None:
    state = stylegan1_state("higan", 16)
    del state["truncation.w_avg"]
    imported = foreign.import_checkpoint(write(tmp_path, torch_saved({f"module.{k}": v for k, v in state.items()})))
    w = slow_mapping1(double(state), torch.randn(20_000, Z, dtype=torch.float64))
    deviation = w.std(dim=0)
    assert ((imported.generator.w_mean - w.mean(dim=0)).abs() < 0.1 * deviation).all()
    assert ((imported.generator.w_std - deviation).abs() < 0.1 * deviation).all()
    assert "w_mean is measured" in imported.notes[-1]


# ---- StyleGAN 2: three layouts --------------------------------------------------------------------------------------


def upfirdn(x: Tensor, taps: np.ndarray, up: int = 1) -> Tensor:
    y = x.numpy()
    for axis in (2, 3):
        y = scipy.signal.upfirdn(taps, y, up, axis=axis)
    return torch.from_numpy(y)


def slow_convolution(x: Tensor, w: Tensor, kernel: Tensor, affine: tuple[Tensor, Tensor], up: bool, demodulate: bool) -> Tensor:
    """Equations 1 and 3 with one kernel for each example; upsampling inserts zeros, convolves and filters."""
    style = w @ (affine[0] / affine[0].shape[1] ** 0.5).T + affine[1]
    images = []
    for i in range(len(x)):
        weight = kernel / kernel[0].numel() ** 0.5 * style[i].reshape(1, -1, 1, 1)
        if demodulate:
            weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            spread = torch.zeros(1, x.shape[1], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1, dtype=x.dtype)
            spread[:, :, ::2, ::2] = x[i]
            full = F.conv2d(F.pad(spread, (2, 2, 2, 2)), weight.flip(2, 3))
            images.append(upfirdn(full, 2 * TAPS)[:, :, 2:-2, 2:-2])
        else:
            edge = kernel.shape[-1] // 2
            images.append(F.conv2d(F.pad(x[i : i + 1], (edge,) * 4), weight))
    return torch.cat(images)


Layer = dict[str, Tensor]


def slow_stylegan2(w: Tensor, const: Tensor, layers: list[Layer], images: list[Layer], clamp: float = 1e9) -> Tensor:
    """Skip generator: `layers` and `images` hold kernel, affine_weight, affine_bias, bias, and noise times strength."""
    x = const.reshape(1, *const.shape[-3:]).expand(len(w), -1, -1, -1)
    picture = torch.zeros(1, dtype=w.dtype)
    for k, layer in enumerate(layers):
        affine = layer["affine_weight"], layer["affine_bias"]
        x = slow_convolution(x, w[:, k], layer["kernel"], affine, up=k % 2 == 1, demodulate=True) + layer["noise"]
        x = (F.leaky_relu(x + layer["bias"].reshape(1, -1, 1, 1), 0.2) * 2**0.5).clamp(-clamp, clamp)
        if k % 2 == 0:
            to_image = images[k // 2]
            affine = to_image["affine_weight"], to_image["affine_bias"]
            y = slow_convolution(x, w[:, k + 1], to_image["kernel"], affine, up=False, demodulate=False)
            y = (y + to_image["bias"].reshape(1, -1, 1, 1)).clamp(-clamp, clamp)
            size = picture.shape[-1] if k else 0
            picture = upfirdn(picture, 2 * TAPS, up=2)[:, :, 1 : 2 * size + 1, 1 : 2 * size + 1] + y if k else y
    return picture


def slow_mapping2(z: Tensor, dense: list[tuple[Tensor, Tensor]], rate: float = 0.01) -> Tensor:
    for weight, bias in dense:
        z = F.leaky_relu(z @ (weight * rate / weight.shape[1] ** 0.5).T + bias * rate, 0.2) * 2**0.5
    return z


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


def rosinality_slow(state: State, w: Tensor) -> Tensor:
    state = double(state)
    count = w.shape[1] - 1

    def parts(prefix: str, bias: str, noise: Tensor) -> Layer:
        return {
            "kernel": state[f"{prefix}.conv.weight"][0], "affine_weight": state[f"{prefix}.conv.modulation.weight"],
            "affine_bias": state[f"{prefix}.conv.modulation.bias"], "bias": state[prefix + bias].flatten(), "noise": noise,
        }  # fmt: skip

    none = torch.zeros(())
    names = ["conv1", *(f"convs.{k}" for k in range(count - 1))]
    layers = [
        parts(name, ".activate.bias", state[f"{name}.noise.weight"] * state[f"noises.noise_{k}"]) for k, name in enumerate(names)
    ]
    images = [parts(name, ".bias", none) for name in ["to_rgb1", *(f"to_rgbs.{k}" for k in range(count // 2))]]
    return slow_stylegan2(w, state["input.input"], layers, images)


@pytest.mark.parametrize("training", [False, True])
def test_rosinality(tmp_path: Path, training: bool) -> None:
    state = rosinality_state()
    average = torch.randn(W)
    tree: dict[str, Any] = {"g_ema": state, "latent_avg": average}
    if training:
        adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
        tree = {
            "g": {k: v + 1 for k, v in state.items()}, "d": {"final_linear.0.weight": torch.randn(2)}, "g_ema": state,
            "g_optim": adam, "d_optim": adam, "args": argparse.Namespace(size=32), "ada_aug_p": 0.0,
        }  # fmt: skip
    imported = foreign.import_checkpoint(write(tmp_path, torch_saved(tree)))
    exact = double(state)
    dense = [(exact[f"style.{i}.weight"], exact[f"style.{i}.bias"]) for i in (1, 2, 3)]
    check(imported, lambda z: slow_mapping2(normalised(z), dense), lambda w: rosinality_slow(state, w))
    if not training:
        assert torch.equal(imported.generator.w_mean.float(), average)


def test_noise_buffers_that_an_old_file_lacks_are_drawn_alike_each_time(tmp_path: Path) -> None:
    state = {k: v for k, v in rosinality_state().items() if not k.startswith("noises.")}
    first, again = (foreign.import_checkpoint(write(tmp_path, torch_saved({"g_ema": state}))) for _ in range(2))
    w = torch.randn(1, first.generator.num_ws, W)
    assert torch.equal(first.generator.synth(w), again.generator.synth(w))
    assert any("drawn with seed 0" in note for note in first.notes)
    buffers = {f"noises.noise_{k}": layer.noise[None, None] for k, layer in enumerate(first.generator.synth.convs)}
    torch.testing.assert_close(
        first.generator.synth(w).double(), rosinality_slow(state | buffers, w.double()), atol=1e-3, rtol=1e-4
    )


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


def nvlabs_slow(state: State, w: Tensor, clamp: float | None) -> Tensor:
    state = double(state)

    def parts(prefix: str) -> Layer:
        noise = state.get(f"{prefix}.noise_const", torch.zeros(())) * state.get(f"{prefix}.noise_strength", 0.0)
        return {
            "kernel": state[f"{prefix}.weight"], "affine_weight": state[f"{prefix}.affine.weight"],
            "affine_bias": state[f"{prefix}.affine.bias"], "bias": state[f"{prefix}.bias"], "noise": noise,
        }  # fmt: skip

    names = ["b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1", "b32.conv0", "b32.conv1"]
    images = [parts(f"synthesis.b{r}.torgb") for r in (4, 8, 16, 32)]
    return slow_stylegan2(w, state["synthesis.b4.const"], [parts(f"synthesis.{n}") for n in names], images, clamp or 1e9)


@pytest.mark.parametrize(
    ("classes", "noise", "clamp", "rate", "protocol"),
    [(0, True, None, 0.01, 4), (0, True, 1.5, 0.01, 3), (4, True, None, 0.005, 5), (0, False, 256, 0.02, 4)],
)
def test_nvlabs(tmp_path: Path, classes: int, noise: bool, clamp: float | None, rate: float, protocol: int) -> None:
    state = nvlabs_state(classes, noise)
    marker = tmp_path / "executed"
    network = modules_of(state, nvlabs_attributes(clamp, np.float64(rate)), f"open({str(marker)!r}, 'w')")
    tree = {"training_set_kwargs": EasyDict(path="x"), "G": None, "D": None, "G_ema": network, "augment_pipe": None}
    imported = foreign.import_checkpoint(write(tmp_path, nvlabs_pickle(tree, protocol)))
    assert not marker.exists()
    exact = double(state)
    dense = [(exact[f"mapping.fc{i}.weight"], exact[f"mapping.fc{i}.bias"]) for i in (0, 1)]

    def mapping(z: Tensor) -> Tensor:
        x = normalised(z)
        if classes:  # the class is the largest of the first coordinates
            embedded = exact["mapping.embed.weight"].T[z[:, :classes].argmax(dim=1)] / classes**0.5
            x = torch.cat([x, normalised(embedded + exact["mapping.embed.bias"])], dim=1)
        return slow_mapping2(x, dense, rate)

    check(imported, mapping, lambda w: nvlabs_slow(state, w, clamp))
    config = imported.generator.config
    assert (config.num_classes, config.noise, config.conv_clamp, config.mapping_rate) == (classes, noise, clamp, rate)
    assert torch.equal(imported.generator.w_mean.float(), state["mapping.w_avg"])
    assert any("half precision in 1 resolutions" in note for note in imported.notes)


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


def test_tensorflow(tmp_path: Path) -> None:
    state = nvlabs_state()
    imported = foreign.import_checkpoint(write(tmp_path, nvlabs_pickle(tensorflow_networks(state, mapping_lrmul=0.02))))
    exact = double(state)
    dense = [(exact[f"mapping.fc{i}.weight"], exact[f"mapping.fc{i}.bias"]) for i in (0, 1)]
    check(imported, lambda z: slow_mapping2(normalised(z), dense, 0.02), lambda w: nvlabs_slow(state, w, None))
    assert torch.equal(imported.generator.w_mean.float(), state["mapping.w_avg"])


# ---- what cannot be imported ----------------------------------------------------------------------------------------


def changed(state: State, **changes: Any) -> State:
    """The state with tensors added, replaced, or (None) taken away; '__' stands for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | changes).items() if value is not None}


def sg1(**changes: Any) -> bytes:
    return torch_saved(changed(stylegan1_state("interfacegan", 16, 16), **changes))


def gf(**changes: Any) -> bytes:
    return torch_saved({"generator_smooth": changed(stylegan1_state("genforce", 16), **changes)})


def ros(**changes: Any) -> bytes:
    return torch_saved({"g_ema": changed(rosinality_state(), **changes)})


def nv(attributes: dict[str, Any] | None = None, **changes: Any) -> bytes:
    network = modules_of(changed(nvlabs_state(), **changes), nvlabs_attributes(**(attributes or {})))
    return nvlabs_pickle({"G_ema": network})


def tf(settings: dict[str, Any] | None = None) -> bytes:
    return nvlabs_pickle(tensorflow_networks(nvlabs_state(), **(settings or {})))


def tf_variables(*more: tuple[str, Any]) -> bytes:
    networks = tensorflow_networks(nvlabs_state())
    networks[2].variables = [item for item in networks[2].variables if item[0] not in dict(more)] + list(more)
    return nvlabs_pickle(networks)


def with_class(name: str, **state: Tensor) -> bytes:
    network = modules_of(state, {})
    network.class_name = name
    return nvlabs_pickle({"G_ema": network})


ONES = torch.ones(4, 4)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "missing": (lambda: sg1(synthesis__layer3__epilogue__bias=None), "lacks 1 of 45 tensors: synthesis.layer3.epilogue.bias"),
    "many missing": (
        lambda: torch_saved({k: v for k, v in stylegan1_state("higan", 16).items() if "epilogue" not in k}),
        "lacks 30 of 45 tensors: .* and 25 more",
    ),
    "missing in rosinality": (lambda: ros(convs__3__noise__weight=None), "lacks 1 of .*: convs.3.noise.weight"),
    "one noise buffer missing": (lambda: ros(noises__noise_3=None), "lacks 1 of .*: noises.noise_3"),
    "missing in nvlabs": (lambda: nv(synthesis__b16__conv1__affine__bias=None), "lacks 1 of .*b16.conv1.affine.bias"),
    "extra": (lambda: sg1(synthesis__attention__weight=ONES), "holds 1 tensor.*synthesis.attention.weight"),
    "extra in rosinality": (lambda: ros(encoder__weight=ONES), "holds 1 tensor.*encoder.weight"),
    "extra in nvlabs": (lambda: nv(mapping__fc0__extra=ONES), "holds 1 tensor.*mapping.fc0.extra"),
    "lod": (lambda: sg1(synthesis__lod=torch.tensor(1.5)), "midst of progressive growing: synthesis.lod is 1.5"),
    "nan": (lambda: sg1(synthesis__layer3__conv__weight=torch.full((12, 12, 3, 3), torch.nan)), "conv.weight' is not finite"),
    "too large for float32": (
        lambda: ros(input__input=torch.full((1, 12, 4, 4), 1e300, dtype=torch.float64)), "'input.input' is not finite",
    ),
    "integers": (lambda: ros(input__input=torch.ones(1, 12, 4, 4, dtype=torch.int64)), "'input.input' is of torch.int64"),
    "const": (lambda: ros(input__input=torch.ones(1, 12, 8, 8)), r"'input.input' has the shape \(1, 12, 8, 8\)"),
    "noise of another size": (lambda: nv(synthesis__b16__conv1__noise_const=torch.ones(8, 8)), "b16.conv1.noise_const' has"),
    "noise by channel": (
        lambda: gf(synthesis__layer0__apply_noise__noise=torch.ones(1, 12, 1, 1)), "layer0.apply_noise.noise' has the shape",
    ),
    "axes": (lambda: sg1(mapping__dense1__linear__weight=torch.ones(3)), "dense1.linear.weight' of shape .3,. is no matrix"),
    "axes of a style": (
        lambda: sg1(synthesis__layer3__epilogue__style_mod__dense__linear__weight=torch.ones(3)), r"has the shape \(3,\)",
    ),
    "widths": (
        lambda: torch_saved({"g_ema": {k: torch.ones(tuple(5 if n == 12 and "convs.1." in k else n for n in v.shape))
                                       for k, v in rosinality_state().items() if not k.endswith("kernel")}}),
        "follow no min.*4: 12, 8: 5, 16: 8, 32: 4",
    ),
    "three layers of five": (lambda: ros(convs__6__conv__weight=ONES), "lacks"),
    "resolution": (lambda: ros(convs__900__conv__weight=ONES), "has layers for images of size"),
    "small": (lambda: torch_saved(stylegan1_state("interfacegan", 8)), "of a shape that is not known: resolution"),
    "channels": (
        lambda: nv(**{f"synthesis__b{r}__torgb__{n}": torch.ones(s) for r in (4, 8, 16, 32)
                      for n, s in (("weight", (4, WIDTHS[r], 1, 1)), ("bias", (4,)))}), "channels: .*1 or 3",
    ),
    "fused in the middle": (
        lambda: sg1(synthesis__layer2__weight=torch.ones(3, 3, 12, 12), synthesis__layer2__conv__weight=None,
                    synthesis__layer4__weight=None, synthesis__layer4__conv__weight=torch.ones(8, 12, 3, 3)),
        r"fuses .* at \[8\] only",
    ),
    "blur": (lambda: sg1(synthesis__layer2__blur__kernel=torch.ones(12, 1, 3, 3)), "another filter than"),
    "filter in rosinality": (lambda: ros(convs__0__conv__blur__kernel=torch.ones(2, 2)), "another filter than"),
    "filter in nvlabs": (lambda: nv(synthesis__b8__resample_filter=torch.ones(12)), "another filter than"),
    "architecture": (lambda: nv({"synthesis__b8": {"architecture": "resnet"}}), "architecture .*known: skip"),
    "all of another architecture": (
        lambda: nv({f"synthesis__b{r}": {"architecture": "orig"} for r in (4, 8, 16, 32)}), "the architecture orig; known: skip",
    ),
    "activation": (lambda: nv({"mapping__fc0": {"activation": "relu"}}), "has the activation .*relu.*known: lrelu"),
    "two clamps": (lambda: nv({"synthesis__b8__conv0": {"conv_clamp": 7}}), "different bounds of layers: None, 7"),
    "clamp of text": (lambda: nv({"clamp": "x"}), "conv_clamp"),
    "two rates": (lambda: nv({"mapping__fc0": {"bias_gain": 0.5}}), "mapping's learning rate 0.5, 0.01"),
    "discriminator in a pickle": (lambda: with_class("Discriminator", w=ONES), "is a discriminator, not a generator"),
    "only a discriminator": (lambda: torch_saved({"d": {}}), "holds a discriminator and no generator"),
    "discriminator": (lambda: torch_saved({"final_linear.0.weight": ONES}), "is a discriminator, not a generator"),
    "stylegan3": (lambda: with_class("Generator", **{"synthesis.L0_36_512.weight": ONES}), "is a StyleGAN 3"),
    "another class": (lambda: with_class("Encoder", w=ONES), "a network of class Encoder, which is not known; known: StyleGAN 1"),
    "no G_ema": (lambda: nvlabs_pickle({"E": modules_of({"w": ONES}, {})}), "holds no generator but E"),
    "conditional stylegan1": (lambda: gf(mapping__label_weight=ONES), "is a class-conditional StyleGAN 1"),
    "no constant input": (lambda: gf(synthesis__layer0__const=None, synthesis__layer0__weight=ONES), "lacks .*layer0.const"),
    "genforce stylegan2": (lambda: torch_saved({"generator_smooth": {"synthesis.early_layer.const": ONES}}), "is a StyleGAN 2"),
    "pggan": (lambda: torch_saved({"layer0.conv.weight": ONES, "lod": ONES}), "is a Progressive GAN"),
    "swagan": (lambda: ros(to_rgbs__0__iwt__ll=ONES), "is a SWAGAN"),
    "nvlabs tensors alone": (lambda: torch_saved(nvlabs_state()), "only the tensors of an NVlabs network; give its .pkl"),
    "conditional tensorflow": (lambda: tf({"label_size": 10}), "has label_size 10; known: 0"),
    "architecture of tensorflow": (lambda: tf({"architecture": "resnet"}), "has architecture resnet; known: skip"),
    "filter of tensorflow": (lambda: tf({"resample_kernel": [1, 2, 1]}), r"has resample_kernel \[1, 2, 1\]"),
    "setting of tensorflow": (lambda: tf({"magic": 1}), "a setting that is not known: magic 1"),
    "stylegan1 of tensorflow": (
        lambda: nvlabs_pickle((Network(variables=[], components={}),) * 2 + (Network(
            variables=[("4x4/Const/StyleMod/weight", np.ones(3))], components={}),)), "TensorFlow pickle of StyleGAN 1",
    ),
    "list": (lambda: torch_saved([1, 2]), "holds a list and no generator"),
    "unknown tensors": (lambda: torch_saved({"a": ONES}), "holds no known generator .its tensors are a.; known"),
    "nothing": (lambda: torch_saved({}), "holds no known generator .it holds nothing.; known"),
    "numbers as keys": (lambda: torch_saved({10**30: 1, (1, 2): 2}), r"it holds \(1, 2\), 1000000000000000000000000000000\)"),
    "enormous key": (lambda: torch_saved({10**5000: 1}), "holds a number of 16610 bits"),
    "enormous label_size": (lambda: tf({"label_size": 10**5000}), "holds a number of 16610 bits"),
    "large label_size": (lambda: tf({"label_size": 10**30}), "has label_size 10{30}; known: 0"),
    "large rate": (lambda: tf({"mapping_lrmul": 10**38}), "mapping_rate: must be 1 or less"),
    "rate of text": (lambda: tf({"mapping_lrmul": "x" * 3_000_000}), r"has mapping_lrmul x{77}\.\.\., which is no number"),
    "enormous clamp": (lambda: tf({"conv_clamp": 10**5000}), "holds a number of 16610 bits"),
    "long clamp": (lambda: nv({"clamp": "x" * 3_000_000}), r"has conv_clamp x{77}\.\.\., which is no number"),
    "many clamps": (
        lambda: nv({f"synthesis__b{r}__conv{k}": {"conv_clamp": r + k} for r in (8, 16, 32) for k in (0, 1)}),
        "different bounds of layers: .* and 2 more",
    ),
    "lists of lists as a clamp": (lambda: tf({"conv_clamp": shared_lists()}), "has conv_clamp a list, which is no number"),
    "lists of lists as a setting": (lambda: tf({"architecture": shared_lists()}), "has architecture a list; known: skip"),
    "enormous variable": (lambda: tf_variables(("lod", 10**400)), "holds a number of 1329 bits"),
    "large variable": (lambda: tf_variables(("dlatent_avg", 10**30)), r"'dlatent_avg' has the shape \(\)"),
    "many variables": (lambda: tf_variables(*[("x", 1)] * 20_000), "a network of more than 20000 parts"),
    "array without a state": (
        lambda: nvlabs_pickle({"a": Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b")}), "a NumPy array without numbers",
    ),
    "no numbers in a large shape": (
        lambda: sg1(synthesis__layer3__conv__weight=torch.empty(10**10, 0, 3, 3)), "channel|impossible|lacks|must be",
    ),
    "many filters": (
        lambda: ros(**{f"x{i}__kernel": torch.ones(4, 4) for i in range(200)}), "more or larger filters than any generator",
    ),
    "a w that no style has": (
        lambda: sg1(mapping__dense2__linear__weight=torch.ones(60_000, 14), mapping__dense2__wscale__bias=torch.ones(60_000)),
        "does not go with the other tensors",
    ),
    "shared tensors": (lambda: torch_saved(shared()), "more weights than it has bytes"),
}  # fmt: skip


def shared() -> State:
    """Every tensor of a layout a part of one and the same storage."""
    state = stylegan1_state("interfacegan", 16)
    pool = torch.ones(max(value.numel() for value in state.values()))
    kept = ("lod", "kernel")
    return {name: v if name.endswith(kept) else pool[: v.numel()].reshape(v.shape) for name, v in state.items()}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported(tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    with pytest.raises(UserError, match=expected) as caught:
        foreign.import_checkpoint(write(tmp_path, make()))
    assert str(caught.value).startswith("checkpoint '")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [(12, 12, 8), (12, 12, 12), (4, 2, 1), (5, 5, 5), (7, 3, 1), (512, 512, 300)])
def test_feature_channels_follow_from_two_numbers(shape: tuple[int, ...]) -> None:
    found = {4 * 2**i: c for i, c in enumerate(shape)}
    rule = widths(found)
    assert {r: min(rule["channel_base"] // r, rule["channel_max"]) for r in found} == found


def numbers(data: bytes) -> set[int]:
    """Where the weights are: damage there shows in a checksum or not at all."""
    found: set[int] = set()
    for value in [*nvlabs_state(size=16).values(), *rosinality_state(16).values()]:
        raw = value.contiguous().numpy().tobytes()
        if len(raw) >= 64 and (start := data.find(raw)) >= 0:
            found.update(range(start, start + len(raw)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "stream", "nvlabs", "tensorflow"])
def test_no_damaged_byte_of_a_generator_ends_in_anything_but_a_user_error(tmp_path: Path, kind: str) -> None:
    small = nvlabs_state(size=16)
    data = {
        "zip": lambda: torch_saved({"g_ema": rosinality_state(16)}),
        "stream": lambda: torch_saved({"g_ema": rosinality_state(16)}, zipped=False),
        "nvlabs": lambda: nvlabs_pickle({"G_ema": modules_of(small, {"mapping.fc0": {"activation": "lrelu"}})}),
        "tensorflow": lambda: nvlabs_pickle(tensorflow_networks(small, conv_clamp=256, mapping_lrmul=0.01)),
    }[kind]()
    rng = np.random.default_rng(0)
    places = np.array(sorted(set(range(len(data))) - numbers(data)))
    for position in rng.choice(places, 120):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.integers(0, 8)
        with contextlib.suppress(UserError):
            foreign.import_checkpoint(write(tmp_path, bytes(damaged)))
