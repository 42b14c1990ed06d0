"""StyleGAN 2 of three layouts, against a slow pass written from its paper (arXiv 1912.04958) that knows nothing of ours."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from foreign_files import EasyDict, modules_of, nvlabs_pickle, torch_saved, write
from foreign_networks import (
    TAPS,
    State,
    W,
    check,
    double,
    normalised,
    nvlabs_attributes,
    nvlabs_state,
    rosinality_state,
    tensorflow_networks,
)
from torch import Tensor

from dmat_ray.formats.layouts import widths
from dmat_ray.manifold import foreign


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


def test_tensorflow(tmp_path: Path) -> None:
    state = nvlabs_state()
    imported = foreign.import_checkpoint(write(tmp_path, nvlabs_pickle(tensorflow_networks(state, mapping_lrmul=0.02))))
    exact = double(state)
    dense = [(exact[f"mapping.fc{i}.weight"], exact[f"mapping.fc{i}.bias"]) for i in (0, 1)]
    check(imported, lambda z: slow_mapping2(normalised(z), dense, 0.02), lambda w: nvlabs_slow(state, w, None))
    assert torch.equal(imported.generator.w_mean.float(), state["mapping.w_avg"])


@pytest.mark.parametrize("shape", [(12, 12, 8), (12, 12, 12), (4, 2, 1), (5, 5, 5), (7, 3, 1), (512, 512, 300)])
def test_feature_channels_follow_from_two_numbers(shape: tuple[int, ...]) -> None:
    found = {4 * 2**i: c for i, c in enumerate(shape)}
    rule = widths(found)
    assert {r: min(rule["channel_base"] // r, rule["channel_max"]) for r in found} == found
