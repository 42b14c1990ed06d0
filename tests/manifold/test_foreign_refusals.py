"""Generators of others that cannot be imported, each named in one line."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Call, Network, modules_of, nvlabs_pickle, shared_lists, torch_saved, write
from foreign_networks import (
    WIDTHS,
    State,
    changed,
    nvlabs_attributes,
    nvlabs_state,
    ros,
    rosinality_state,
    stylegan1_state,
    tensorflow_networks,
)
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.manifold import foreign


def sg1(**changes: Any) -> bytes:
    return torch_saved(changed(stylegan1_state("interfacegan", 16, 16), **changes))


def gf(**changes: Any) -> bytes:
    return torch_saved({"generator_smooth": changed(stylegan1_state("genforce", 16), **changes)})


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
