"""StyleGAN 1 of three layouts, against a slow pass written from its paper (arXiv 1812.04948) that knows nothing of ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from foreign_files import torch_saved, write
from foreign_networks import HIDDEN, State, W, Z, check, double, normalised, stylegan1_state
from torch import Tensor

from dmat_ray.manifold import foreign


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
