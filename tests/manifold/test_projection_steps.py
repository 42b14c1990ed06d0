"""The steps of a projection are those of a plain loop, with its noise, its smoothed gradient and its axes."""

from collections.abc import Callable

import lpips
import pytest
import torch
from projections import CPU, SQUEEZE, Recorder, exact_fixture, images_fixture, mixed_fixture, names, project, settings  # noqa: F401  (fixtures)
from torch import Tensor

from dmat_ray.manifold import fast
from dmat_ray.manifold.axes import principal_axes
from dmat_ray.manifold.noise import normal
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.schedule import learning_rate, noise_scale
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_are_those_of_a_plain_loop(make_generator: Callable[..., StyleGAN2], dtype: torch.dtype) -> None:
    """torch's Adam, the lpips package on both images in every step, the papers' generator; the noise alone is ours.

    In float32 the losses agree to 1e-4, while coordinates of w that no image depends on go where rounding sends them; in
    float64, without LPIPS, w itself agrees.
    """
    generator, steps, with_lpips = make_generator(32).to(dtype), 40, dtype == torch.float32
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    config = settings(**SQUEEZE, lpips=float(with_lpips), l1=100, l2=0, noise=0.05, steps=steps)
    projector = Recorder(fast.accelerate(generator, dtype) if with_lpips else generator, config, CPU)
    found = projector.project(x, names(3))

    torch.manual_seed(config.seed)
    metric = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)

    def distances(image: Tensor) -> tuple[Tensor, Tensor]:
        rgb = [2 * part.repeat(1, 3, 1, 1) - 1 for part in (image, x)]
        of_lpips = metric(*rgb).flatten() if with_lpips else image.new_zeros(3)
        return of_lpips, (image - x).abs().mean(dim=(1, 2, 3))

    w = generator.w_mean.repeat(3, generator.num_ws, 1).requires_grad_()
    keys = torch.tensor([derive(config.seed, "projection", name) for name in names(3)])
    optimizer, losses = torch.optim.Adam([w]), []
    best, best_w = torch.full((3,), torch.inf, dtype=dtype), w.detach().clone()
    for step in range(steps + 1):
        sigma = noise_scale(config, step)
        noise = normal(keys, torch.full((3,), step), w.shape[1:]) * generator.w_std.square().sum().sqrt() * sigma
        of_lpips, of_l1 = distances(generator.synthesis(w + noise, clamp=False))
        loss = of_lpips + 100 * of_l1
        losses.append(loss.detach())
        if sigma == 0:
            better = losses[-1] < best
            best_w[better], best[better] = w.detach()[better], losses[-1][better]
        if step < steps:
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    assert (losses[-1] < losses[0]).all()
    tolerance = 1e-4 if with_lpips else 1e-7
    torch.testing.assert_close(torch.stack(projector.losses), torch.stack(losses), atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        of_lpips, of_l1 = distances(generator.synthesis(found.w_BLD, clamp=False))
        torch.testing.assert_close(of_lpips + 100 * of_l1, best, atol=tolerance, rtol=tolerance)
        for ours, expected in zip((found.lpips_B, found.l1_B), distances(generator.synthesis(found.w_BLD)), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    if not with_lpips:
        torch.testing.assert_close(found.w_BLD, best_w, atol=1e-6, rtol=1e-6)
    assert found.steps_B.tolist() == [steps] * 3


def test_steps_along_axes_with_a_plateau_are_those_of_a_plain_loop(exact: StyleGAN2, mixed: Tensor) -> None:
    """torch's Adam on coordinates along the axes, the rate from the ramp down as soon as the loss stands still."""
    values: dict[str, object] = {"axes": "principal", "steps": 60, "stop_window": 6, "stop_improvement": 0.2, "beta2": 0.95}
    x, found = mixed.double(), project(exact, mixed.double(), lr_rampdown=0.3, **values)
    axes, lengths = principal_axes(exact, seed=0)
    config = settings(lr_rampdown=0.3, **values)
    assert found.steps_B.unique().numel() > 3
    for i in range(12):
        along = torch.zeros(exact.num_ws, 8, dtype=torch.float64, requires_grad=True)
        optimizer, position, updates, losses = torch.optim.Adam([along], betas=(0.9, 0.95)), 0, 0, []
        best, best_w = torch.inf, torch.empty(0)
        while True:
            w = exact.w_mean + torch.einsum("le,lde->ld", lengths * along, axes)
            difference = exact.synthesis(w[None], clamp=False) - x[i]
            loss = 10 * difference.abs().mean() + 50 * difference.square().mean()
            losses.append(loss.item())
            if loss < best:
                best, best_w = loss.item(), w.detach()
            if position == 60:
                break
            # the gradient along an axis is that of a full step: its length comes after Adam
            (gradient,) = torch.autograd.grad(loss, w, retain_graph=True)
            along.grad = torch.einsum("ld,lde->le", gradient, axes)
            optimizer.param_groups[0]["lr"] = learning_rate(config, position)
            optimizer.step()
            before = min(losses[: max(0, len(losses) - 6)], default=torch.inf)
            position = max(position + 1, 42) if min(losses) > 0.8 * before else position + 1
            updates += 1
        assert updates == found.steps_B[i]
        torch.testing.assert_close(found.w_BLD[i], best_w, atol=1e-6, rtol=1e-6)


def test_noise_belongs_to_the_example_and_the_seed(generator: StyleGAN2, images: Tensor) -> None:
    twins = images[:1].repeat(3, 1, 1, 1)
    found = project(generator, twins, ["a", "a", "b"], noise=0.3)
    torch.testing.assert_close(found.w_BLD[0], found.w_BLD[1], atol=1e-4, rtol=1e-4)
    assert (found.w_BLD[0] - found.w_BLD[2]).abs().max() > 1e-2
    reseeded = project(generator, twins, ["a", "a", "b"], noise=0.3, seed=1)
    assert (reseeded.w_BLD[0] - found.w_BLD[0]).abs().max() > 1e-2


def test_the_w_returned_was_never_seen_through_noise(generator: StyleGAN2, images: Tensor) -> None:
    """With noise to the last step, the last w is the only one that was looked at as it is."""
    projector = Recorder(generator, settings(noise=0.2, noise_ramp=1, steps=30), CPU)
    found = projector.project(images[:1], ["a"])
    x = generator.synthesis(found.w_BLD, clamp=False)
    at_end = 10 * (x - images[:1]).abs().mean() + 50 * (x - images[:1]).square().mean()
    torch.testing.assert_close(projector.losses[-1][0], at_end, atol=1e-5, rtol=1e-5)


def test_a_layer_without_effect_has_axes_of_length_0(generator: StyleGAN2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of length 0 / 0, with which w is no number any more."""
    whole = generator.synthesis

    def without_the_last(w_BLD: Tensor, clamp: bool = True) -> Tensor:
        return whole(torch.cat([w_BLD[:, :-1], w_BLD[:, :-1].mean(dim=1, keepdim=True)], dim=1), clamp)

    monkeypatch.setattr(generator, "synthesis", without_the_last)
    axes, lengths = principal_axes(generator, seed=0)
    assert torch.isfinite(axes).all()
    assert (lengths[-1] == 0).all()
    assert (lengths[:-1] == 1).any()


def test_principal_axes_are_those_of_the_derivative(generator: StyleGAN2) -> None:
    axes, lengths = principal_axes(generator, seed=0)
    unit = torch.eye(8).expand(generator.num_ws, -1, -1)
    torch.testing.assert_close(axes.transpose(1, 2) @ axes, unit, atol=1e-5, rtol=0)
    # E[J^T J] from whole Jacobians at other samples
    rng = torch.Generator().manual_seed(77)
    energy = torch.zeros(generator.num_ws, 8, 8)
    for _ in range(100):
        w = generator.mapping(torch.randn(1, 8, generator=rng)) + 0.3 * generator.w_std * torch.randn(
            generator.num_ws, 8, generator=rng
        )
        jacobian = torch.autograd.functional.jacobian(lambda w: generator.synthesis(w, clamp=False).flatten(), w, vectorize=True)[
            :, 0
        ]
        energy += torch.einsum("pld,ple->lde", jacobian, jacobian) / 100
    along = torch.einsum("lda,lde,leb->lab", axes, energy, axes)
    diagonal = along.diagonal(dim1=1, dim2=2)
    assert (diagonal[:, -1] > 5 * diagonal[:, 0]).all()
    # a hundredth of the effect of the strongest is enough for a whole step
    share = diagonal.clamp(min=0).sqrt() / diagonal[:, -1:].sqrt()
    torch.testing.assert_close(lengths, (100 * share).clamp(max=1), atol=0.2, rtol=0)
    assert (lengths < 0.5).any()
    assert (lengths == 1).any()
    plain = energy.diagonal(dim1=1, dim2=2)

    def off(matrix: Tensor, own: Tensor) -> Tensor:
        """How far from diagonal, as a share. Not by correlations: those of directions without effect are rounding's."""
        return matrix.square().sum(dim=(1, 2)) / own.square().sum(dim=1) - 1

    assert (off(along, diagonal) < 0.05 * off(energy, plain)).all()


def test_smoothing_rounds_the_gradient_and_not_the_loss(generator: StyleGAN2, images: Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    w = generator.mapping(torch.randn(5, 8, generator=rng)).contiguous()
    found = []
    for width in (0.0, 1e-5, 10.0):
        projector = Projector(generator, settings(l1=1, l2=0, l1_smooth=width), CPU)
        found.append(projector.loss_and_gradient(w, images, [], torch.full((5,), width)))
    losses, gradients = zip(*found, strict=True)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-2)
    # far wider than any difference, |d| becomes d^2 / (2 width)
    w.requires_grad_()
    (expected,) = torch.autograd.grad((generator.synthesis(w, clamp=False) - images).square().mean(dim=(1, 2, 3)).sum() / 20, w)
    torch.testing.assert_close(gradients[2], expected, atol=1e-5, rtol=1e-2)
