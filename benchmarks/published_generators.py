"""Do imported generators make the images of the published code that they come from?

    python benchmarks/published_generators.py --interfacegan DIR --higan DIR --genforce DIR --rosinality DIR --nvlabs DIR

Each DIR is a clone of that project (all are optional), whose code is imported and run in this process: it is the reader's
own, no part of dmat_ray. Every network is small where its code allows, random in all its tensors, saved the way its
project saves, imported by dmat_ray, and both are given the same z and the same random W+ codes in float32.
"""

import argparse
import importlib
import pickle
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.manifold import foreign

TOLERANCE = 1e-4  # of the largest value in the published images
FIXED = ("kernel", "resample_filter", "lod", "truncation.truncation")


@dataclass
class Case:
    """A published network: its checkpoint, z -> images in [-1, 1], W+ -> images."""

    name: str
    file: Path
    of_z: Callable[[Tensor], Tensor]
    of_w: Callable[[Tensor], Tensor]


def package(name: str, folder: Path) -> None:
    """Make the modules in a folder importable as `name`.MODULE without running the folder's __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


@torch.no_grad()
def randomise(network: nn.Module, seed: int, rate: float = 0.01) -> nn.Module:
    """Random values in every parameter and buffer but the fixed filters; those of the mapping are scaled by its `rate`."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if not name.endswith(FIXED):
            scale = 0.3 if value.dim() < 2 else 1.0
            if re.match(r"mapping\.(dense|fc)|style\.", name):
                scale /= rate
            value.copy_(value * 0.5 + scale * torch.randn(value.shape, generator=rng))
    return network.eval().requires_grad_(False)


def interfacegan(root: Path, folder: Path) -> Iterator[Case]:
    package("published_interfacegan", root / "models")
    code = importlib.import_module("published_interfacegan.stylegan_generator_model")
    for resolution in (16, 256):
        network = randomise(code.StyleGANGeneratorModel(resolution=resolution, truncation_psi=None), resolution)
        state = {key: value for key, value in network.state_dict().items() if key != "truncation.truncation"}
        for zipped in (True, False):
            file = folder / f"interfacegan-{resolution}-{zipped}.pth"
            torch.save(state, file, _use_new_zipfile_serialization=zipped)
            kind = "zip" if zipped else "old torch.save"
            yield Case(f"interfacegan {resolution} ({kind})", file, network, network.synthesis)


def higan(root: Path, folder: Path) -> Iterator[Case]:
    package("published_higan", root / "models")
    code = importlib.import_module("published_higan.stylegan_generator_network")
    for fused in ("auto", True, False):
        network = code.StyleGANGeneratorNet(
            resolution=256, z_space_dim=48, w_space_dim=40, fused_scale=fused, fmaps_base=2048, fmaps_max=64,
            num_mapping_layers=4, truncation_psi=None,
        )  # fmt: skip
        randomise(network, 1)
        file = folder / f"higan-{fused}.pth"
        torch.save(network.state_dict(), file)
        yield Case(f"higan 256 (fused {fused})", file, network, network.synthesis)


def genforce(root: Path, folder: Path) -> Iterator[Case]:
    package("published_genforce", root / "models")
    code = importlib.import_module("published_genforce.stylegan_generator")
    network = code.StyleGANGenerator(
        resolution=256, z_space_dim=48, w_space_dim=40, mapping_layers=3, mapping_fmaps=56, fmaps_base=2048, fmaps_max=64
    )
    randomise(network, 2)
    state = network.state_dict()
    for name, tree in {
        "models": {"models": {"generator": state, "generator_smooth": state}, "running_metadata": {"iter": 3}},
        "flat": {"generator": state, "generator_smooth": state, "discriminator": {}},
    }.items():
        file = folder / f"genforce-{name}.pth"
        torch.save(tree, file)
        yield Case(f"genforce 256 ({name})", file, lambda z: network(z)["image"], lambda w: network.synthesis(w)["image"])


def native_upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Zeros inserted, padded (or cropped), convolved, thinned out: in plain PyTorch."""
    b, c, h, w = x.shape
    spread = x.new_zeros(b, c, h, up, w, up)
    spread[:, :, :, 0, :, 0] = x
    padded = F.pad(spread.reshape(b * c, 1, h * up, w * up), (pad[0], pad[1], pad[0], pad[1]))
    filtered = F.conv2d(padded, kernel.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return filtered.reshape(b, c, *filtered.shape[2:])


class NativeLeakyReLU(nn.Module):
    """Bias, leaky ReLU, gain: stands in for the compiled layer of the same interface."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=bias)

    def forward(self, x: Tensor) -> Tensor:
        return native_leaky_relu(x, self.bias)


def native_leaky_relu(x: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.dim() - 2)), 0.2) * 2**0.5


def rosinality(root: Path, folder: Path) -> Iterator[Case]:
    operators = types.ModuleType("op")  # theirs compiles for CUDA when it is imported
    operators.FusedLeakyReLU, operators.fused_leaky_relu = NativeLeakyReLU, native_leaky_relu
    operators.upfirdn2d = native_upfirdn2d
    operators.conv2d_gradfix = types.SimpleNamespace(conv2d=F.conv2d, conv_transpose2d=F.conv_transpose2d)
    sys.modules["op"] = operators
    package("published_rosinality", root)
    code = importlib.import_module("published_rosinality.model")
    for size, multiplier in ((32, 2), (128, 1)):
        network = randomise(code.Generator(size, 64, 4, channel_multiplier=multiplier), size)
        critic = code.Discriminator(size, channel_multiplier=multiplier)
        converted = {"g_ema": network.state_dict(), "latent_avg": torch.randn(64)}
        optimizer = torch.optim.Adam(critic.parameters())
        training = {
            "g": network.state_dict(), "d": critic.state_dict(), "g_ema": network.state_dict(), "g_optim": optimizer.state_dict(),
            "d_optim": optimizer.state_dict(), "args": argparse.Namespace(size=size, latent=64), "ada_aug_p": 0.0,
        }  # fmt: skip

        def of_z(z: Tensor, network: Any = network) -> Tensor:
            return network([z], randomize_noise=False)[0]

        def of_w(w: Tensor, network: Any = network) -> Tensor:
            return network([w], input_is_latent=True, randomize_noise=False)[0]

        for name, tree in {"converted": converted, "training": training}.items():
            file = folder / f"rosinality-{size}-{name}.pt"
            torch.save(tree, file)
            yield Case(f"rosinality {size} ({name})", file, of_z, of_w)


def nvlabs(root: Path, folder: Path) -> Iterator[Case]:
    sys.path.insert(0, str(root))
    code = importlib.import_module("training.networks")
    plain = {"channel_base": 1024, "channel_max": 32}
    for name, classes, mapping, synthesis in (
        ("default", 0, {}, plain),
        ("clamped", 0, {"num_layers": 2}, {**plain, "conv_clamp": 3.0, "num_fp16_res": 2}),
        ("conditional", 10, {"lr_multiplier": 0.1, "layer_features": 48}, plain),
        ("no noise", 0, {"w_avg_beta": None}, {**plain, "use_noise": False}),
    ):
        network = code.Generator(40, classes, 36, 64, 3, mapping_kwargs=mapping, synthesis_kwargs=synthesis)
        randomise(network, 3, mapping.get("lr_multiplier", 0.01))
        critic = code.Discriminator(classes, 64, 3, channel_base=1024, channel_max=32)
        for protocol in (3, 4):
            file = folder / f"nvlabs-{name}-{protocol}.pkl"
            snapshot = {"training_set_kwargs": {"path": "x"}, "G": network, "D": critic, "G_ema": network, "augment_pipe": None}
            with file.open("wb") as stream:
                pickle.dump(snapshot, stream, protocol=protocol)

            def of_z(z: Tensor, network: Any = network, classes: int = classes) -> Tensor:
                label = F.one_hot(z[:, :classes].argmax(dim=1), classes) if classes else None
                return network(z, label, noise_mode="const", force_fp32=True)

            def of_w(w: Tensor, network: Any = network) -> Tensor:
                return network.synthesis(w, noise_mode="const", force_fp32=True)

            yield Case(f"nvlabs 64 ({name}, pickle protocol {protocol})", file, of_z, of_w)
    yield tensorflow(root, folder)


def tensorflow(root: Path, folder: Path) -> Case:
    """A pickle as the TensorFlow code writes it, converted for comparison by NVlabs' own legacy.py."""
    legacy = importlib.import_module("legacy")
    rng = np.random.default_rng(4)
    width = {4: 24, 8: 24, 16: 16, 32: 8}

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    mapping: list[tuple[str, Any]] = []
    for i in range(3):
        mapping += [(f"Dense{i}/weight", normal(20, 20) * 100), (f"Dense{i}/bias", normal(20) * 100)]
    synthesis: list[tuple[str, Any]] = [("4x4/Const/const", normal(1, width[4], 4, 4))]

    def modulated(name: str, size: int, inputs: int, outputs: int) -> None:
        weights = [
            ("weight", normal(size, size, inputs, outputs)),
            ("mod_weight", normal(20, inputs)),
            ("mod_bias", normal(inputs)),
        ]
        synthesis.extend((f"{name}/{part}", value) for part, value in [*weights, ("bias", normal(outputs))])

    for r, c in width.items():
        layers = [("Conv", c)] if r == 4 else [("Conv0_up", width[r // 2]), ("Conv1", c)]
        for layer, inputs in layers:
            modulated(f"{r}x{r}/{layer}", 3, inputs, c)
            synthesis.append((f"{r}x{r}/{layer}/noise_strength", normal()[()]))
        modulated(f"{r}x{r}/ToRGB", 1, c, 3)
    for k in range(7):
        size = 2 ** ((k + 1) // 2 + 2)
        synthesis.append((f"noise{k}", normal(1, 1, size, size)))
    settings = {
        "resolution": 32,
        "latent_size": 20,
        "dlatent_size": 20,
        "mapping_layers": 3,
        "mapping_fmaps": 20,
        "fmap_base": 128,
    }
    settings |= {"fmap_max": 24, "label_size": 0, "num_channels": 3}

    class Network:
        def __init__(self, **state: Any) -> None:
            self.__dict__.update({"version": 4, "build_module_src": "raise SystemExit", **state})

    Network.__module__, Network.__qualname__ = "dnnlib.tflib.network", "Network"
    tflib, module = types.ModuleType("dnnlib.tflib"), types.ModuleType("dnnlib.tflib.network")
    module.Network = Network
    sys.modules |= {"dnnlib.tflib": tflib, "dnnlib.tflib.network": module}
    parts = {
        "mapping": Network(name="G_mapping", static_kwargs={}, variables=mapping, components={}),
        "synthesis": Network(name="G_synthesis", static_kwargs={}, variables=synthesis, components={}),
    }
    whole = Network(
        name="Gs", static_kwargs=settings, variables=[("dlatent_avg", normal(20)), ("lod", normal()[()])], components=parts
    )
    file = folder / "nvlabs-tensorflow.pkl"
    with file.open("wb") as stream:
        pickle.dump((whole, whole, whole), stream, protocol=4)
    with file.open("rb") as stream:
        network = legacy.convert_tf_generator(legacy._LegacyUnpickler(stream).load()[2])
    return Case(
        "nvlabs 32 (TensorFlow pickle)",
        file,
        lambda z: network(z, None, noise_mode="const"),
        lambda w: network.synthesis(w, noise_mode="const"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    projects = {"interfacegan": interfacegan, "higan": higan, "genforce": genforce, "rosinality": rosinality, "nvlabs": nvlabs}
    for name in projects:
        parser.add_argument(f"--{name}", metavar="DIR", type=Path)
    arguments = parser.parse_args()
    given = {name: make for name, make in projects.items() if getattr(arguments, name)}
    if not given:
        parser.error(f"give at least one of {', '.join('--' + name for name in projects)}")
    worst = 0.0
    print("largest difference of images from z | from W+ | largest value | share")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, make in given.items():
            for case in make(getattr(arguments, name).resolve(), Path(folder)):
                ours = foreign.import_checkpoint(case.file).generator
                rng = torch.Generator().manual_seed(0)
                z = torch.randn(2, ours.z_dim, generator=rng)
                w = torch.randn(2, ours.num_ws, ours.w_dim, generator=rng)
                pairs = [(ours.synth(ours.mapping(z)), case.of_z(z)), (ours.synth(w), case.of_w(w))]
                apart = [float((a - b).abs().max()) for a, b in pairs]
                largest = max(float(b.abs().max()) for _, b in pairs)
                share = max(d / float(b.abs().max()) for d, (_, b) in zip(apart, pairs, strict=True))
                worst = max(worst, share)
                print(f"{case.name:42} {apart[0]:9.1e} {apart[1]:9.1e} {largest:9.1f} {share:9.1e}", flush=True)
                case.file.unlink()
    print(f"worst share {worst:.1e}, tolerance {TOLERANCE:.0e}: {'equal' if worst <= TOLERANCE else 'DIFFERENT'}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
