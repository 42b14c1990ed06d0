"""Projection by LPIPS: its gradient reaches w alone, its targets are seen once, in float32 or bf16."""

from collections.abc import Callable

import pytest
import torch
from projections import CPU, SQUEEZE, names, project, settings

from dmat_ray.errors import UserError
from dmat_ray.manifold import fast
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks.perceptual import Perceptual

pytestmark = pytest.mark.slow


def test_bf16_guides_nearly_as_well(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(32)
    x = generator.synthesis(generator.mapping(torch.randn(3, 8, generator=torch.Generator().manual_seed(3))))
    found = {p: project(generator, x, **SQUEEZE, lpips=1, l1=1, l2=0, lpips_precision=p) for p in ("float32", "bf16")}
    # the errors are measured in float32 on both sides
    low, exact = found["bf16"], found["float32"]
    judge = Projector(generator, settings(**SQUEEZE, lpips=1), CPU)
    torch.testing.assert_close(judge.measured(x, low.w_BLD, low.steps_B).lpips_B, low.lpips_B, atol=0, rtol=0)
    assert (low.w_BLD - exact.w_BLD).abs().max() > 1e-4
    assert (low.lpips_B + low.l1_B < 1.3 * (exact.lpips_B + exact.l1_B)).all()


def test_only_w_gets_a_gradient(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(32).requires_grad_(True)
    x = torch.rand(2, 1, 32, 32)
    projector = Projector(generator, settings(**SQUEEZE, lpips=1, steps=3), CPU)
    assert projector.perceptual is not None
    projector.perceptual.requires_grad_(True)
    found = projector.project(x, ["a", "b"])
    trained = [*generator.parameters(), *projector.perceptual.parameters()]
    assert [p.grad for p in trained if p.grad is not None] == []
    assert not found.w_BLD.requires_grad
    assert x.grad is None
    with torch.no_grad():
        expected = projector.perceptual.metric(2 * found.x_BCHW.repeat(1, 3, 1, 1) - 1, 2 * x.repeat(1, 3, 1, 1) - 1)
    torch.testing.assert_close(found.lpips_B, expected.flatten(), atol=1e-6, rtol=1e-5)


def test_lpips_guides_the_search(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(32)
    x = generator.synthesis(generator.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(3))))
    values: dict[str, object] = {"lpips": 1, "l1": 0, "l2": 0, **SQUEEZE}
    assert (project(generator, x, steps=20, **values).lpips_B < 0.7 * project(generator, x, steps=1, **values).lpips_B).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_with_lpips_is_one_graph(make_generator: Callable[..., StyleGAN2], precision: str) -> None:
    """What torch.compile is given: no break, and the same numbers."""
    generator, x = fast.accelerate(make_generator(32), torch.float32), torch.rand(2, 1, 32, 32)
    projector = Projector(generator, settings(**SQUEEZE, lpips=1, lpips_precision=precision), CPU)
    assert projector.guide is not None
    given = generator.w_mean.repeat(2, generator.num_ws, 1), x, projector.guide.features(x + 0.1), torch.zeros(2)
    plain = projector.loss_and_gradient(*given)
    projector.loss = torch.compile(projector._loss, backend="aot_eager", fullgraph=True, dynamic=False)
    for found, expected in zip(projector.loss_and_gradient(*given), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3 if precision == "float32" else 0.05)


def test_the_targets_features_are_computed_once(
    make_generator: Callable[..., StyleGAN2], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    of = Perceptual.features
    monkeypatch.setattr(Perceptual, "features", lambda self, x: (seen.append(len(x)), of(self, x))[1])
    projector = Projector(make_generator(32), settings(**SQUEEZE, lpips=1, steps=5, batch_size=2), CPU)
    projector.project(torch.rand(4, 1, 32, 32), names(4))
    # for the shape, then two by two, and once more for the errors that are reported
    assert seen == [1, 2, 2, 2, 2]


def test_lpips_needs_larger_images(generator: StyleGAN2) -> None:
    with pytest.raises(UserError, match=r"needs images of 32 pixels .* generator makes 8; set projection\.lpips 0"):
        Projector(generator, settings(**SQUEEZE, lpips=1), CPU)
