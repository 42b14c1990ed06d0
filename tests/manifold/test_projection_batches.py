"""Images that are projected together: each as if it were alone, and the batch full while there is work."""

import functools

import pytest
import torch
from projections import CPU, Recorder, Says, exact_fixture, mixed_fixture, names, project, settings  # noqa: F401  (fixtures)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dmat_ray.errors import UserError
from dmat_ray.manifold import fast
from dmat_ray.manifold.projection import Projection, Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow


def loss_of(found: Projection) -> Tensor:
    return 10 * found.l1_B + 50 * found.l2_B


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
