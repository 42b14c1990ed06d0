"""Projection: it finds images that the generator can make, alone as in company, by the published loop's very steps."""

import copy
import functools
from collections.abc import Callable

import lpips
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dmat_ray import presets
from dmat_ray.config import Config, ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import encoder, fast, generators
from dmat_ray.manifold.axes import principal_axes
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.noise import normal
from dmat_ray.manifold.perceptual import Perceptual
from dmat_ray.manifold.projection import Projection, Projector
from dmat_ray.manifold.schedule import learning_rate, noise_scale
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SQUEEZE: dict[str, object] = {"lpips_net": "squeeze", "lpips_weights": "random"}


def settings(**values: object) -> ProjectionConfig:
    return ProjectionConfig.model_validate({"lpips": 0, "l1": 10, "l2": 50, "noise": 0, "steps": 40, **values})


def names(count: int) -> list[str]:
    return [f"image-{i}" for i in range(count)]


def project(generator: LatentGenerator, x: Tensor, ids: list[str] | None = None, **values: object) -> Projection:
    return Projector(generator, settings(**values), CPU).project(x, ids or names(len(x)))


def loss_of(found: Projection) -> Tensor:
    return 10 * found.l1_B + 50 * found.l2_B


class Recorder(Projector):
    """A projector that keeps the losses of every step, and how many images it had."""

    def __init__(self, *arguments: object, **values: object) -> None:
        super().__init__(*arguments, **values)  # type: ignore[arg-type]
        self.losses: list[Tensor] = []

    def loss_and_gradient(self, *arguments: object) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss_and_gradient(*arguments)  # type: ignore[arg-type]
        self.losses.append(loss)
        return loss, gradient


@pytest.fixture
def images(generator: StyleGAN2) -> Tensor:
    """Images that the generator makes."""
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    return generator.synthesis(generator.mapping(z))


@pytest.fixture
def exact(generator: StyleGAN2) -> StyleGAN2:
    """The generator in float64: two searches that only rounding tells apart end at the same w, whatever the processor."""
    return copy.deepcopy(generator).double()


@pytest.fixture
def mixed(generator: StyleGAN2) -> Tensor:
    """Twelve images: those at and near the mean, others of the generator, and some that it cannot make."""
    rng = torch.Generator().manual_seed(5)
    far = generator.mapping(torch.randn(8, 8, generator=rng))
    near = generator.w_mean + torch.tensor([0.0, 0.1, 0.3, 0.6])[:, None, None] * (far[:4] - generator.w_mean)
    made = generator.synthesis(torch.cat([near, far[4:]]))
    constant = torch.tensor([0.0, 1.0])[:, None, None, None].expand(-1, 1, 8, 8)
    return torch.cat([made, constant, torch.rand(2, 1, 8, 8, generator=rng)])


def test_an_image_of_the_generator_is_found(generator: StyleGAN2, images: Tensor) -> None:
    at_mean = generator.synthesis(generator.w_mean.expand(1, generator.num_ws, -1))
    before = (images - at_mean).abs().mean(dim=(1, 2, 3))
    for axes in ("w", "principal"):
        found = project(generator, images, steps=200, axes=axes)
        assert (found.l1_B < before / 10).all(), (axes, found.l1_B, before)


@functools.cache
def digits() -> tuple[LatentGenerator, encoder.Encoder, Tensor]:
    """The shipped generator and its encoder, and eight images that the generator makes."""
    generator = generators.load_generator("mnist32", precision="fast")
    start = encoder.load_encoder(generators.folder_of("mnist32"), generators.fingerprint("mnist32"))
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(100))
    return generator, start, generator.synthesis(generator.mapping(z))


@pytest.mark.parametrize(
    ("count", "values"),
    # float32, since few CPUs compute in bf16, which another test compares with it
    [
        (8, {**SQUEEZE, "lpips_precision": "float32"}),
        pytest.param(1, {"lpips_weights": "random", "lpips_precision": "float32"}, marks=pytest.mark.exhaustive),
    ],
    ids=["all", "with vgg"],
)
def test_every_digit_of_the_shipped_generator_is_recovered_by_preset_fast(count: int, values: dict[str, object]) -> None:
    generator, start, x = digits()
    config = Config.model_validate(presets.merge(presets.load(["fast"]), {"projection": values}))
    assert config.generator.precision == "fast"
    found = Projector(generator, config.projection, CPU, start).project(x[:count], names(count))
    assert (-10 * found.l2_B.log10()).min() >= 35, -10 * found.l2_B.log10()
    assert found.steps_B.float().mean() < 0.9 * config.projection.steps
    assert found.steps_B.unique().numel() >= min(count, 2)


def test_most_digits_are_recovered_by_preset_paper_in_a_quarter_of_its_steps() -> None:
    """From the mean some searches end in another digit's valley: with all 1,000 steps the last of these 8 comes to 34 dB."""
    generator, _, x = digits()
    config = ProjectionConfig.model_validate({**presets.load(["paper"])["projection"], **SQUEEZE, "lpips": 0, "steps": 250})
    found = Projector(generator, config, CPU).project(x, names(8))
    assert ((-10 * found.l2_B.log10()) >= 35).sum() >= 6, -10 * found.l2_B.log10()


def test_preset_paper_is_the_published_loop() -> None:
    """The numbers of encode_imagenet.py of the code of arXiv 2009.02470, whose images have twice the range of ours."""
    paper, fast_ = (presets.load([name])["projection"] for name in ("paper", "fast"))
    published = {
        "steps": 1000, "lr": 0.1, "beta2": 0.999, "lr_rampup": 0.05, "lr_rampdown": 0.25, "noise": 0.05, "noise_ramp": 0.75,
        "lpips": 1, "lpips_net": "vgg", "l1": 2 * 100, "l2": 0, "start": "mean", "axes": "w", "stop_window": 0, "l1_smooth": 0,
        "batch_size": 10,
    }  # fmt: skip
    assert {key: paper[key] for key in published} == published
    assert ProjectionConfig.model_validate(paper) == ProjectionConfig()
    # whichever is layered on top of the other, it decides
    free = {"compile", "encoder", "candidates", "shard_size", "poor_l1", "poor_lpips", "seed"}
    assert paper.keys() == fast_.keys() == ProjectionConfig.model_fields.keys() - free


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


def test_the_errors_are_those_of_the_clamped_image(generator: StyleGAN2, images: Tensor) -> None:
    found = project(generator, images)
    assert torch.equal(found.x_BCHW, generator.synthesis(found.w_BLD))
    assert found.x_BCHW.min() >= 0
    assert found.x_BCHW.max() <= 1
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - images).abs().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.l2_B, ((found.x_BCHW - images) ** 2).mean(dim=(1, 2, 3)))
    assert found.lpips_B.tolist() == [0.0] * 5


STOPPING: dict[str, object] = {"steps": 80, "lr_rampdown": 0.3, "stop_window": 8, "stop_improvement": 0.1}


@pytest.mark.parametrize(
    "values",
    [{"start": "mean", "noise": 0.05}, {"start": "nearest", "candidates": 50, "axes": "principal", "l1_smooth": 0.02}],
)
def test_an_image_does_not_depend_on_its_neighbours(exact: StyleGAN2, mixed: Tensor, values: dict[str, object]) -> None:
    """Any number of images, order and batch size: the same steps, and the same w up to rounding."""
    mixed = mixed.double()
    whole = project(exact, mixed, batch_size=12, **STOPPING, **values)
    assert whole.steps_B.unique().numel() > 3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = project(exact, mixed[order], [names(12)[i] for i in order], batch_size=5, **STOPPING, **values)
    alone = [project(exact, mixed[i : i + 1], [f"image-{i}"], **STOPPING, **values) for i in (1, 6, 11)]
    pairs = [(shuffled, whole, order, torch.arange(12)), *zip(alone, [whole] * 3, [1, 6, 11], [0, 0, 0], strict=True)]
    for found, expected, there, here in pairs:
        assert torch.equal(found.steps_B[here], expected.steps_B[there])
        torch.testing.assert_close(found.w_BLD[here], expected.w_BLD[there], atol=1e-6, rtol=1e-6)


def test_steps_run_full_batches_while_there_is_work(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Recorder(generator, settings(batch_size=4, **STOPPING), CPU)
    found = projector.project(mixed, names(12))
    sizes = [len(loss) for loss in projector.losses]
    # an image is looked at once more than it is moved; no step is spent on one that is done
    assert sum(sizes) == int(found.steps_B.sum()) + 12
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4
    assert sizes.count(4) > 0.6 * len(sizes)


def test_memory_does_not_grow_with_the_number_of_images(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Recorder(generator, settings(batch_size=2, steps=2), CPU)

    def held() -> int:
        assert projector.slots is not None
        return sum(t.untyped_storage().nbytes() for t in projector.slots.tensors())

    projector.project(mixed[:2], names(2))
    before, places = held(), [t.data_ptr() for t in projector.slots.tensors()]  # type: ignore[union-attr]
    projector.project(mixed.repeat(4, 1, 1, 1), names(48))
    assert held() == before
    assert [t.data_ptr() for t in projector.slots.tensors()] == places  # type: ignore[union-attr]
    assert max(len(loss) for loss in projector.losses) == 2


def test_stopping_saves_steps_of_the_easy_and_returns_the_best_seen(generator: StyleGAN2, mixed: Tensor) -> None:
    whole = project(generator, mixed, **{**STOPPING, "stop_window": 0})
    assert whole.steps_B.tolist() == [80] * 12
    losses, results = [], []
    for i in range(12):
        projector = Recorder(generator, settings(**STOPPING), CPU)
        results.append(projector.project(mixed[i : i + 1], [f"image-{i}"]))
        losses.append(torch.cat(projector.losses))
        assert len(projector.losses) == int(results[-1].steps_B) + 1
    steps = torch.cat([found.steps_B for found in results])
    # a full window, then the ramp down of 24 steps
    assert steps.min() >= 8 + 24
    assert (steps < 80).sum() >= 6
    assert steps.unique().numel() > 3
    for i, found in enumerate(results):
        x = generator.synthesis(found.w_BLD, clamp=False)
        reached = 10 * (x - mixed[i]).abs().mean() + 50 * (x - mixed[i]).square().mean()
        torch.testing.assert_close(reached, losses[i].min(), atol=1e-5, rtol=1e-4)
    assert losses[0].min() == losses[0][0]  # the first image is the mean's own: nothing beats the start
    torch.testing.assert_close(results[0].w_BLD[0], generator.w_mean.expand(generator.num_ws, -1), atol=0, rtol=0)


def test_a_plateau_leads_to_the_ramp_down_at_once_without_one_to_the_end(generator: StyleGAN2, mixed: Tensor) -> None:
    values = {"steps": 60, "stop_window": 5, "stop_improvement": 0.9, "lr_rampup": 0}
    # no image improves by 90 % in five steps, again and again: the sixth look shows it
    assert set(project(generator, mixed[8:], **values, lr_rampdown=0).steps_B.tolist()) == {6}
    assert set(project(generator, mixed[8:], **values, lr_rampdown=0.25).steps_B.tolist()) == {6 + 15}


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


def test_no_rate_makes_an_image_worse_than_its_start(generator: StyleGAN2, images: Tensor) -> None:
    values: dict[str, object] = {"start": "nearest", "candidates": 200, "lr": 20, "steps": 5, "noise_ramp": 1}
    far = project(generator, images, **values, noise=0.2)
    start = Projector(generator, settings(**values), CPU).start(images)
    torch.testing.assert_close(far.w_BLD, start, rtol=0, atol=0)


def test_nearest_starts_closer_than_the_mean(generator: StyleGAN2, images: Tensor) -> None:
    still: dict[str, object] = {"steps": 1, "lr": 1e-9}
    mean = project(generator, images, **still)
    nearest = project(generator, images, start="nearest", candidates=1000, **still)
    assert (nearest.l2_B <= mean.l2_B).all()
    assert nearest.l2_B.mean() < 0.7 * mean.l2_B.mean()
    z = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    w = generator.mapping(z)
    closest = torch.stack([(generator.synthesis(w) - x).square().mean(dim=(1, 2, 3)).argmin() for x in images])
    torch.testing.assert_close(nearest.w_BLD, w[closest], atol=1e-5, rtol=1e-5)


def test_nearest_compares_large_images_by_thumbnails(make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator(64)
    x = generator.synthesis(generator.mapping(torch.randn(3, 8, generator=torch.Generator().manual_seed(9))))
    found = project(generator, x, start="nearest", candidates=100, steps=1, lr=1e-9)
    w = generator.mapping(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
    small = [image.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)) for image in (generator.synthesis(w), x)]
    closest = torch.stack([(small[0] - image).square().sum(dim=(1, 2, 3)).argmin() for image in small[1]])
    torch.testing.assert_close(found.w_BLD, w[closest], atol=1e-5, rtol=1e-5)


class Says(nn.Module):
    """An encoder that gives the same w for every image, and what is no number for dark ones."""

    def __init__(self, w_LD: Tensor) -> None:
        super().__init__()
        self.w_LD = w_LD

    def forward(self, x: Tensor) -> Tensor:
        dark = (x.mean(dim=(1, 2, 3)) == 0)[:, None, None]
        return torch.where(dark, torch.nan, self.w_LD.expand(len(x), -1, -1))


def test_the_encoder_says_where_to_start_and_the_mean_where_it_cannot(generator: StyleGAN2, mixed: Tensor) -> None:
    config = settings(start="encoder", steps=1, lr=1e-9)
    w = torch.randn(generator.num_ws, 8, generator=torch.Generator().manual_seed(1))
    found = Projector(generator, config, CPU, Says(w)).project(mixed, names(12))
    expected = w.repeat(12, 1, 1)
    expected[8] = generator.w_mean  # mixed[8] is black
    torch.testing.assert_close(found.w_BLD, expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"projection\.start is encoder.*jobs/train_encoder\.py.*projection\.encoder"):
        Projector(generator, config, CPU)


class Brittle(StyleGAN2):
    """A generator whose images are no numbers beyond some distance from the mean."""

    reach = 0.3

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        bad = (w_BLD - self.w_mean).abs().amax(dim=(1, 2)) > self.reach
        x = super().synthesis(w_BLD, clamp)
        return torch.where(bad[:, None, None, None], torch.nan, x)


@pytest.fixture
def brittle(exact: StyleGAN2) -> Brittle:
    """The same generator, in float64, but for that."""
    found = Brittle(exact.config).double()
    found.load_state_dict(exact.state_dict())
    return found.eval().requires_grad_(False)


def test_what_is_not_finite_stays_with_its_image(exact: StyleGAN2, brittle: Brittle, mixed: Tensor) -> None:
    values: dict[str, object] = {"steps": 50, "lr": 0.02}
    mixed = mixed.double()
    free, found = project(exact, mixed, **values), project(brittle, mixed, **values)
    left = found.steps_B < 50
    assert left.any()
    assert not left.all()
    assert torch.equal(found.given_up_B, left)
    assert not free.given_up_B.any()
    torch.testing.assert_close(found.w_BLD[~left], free.w_BLD[~left], atol=1e-6, rtol=1e-6)
    # those that left are given up, where they would be alone, with the best w before
    assert left[(free.w_BLD - exact.w_mean).abs().amax(dim=(1, 2)) > brittle.reach].all()
    for i in torch.nonzero(left).flatten().tolist():
        alone = project(brittle, mixed[i : i + 1], [f"image-{i}"], **values)
        assert alone.steps_B[0] == found.steps_B[i] > 0
        torch.testing.assert_close(alone.w_BLD[0], found.w_BLD[i], atol=1e-6, rtol=1e-6)
    assert found.x_BCHW.isfinite().all()
    start = project(exact, mixed, steps=1, lr=1e-9)
    assert (loss_of(found) <= loss_of(start) + 1e-4).all()


def test_an_image_without_any_finite_loss_keeps_its_first_w(brittle: Brittle, mixed: Tensor) -> None:
    mean = brittle.w_mean.expand(12, brittle.num_ws, -1)
    found = project(brittle, mixed.double(), lr=10, lr_rampup=0, steps=5)
    assert torch.equal(found.w_BLD, mean)
    assert found.x_BCHW.isfinite().all()
    assert found.steps_B.tolist() == [1] * 12
    assert found.given_up_B.all()
    # nor one without even that: an encoder may say what the generator cannot make
    light = mixed.double()[9:]
    far = Projector(brittle, settings(start="encoder", steps=5), CPU, Says(mean[0] + 1)).project(light, names(3))
    assert torch.equal(far.w_BLD, mean[9:])
    torch.testing.assert_close(far.l1_B, found.l1_B[9:])
    assert far.steps_B.tolist() == [0] * 3
    assert far.given_up_B.all()
    # nor one that only the last step leads astray, where no look before it counts
    last = project(brittle, mixed.double(), lr=10, lr_rampup=0, steps=1, noise=1e-9, noise_ramp=1)
    assert torch.equal(last.w_BLD, mean)
    assert last.steps_B.tolist() == [1] * 12
    assert last.given_up_B.all()
    brittle.reach = -1
    with pytest.raises(UserError, match="image of the mean of w, or LPIPS of it, is not finite"):
        project(brittle, mixed.double(), steps=5)


def test_no_images_and_images_as_bytes(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Projector(generator, settings(steps=3), CPU)
    none = projector.project(mixed[:0], [])
    assert none.w_BLD.shape == (0, generator.num_ws, 8)
    assert none.x_BCHW.shape == (0, 1, 8, 8)
    assert [len(t) for t in (none.lpips_B, none.l1_B, none.l2_B, none.steps_B, none.given_up_B)] == [0] * 5
    levels = (mixed * 255).round().to(torch.uint8)
    a, b = projector.project(levels, names(12)), projector.project(levels / 255, names(12))
    torch.testing.assert_close(a.w_BLD, b.w_BLD, atol=1e-5, rtol=1e-5)
    assert a.w_BLD.dtype == a.x_BCHW.dtype == a.l1_B.dtype == torch.float32


def test_images_that_do_not_fit_are_refused(generator: StyleGAN2, mixed: Tensor) -> None:
    projector = Projector(generator, settings(), CPU)
    with pytest.raises(ValueError, match=r"2 images of this generator have the shape \(2, 1, 8, 8\), not \(12, 1, 8, 8\)"):
        projector.project(mixed, names(2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not in \[0, 2\]"):
        projector.project(mixed * 2, names(12))
    with pytest.raises(ValueError, match="not in"):
        projector.project(mixed / 0, names(12))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_in_the_generators_precision(generator: StyleGAN2, images: Tensor, dtype: torch.dtype) -> None:
    """Its image of w, as a set that is rendered again finds it, and the errors of that image."""
    own = fast.accelerate(generator, dtype)
    found = project(own, images, steps=3)
    assert torch.equal(found.x_BCHW, own.synthesis(found.w_BLD))
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - images).abs().mean(dim=(1, 2, 3)))
    assert found.x_BCHW.dtype == torch.float32
    apart = (found.x_BCHW - generator.synthesis(found.w_BLD)).abs().max()
    assert (apart > 1e-4) == (dtype == torch.bfloat16)


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


@pytest.mark.exhaustive
def test_compiled_steps_give_the_same_result(generator: StyleGAN2, mixed: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, object] = {**STOPPING, "steps": 30, "batch_size": 3, "noise": 0.01}
    plain = project(generator, mixed[:7], **values)
    counted = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted, fullgraph=True))
    projector = Recorder(fast.accelerate(generator, torch.float32), settings(**values, compile=True), CPU)
    found = projector.project(mixed[:7], names(7))
    assert counted.frame_count == 1
    # one shape, to the end: a batch that runs out is padded
    assert {len(loss) for loss in projector.losses} == {3}
    assert torch.equal(found.steps_B, plain.steps_B)
    torch.testing.assert_close(found.x_BCHW, plain.x_BCHW, atol=2e-3, rtol=0)


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


def test_the_generator_is_not_moved(generator: StyleGAN2, images: Tensor) -> None:
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    project(generator, images, noise=0.05, start="nearest", candidates=10, axes="principal")
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())
