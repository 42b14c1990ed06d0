"""The fast path against the reference arithmetic: images, gradients to w, and what a generator must be able to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import StyleGAN1Config, StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.manifold import fast, generators
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2

SMALL: dict[str, Any] = {"z_dim": 8, "w_dim": 16, "mapping_layers": 2, "channel_base": 256, "channel_max": 24}
SHAPES = {
    "one-16": StyleGAN1Config(**SMALL, resolution=16, channels=1),
    "one-32-fused": StyleGAN1Config(**SMALL, resolution=32, channels=3, fused_from=16),
    "one-64-mixed": StyleGAN1Config(**SMALL, resolution=64, channels=3, fused_from=32),
    "two-16": StyleGAN2Config(**SMALL, resolution=16, channels=1),
    "two-32-noise-classes": StyleGAN2Config(**SMALL, resolution=32, channels=3, noise=True, num_classes=3),
    "two-64-clamp": StyleGAN2Config(**SMALL, resolution=64, channels=3, noise=True, conv_clamp=1.5),
}


def reference(shape: StyleGAN1Config | StyleGAN2Config) -> StyleGAN1 | StyleGAN2:
    """A random generator in which no term is zero, one or the same for all channels."""
    torch.manual_seed(4)
    generator = StyleGAN1(shape) if isinstance(shape, StyleGAN1Config) else StyleGAN2(shape)
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith(("bias", "noise_strength", "const")):
                value += 0.3 * torch.randn(value.shape)
    generator.measure_w(samples=1000)
    return generator.eval().requires_grad_(False)


def image_and_gradient(generator: nn.Module, count: int = 3) -> tuple[Tensor, Tensor]:
    """Raw images of W+ codes that differ from layer to layer, and the gradient of a random sum of their pixels."""
    rng = torch.Generator().manual_seed(1)
    w = torch.randn(count, generator.num_ws, generator.w_dim, generator=rng).requires_grad_()
    x = generator.synthesis(w, clamp=False)
    (grad,) = torch.autograd.grad((x * torch.randn(x.shape, generator=rng)).sum(), w)
    return x.detach(), grad


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(params=SHAPES)
def generator(request: pytest.FixtureRequest) -> StyleGAN1 | StyleGAN2:
    return reference(SHAPES[request.param])


def test_float32_is_the_reference(generator: StyleGAN1 | StyleGAN2) -> None:
    x, grad = image_and_gradient(fast.accelerate(generator, torch.float32))
    expected_x, expected_grad = image_and_gradient(generator)
    assert x.dtype == torch.float32
    assert relative(x, expected_x) < 1e-5
    assert relative(grad, expected_grad) < 1e-4
    # every layer of w by itself, not only the largest
    for layer in range(generator.num_ws):
        assert relative(grad[:, layer], expected_grad[:, layer]) < 1e-3


def test_bfloat16_is_near_the_reference(generator: StyleGAN1 | StyleGAN2) -> None:
    x, grad = image_and_gradient(fast.accelerate(generator, torch.bfloat16))
    expected_x, expected_grad = image_and_gradient(generator)
    assert x.dtype == grad.dtype == torch.float32
    # measured: 0.005 to 0.014, and 0.980 to 0.999
    assert relative(x, expected_x) < 0.02
    assert F.cosine_similarity(grad.flatten(), expected_grad.flatten(), dim=0) > 0.97


def test_every_term_of_the_layers_matters_here(generator: StyleGAN1 | StyleGAN2) -> None:
    """The comparison above would notice a term left out: without it the reference itself moves."""
    before, _ = image_and_gradient(generator)
    names = [n for n, _ in generator.synth.named_parameters() if n.endswith(("bias", "noise_strength"))]
    for name in names:
        value = generator.synth.get_parameter(name)
        kept = value.clone()
        value.zero_()
        assert relative(image_and_gradient(generator)[0], before) > 1e-4, name
        value.copy_(kept)


def test_the_clamp_of_layers_is_active_here() -> None:
    shape = SHAPES["two-64-clamp"]
    bounded = reference(shape)
    free = reference(shape.model_copy(update={"conv_clamp": None}))
    assert relative(image_and_gradient(bounded)[0], image_and_gradient(free)[0]) > 0.05


def test_protocol(generator: StyleGAN1 | StyleGAN2) -> None:
    quick = fast.accelerate(generator, torch.bfloat16)
    for name in ("z_dim", "w_dim", "num_ws", "resolution", "channels", "num_classes", "config", "training"):
        assert getattr(quick, name) == getattr(generator, name)
    z = torch.randn(5, generator.z_dim)
    assert torch.equal(quick.mapping(z, 0.7), generator.mapping(z, 0.7))
    assert torch.equal(quick.w_mean, generator.w_mean)
    assert torch.equal(quick.w_std, generator.w_std)
    if generator.num_classes:
        assert torch.equal(quick.class_of(z), generator.class_of(z))
    w = 5 * torch.randn(3, generator.num_ws, generator.w_dim)
    raw = quick.synthesis(w, clamp=False)
    assert raw.shape == (3, generator.channels, generator.resolution, generator.resolution)
    assert torch.equal(quick.synthesis(w), raw.clamp(0, 1))
    assert raw.max() > 1


def test_nothing_is_trainable_and_the_original_is_untouched() -> None:
    for shape in (SHAPES["one-16"], SHAPES["two-16"]):
        original = reference(shape).requires_grad_(True)
        before = {key: value.clone() for key, value in original.state_dict().items()}
        quick = fast.accelerate(original, torch.float32)
        assert not list(quick.parameters())
        assert not any(value.requires_grad for value in quick.buffers())
        storages = {value.untyped_storage().data_ptr() for value in original.state_dict().values()}
        assert not any(value.untyped_storage().data_ptr() in storages for value in quick.buffers())
        assert all(value.requires_grad for value in original.parameters())
        assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_everything_moves_with_the_module(generator: StyleGAN1 | StyleGAN2) -> None:
    moved = fast.accelerate(generator, torch.float32).to("meta")
    assert all(value.is_meta for value in moved.state_dict().values())
    w = torch.randn(2, generator.num_ws, generator.w_dim, device="meta")
    # fails if a constant stayed behind on the other device
    assert moved.synthesis(w).shape == (2, generator.channels, generator.resolution, generator.resolution)


def test_a_generator_on_a_device_stays_there(generator: StyleGAN1 | StyleGAN2) -> None:
    quick = fast.accelerate(generator.to("meta"), torch.bfloat16)
    assert all(value.is_meta for value in quick.state_dict().values())


def test_second_derivatives_are_refused(generator: StyleGAN1 | StyleGAN2) -> None:
    """The gradients are written out, once."""
    w = torch.randn(2, generator.num_ws, generator.w_dim, requires_grad=True)
    x = fast.accelerate(generator, torch.float32).synthesis(w, clamp=False)
    (grad,) = torch.autograd.grad(x.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_one_example_does_not_depend_on_its_batch(generator: StyleGAN1 | StyleGAN2) -> None:
    quick = fast.accelerate(generator, torch.float32)
    w = torch.randn(4, generator.num_ws, generator.w_dim)
    torch.testing.assert_close(quick.synthesis(w[2:3]), quick.synthesis(w)[2:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["one-16", "two-16"])
def test_saved_generators_load_in_every_precision(tmp_path: Path, name: str) -> None:
    original = reference(SHAPES[name])
    generators.save_generator(tmp_path, original, {})
    w = torch.randn(2, original.num_ws, original.w_dim)
    expected = original.synthesis(w, clamp=False)
    for precision, tolerance in {"reference": 0.0, "fast": 1e-5, "bf16": 0.02}.items():
        loaded = generators.load_generator(str(tmp_path), precision=precision)
        assert not loaded.training
        assert relative(loaded.synthesis(w, clamp=False), expected) <= tolerance


def test_what_cannot_be_accelerated_is_refused() -> None:
    quick = fast.accelerate(reference(SHAPES["two-16"]), torch.float32)
    with pytest.raises(UserError, match="only StyleGAN 1 and 2 have a fast path, not FastStyleGAN"):
        fast.accelerate(quick, torch.float32)
    with pytest.raises(UserError, match="not float16"):
        fast.accelerate(reference(SHAPES["two-16"]), torch.float16)
