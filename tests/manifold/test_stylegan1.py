"""StyleGAN 1 against the formulas of its paper (arXiv 1812.04948). Whole images are compared in test_foreign_stylegan1.py."""

from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from torch import Tensor

from dmat_ray.config import StyleGAN1Config
from dmat_ray.manifold import generators
from dmat_ray.manifold.resampling import blur_121
from dmat_ray.manifold.stylegan1 import Epilogue, Layer, StyleGAN1, transposed_kernel

SMALL = StyleGAN1Config(
    resolution=32, channels=3, z_dim=6, w_dim=8, mapping_layers=3, channel_base=128, channel_max=10, fused_from=32
)


@pytest.fixture
def stylegan1() -> StyleGAN1:
    """A seeded network of which no weight is at its neutral value."""
    torch.manual_seed(0)
    generator = StyleGAN1(SMALL)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    generator.measure_w()
    return generator.eval().requires_grad_(False)


def test_the_paper_s_generator_of_imagenet() -> None:
    config = StyleGAN1Config()
    assert (config.num_ws, config.w_dim, config.resolution) == (14, 512, 256)
    assert [config.width(r) for r in config.resolutions] == [512, 512, 512, 512, 256, 128, 64]
    assert config.mapping_widths == [512] * 9
    with torch.device("meta"):
        count = sum(p.numel() for p in StyleGAN1(config).parameters())
    # parameters of a published implementation, less its level of detail and the image layers of lower resolutions
    assert count == 26_086_230 - 1 - 7_314


@pytest.mark.parametrize("resolution", [16, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(resolution: int, channels: int) -> None:
    config = StyleGAN1Config(resolution=resolution, channels=channels, z_dim=5, w_dim=7, channel_base=64, channel_max=4)
    generator = StyleGAN1(config)
    w = generator.mapping(torch.randn(2, 5))
    assert w.shape == (2, 2 * int(np.log2(resolution)) - 2, 7)
    assert generator.synthesis(w).shape == (2, channels, resolution, resolution)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"resolution": 8}, "greater than or equal to 16"), ({"resolution": 48}, "not a power of two"), ({"num_classes": 3}, "0")],
)
def test_shapes_that_do_not_exist(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StyleGAN1Config.model_validate(values)


def test_blur_is_a_convolution_with_121() -> None:
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = [[scipy.signal.convolve2d(plane, kernel, mode="same") for plane in image] for image in x.numpy()]
    np.testing.assert_allclose(blur_121(x).numpy(), expected, atol=1e-12)


def test_fused_upsampling_is_pixel_doubling_and_a_true_convolution() -> None:
    x, kernel = torch.rand(2, 3, 5, 6, dtype=torch.float64), torch.rand(4, 3, 3, 3, dtype=torch.float64)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, kernel.flip(2, 3), padding=1)
    torch.testing.assert_close(F.conv_transpose2d(x, transposed_kernel(kernel), stride=2, padding=1), expected)


@pytest.mark.parametrize(("resolution", "fused"), [(16, False), (32, True)])
def test_layers_are_fused_from_their_resolution_on(resolution: int, fused: bool) -> None:
    layer = Layer(3, 4, resolution, SMALL, up=True).double()
    x = torch.rand(2, 3, resolution // 2, resolution // 2, dtype=torch.float64)
    doubled = F.interpolate(x, scale_factor=2)
    kernel = layer.weight * (2 / (9 * 3)) ** 0.5  # He's initialisation at run time: gain sqrt(2), fan in 27
    expected = blur_121(F.conv2d(doubled, kernel.flip(2, 3) if fused else kernel, padding=1))
    torch.testing.assert_close(layer.convolve(x), expected)


def test_adain_gives_each_map_the_mean_and_deviation_of_its_style() -> None:
    """Equation 1: y_s (x - mean) / std + y_b, where y_s is 1 plus the affine map's first half."""
    torch.manual_seed(0)
    epilogue = Epilogue(4, 16, 8).double()
    with torch.no_grad():
        epilogue.noise_strength.normal_()
        epilogue.bias.normal_()
    w = torch.randn(3, 8, dtype=torch.float64)
    y = epilogue(torch.randn(3, 4, 16, 16, dtype=torch.float64), w)
    style = w @ epilogue.affine.weight.T / 8**0.5 + epilogue.affine.bias
    torch.testing.assert_close(y.mean(dim=(2, 3)), style[:, 4:], atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(dim=(2, 3), unbiased=False), (style[:, :4] + 1).abs(), atol=1e-6, rtol=0)


def test_every_layer_of_w_plus_moves_the_image(stylegan1: StyleGAN1) -> None:
    w = stylegan1.mapping(torch.randn(1, 6)).repeat(1 + stylegan1.num_ws, 1, 1)
    for layer in range(stylegan1.num_ws):
        w[1 + layer, layer] += 0.5
    x = stylegan1.synthesis(w, clamp=False)
    assert ((x[1:] - x[:1]).abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_images_repeat_and_stay_in_their_range(stylegan1: StyleGAN1) -> None:
    w = 5 * torch.randn(4, stylegan1.num_ws, 8)
    raw, clamped = stylegan1.synthesis(w, clamp=False), stylegan1.synthesis(w)
    assert raw.min() < 0
    assert raw.max() > 1
    assert torch.equal(clamped, raw.clamp(0, 1))
    assert torch.equal(stylegan1.train().synthesis(w), clamped), "the noise is a buffer, in training mode too"


def test_gradient_to_w_is_measured(stylegan1: StyleGAN1) -> None:
    generator = stylegan1.double()
    w = torch.randn(1, generator.num_ws, 8, dtype=torch.float64)

    def value(code: Tensor) -> Tensor:
        return generator.synthesis(code, clamp=False).square().sum()

    assert torch.autograd.gradcheck(value, w.requires_grad_(True), atol=1e-4, rtol=1e-3)


def test_saved_generator_is_the_same(tmp_path: Path, stylegan1: StyleGAN1) -> None:
    generators.save_generator(tmp_path / "g", stylegan1, {"name": "mine"})
    loaded = generators.load_generator(str(tmp_path / "g"))
    assert isinstance(loaded, StyleGAN1)
    z = torch.randn(3, 6)
    assert torch.equal(loaded.synthesis(loaded.mapping(z, 0.7)), stylegan1.synthesis(stylegan1.mapping(z, 0.7)))
    assert generators.read_card(str(tmp_path / "g"))["kind"] == "stylegan1"
