"""StyleGAN 2 against the formulas of its paper (arXiv 1912.04958), written out slowly."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmat_ray.config import StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.manifold.base import Mapping, class_of_z
from dmat_ray.manifold.discriminator import Discriminator
from dmat_ray.manifold.resampling import downsample, filter_1331, upsample
from dmat_ray.manifold.stylegan2 import ModulatedConv, StyleGAN2

TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def upfirdn(x: Tensor, taps: np.ndarray, *, up: int = 1, down: int = 1) -> np.ndarray:
    """scipy's upsample-filter-downsample along both image axes, uncropped."""
    y = x.numpy()
    for axis in (2, 3):
        y = scipy.signal.upfirdn(taps, y, up, down, axis=axis)
    return y


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_upsample_is_upfirdn(image: Tensor) -> None:
    # the paper's code pads the zero-inserted image by (2, 1): sample 1 of the full convolution is the first
    expected = upfirdn(image, 2 * TAPS, up=2)[:, :, 1:13, 1:17]
    np.testing.assert_allclose(upsample(image).numpy(), expected, atol=1e-12)


def test_downsample_is_upfirdn(image: Tensor) -> None:
    expected = upfirdn(image, TAPS)[:, :, 2::2, 2::2][:, :, :3, :4]
    np.testing.assert_allclose(downsample(image).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("pad", [(0, 0), (1, 1), (2, 1), (2, 2)])
def test_filter_1331_is_upfirdn(image: Tensor, pad: tuple[int, int]) -> None:
    before, after = pad
    full = upfirdn(F.pad(image, (before, after, before, after)), TAPS)
    np.testing.assert_allclose(filter_1331(image, pad, gain=1.5).numpy(), 1.5 * full[:, :, 3:-3, 3:-3], atol=1e-12)


def test_resampling_keeps_a_constant() -> None:
    flat = torch.full((1, 1, 8, 8), 0.7)
    assert torch.allclose(upsample(flat)[:, :, 2:-2, 2:-2], flat.new_tensor(0.7))
    assert torch.allclose(downsample(flat)[:, :, 1:-1, 1:-1], flat.new_tensor(0.7))


@pytest.mark.parametrize(("size", "up"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_of_the_paper(size: int, demodulate: bool, up: bool) -> None:
    """Equations 1 and 3: one kernel for each example, w' = s w, w'' = w' / sqrt(sum w'^2 + 1e-8)."""
    torch.manual_seed(0)
    layer = ModulatedConv(3, 4, size, w_dim=6, up=up, demodulate=demodulate).double()
    x, w = torch.randn(5, 3, 7, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    style = w @ layer.affine.weight.T / 6**0.5 + layer.affine.bias
    outputs = []
    for i in range(5):
        kernel = layer.weight / (3 * size * size) ** 0.5 * style[i][None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            spread = F.conv_transpose2d(x[i : i + 1], kernel.transpose(0, 1), stride=2)
            outputs.append(torch.from_numpy(upfirdn(spread.detach(), 2 * TAPS))[:, :, 2:-2, 2:-2])
        else:
            outputs.append(F.conv2d(x[i : i + 1], kernel, padding=size // 2))
    torch.testing.assert_close(layer(x, w), torch.cat(outputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("resolution", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(resolution: int, channels: int) -> None:
    shape = StyleGAN2Config(resolution=resolution, channels=channels, z_dim=5, w_dim=7, channel_base=32, channel_max=4)
    generator = StyleGAN2(shape)
    w = generator.mapping(torch.randn(2, 5))
    assert w.shape == (2, 2 * int(np.log2(resolution)) - 2, 7)
    assert generator.num_ws == w.shape[1]
    x = generator.synthesis(w)
    assert x.shape == (2, channels, resolution, resolution)
    assert Discriminator(shape)(x).shape == (2,)


def test_every_layer_of_w_plus_moves_the_image(generator: StyleGAN2) -> None:
    w = generator.mapping(torch.randn(1, 8)).repeat(1 + generator.num_ws, 1, 1)
    for layer in range(generator.num_ws):
        w[1 + layer, layer] += 0.5
    x = generator.synthesis(w, clamp=False)
    assert ((x[1:] - x[:1]).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_images_are_clamped_only_when_asked(generator: StyleGAN2) -> None:
    w = 30 * torch.randn(16, generator.num_ws, generator.w_dim)
    raw, clamped = generator.synthesis(w, clamp=False), generator.synthesis(w)
    assert raw.min() < 0
    assert raw.max() > 1
    assert torch.equal(clamped, raw.clamp(0, 1))


def test_truncation_pulls_towards_the_mean(generator: StyleGAN2) -> None:
    z = torch.randn(4, 8)
    full = generator.mapping(z)
    assert torch.equal(generator.mapping(z, 1.0), full)
    torch.testing.assert_close(generator.mapping(z, 0.0), generator.w_mean.expand_as(full))
    torch.testing.assert_close(generator.mapping(z, 0.7), torch.lerp(generator.w_mean.expand_as(full), full, 0.7))


def test_measured_w_is_its_mean_and_deviation(generator: StyleGAN2) -> None:
    w = generator.mapping(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(5)))[:, 0]
    torch.testing.assert_close(w.mean(dim=0), generator.w_mean, atol=0.15, rtol=0)
    torch.testing.assert_close(w.std(dim=0), generator.w_std, atol=0.15, rtol=0)


def test_mapping_ignores_the_length_of_z(generator: StyleGAN2) -> None:
    z = torch.randn(4, 8)
    torch.testing.assert_close(generator.mapping(z), generator.mapping(3 * z), atol=1e-5, rtol=1e-4)


def test_a_conditional_mapping_takes_the_class_from_z() -> None:
    torch.manual_seed(0)
    mapping = Mapping(StyleGAN2Config(num_classes=3, z_dim=8, w_dim=8))
    z = torch.randn(3000, 8)
    labels = class_of_z(z, 3)
    assert torch.equal(labels, torch.from_numpy(z[:, :3].numpy().argmax(axis=1)))
    shares = torch.bincount(labels, minlength=3) / 3000
    assert (shares - 1 / 3).abs().max() < 0.05
    # the same z but for its class gives another w
    assert (mapping(z[:1]) - mapping(z[:1].roll(1, dims=1))).abs().max() > 1e-3


def test_noise_is_fixed_in_eval_and_fresh_in_training() -> None:
    torch.manual_seed(0)
    generator = StyleGAN2(StyleGAN2Config(resolution=8, z_dim=4, w_dim=4, channel_base=32, noise=True))
    with torch.no_grad():
        for layer in generator.synth.convs:
            layer.noise_strength.fill_(0.3)
    w = generator.mapping(torch.randn(1, 4))
    assert not torch.equal(generator.train().synth(w), generator.synth(w))
    generator.eval()
    assert torch.equal(generator.synth(w), generator.synth(w))


def test_discriminator_depends_on_the_spread_of_its_group() -> None:
    """Minibatch standard deviation: equal images look different from an image among others."""
    torch.manual_seed(0)
    discriminator = Discriminator(StyleGAN2Config(resolution=8, channel_base=64))
    x = torch.rand(4, 1, 8, 8)
    alone = discriminator(x[:1].repeat(4, 1, 1, 1))
    torch.testing.assert_close(alone, alone[:1].expand(4))
    assert (discriminator(x)[0] - alone[0]).abs() > 1e-4


def test_saved_generator_is_the_same(tmp_path: Path, generator: StyleGAN2) -> None:
    generators.save_generator(tmp_path / "g", generator, {"name": "mine"})
    loaded = generators.load_generator(str(tmp_path / "g"))
    w = torch.randn(3, generator.num_ws, generator.w_dim)
    assert torch.equal(loaded.synthesis(w), generator.synthesis(w))
    assert torch.equal(loaded.w_std, generator.w_std)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert generators.read_card(str(tmp_path / "g"))["name"] == "mine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "card.json").unlink(), "has no card.json"),
        (lambda f: (f / "generator.safetensors").unlink(), "has no generator.safetensors"),
        (lambda f: (f / "card.json").write_text("{"), "card.json' is damaged"),
        (lambda f: _card(f, kind="stylegan9"), "kind 'stylegan9'"),
        (lambda f: _card(f, architecture=None), "the card of generator"),
        (lambda f: _card(f, architecture={"resolution": 24}), "24 is not a power of two"),
        (lambda f: _card(f, architecture={"resolution": 16}), "do not fit its card: "),
        (lambda f: (f / "card.json").write_text("[]"), "the card of generator '.*' is a list, not a JSON object"),
        (lambda f: (f / "card.json").write_text("[" * 100_000), "card.json' is damaged: it is nested too deep"),
        (lambda f: _card(f, kind=[]), "kind 'list'"),
        (lambda f: _card(f, kind={"stylegan2": 1}), "kind 'dict'"),
        (lambda f: _card(f, architecture=[]), "the card of generator"),
        (lambda f: _architecture(f, z_dim=10**30), "z_dim: must be .* or less"),
        (lambda f: _architecture(f, mapping_layers=10**9), "mapping_layers: must be .* or less"),
        (lambda f: _architecture(f, resolution="x" * 1_000_000), "resolution: .*x{77}"),
        (
            lambda f: _architecture(f, channel_base=1 << 20, channel_max=4000),
            r"19 shape.s. differ: synth.const \(1, 8, 4, 4\) is not \(1, 4000, 4, 4\)",
        ),
        (lambda f: _architecture(f, z_dim=9), r"1 shape.s. differ: map.layers.0.weight \(8, 8\) is not \(8, 9\)"),
        (lambda f: _architecture(f, mapping_layers=1), "tensor.s. have no place there: map.layers.1.bias, map.layers.1.weight"),
        (lambda f: _architecture(f, noise=True), r"[36] of \d+ tensors are not there: synth.convs.0.noise, .* and 1 more"),
        (lambda f: _weights(f, "w_mean", 1, torch.int64), r"are not all floating-point numbers: w_mean \(I64\)"),
        (lambda f: (f / "generator.safetensors").write_bytes(b"1234567890"), "do not fit its card"),
        (lambda f: _weights(f, "w_mean", float("nan")), "not finite"),
    ],
)
def test_generators_that_cannot_be_used(tmp_path: Path, generator: StyleGAN2, damage: object, message: str) -> None:
    generators.save_generator(tmp_path, generator, {})
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        generators.load_generator(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


def _card(folder: Path, **values: object) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | values))


def _architecture(folder: Path, **values: object) -> None:
    _card(folder, architecture=json.loads((folder / "card.json").read_text())["architecture"] | values)


def _weights(folder: Path, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
    state = load_file(folder / "generator.safetensors")
    state[name] = torch.full_like(state[name], value, dtype=dtype)
    save_file(state, folder / "generator.safetensors")


def test_images_of_another_shape_are_refused(generator: StyleGAN2) -> None:
    generators.require_images(generator, "g", 1, 8)
    with pytest.raises(UserError, match="8x8 images with 1 channel"):
        generators.require_images(generator, "g", 3, 8)


def test_the_shipped_generator_loads() -> None:
    generator = generators.load_generator("mnist32")
    x = generator.synthesis(generator.mapping(torch.randn(2, generator.z_dim)))
    assert x.shape == (2, 1, 32, 32)
    assert len(generators.fingerprint("mnist32")) == 64


def test_a_generator_is_named_by_its_weights_and_what_else_changes_its_images(tmp_path: Path, generator: StyleGAN2) -> None:
    """Settings that no tensor's shape shows: with them changed the same file makes other images."""
    generators.save_generator(tmp_path, generator, {"name": "one"})
    digest = hashlib.sha256((tmp_path / "generator.safetensors").read_bytes()).hexdigest()
    assert generators.fingerprint(str(tmp_path)) == digest
    _card(tmp_path, name="another")
    assert generators.fingerprint(str(tmp_path)) == digest
    z, default, names = torch.randn(2, 8), generators.load_generator(str(tmp_path)), []
    images = [default.synthesis(default.mapping(z), clamp=False)]
    for value in ({"conv_clamp": 0.1}, {"conv_clamp": 0.2}, {"mapping_rate": 0.5}):
        _architecture(tmp_path, conv_clamp=None, mapping_rate=0.1)
        _architecture(tmp_path, **value)
        loaded = generators.load_generator(str(tmp_path))
        images.append(loaded.synthesis(loaded.mapping(z), clamp=False))
        names.append(generators.fingerprint(str(tmp_path)))
    assert len({digest, *names}) == 4
    assert all(not torch.allclose(a, b) for a, b in combinations(images, 2))
