"""Where a projection starts: at the mean, at the nearest of many samples, or where an encoder says."""

from collections.abc import Callable

import pytest
import torch
from projections import CPU, Says, images_fixture, mixed_fixture, names, project, settings  # noqa: F401  (fixtures)
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.manifold.projection import Projector
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow


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


def test_the_encoder_says_where_to_start_and_the_mean_where_it_cannot(generator: StyleGAN2, mixed: Tensor) -> None:
    config = settings(start="encoder", steps=1, lr=1e-9)
    w = torch.randn(generator.num_ws, 8, generator=torch.Generator().manual_seed(1))
    found = Projector(generator, config, CPU, Says(w)).project(mixed, names(12))
    expected = w.repeat(12, 1, 1)
    expected[8] = generator.w_mean  # mixed[8] is black
    torch.testing.assert_close(found.w_BLD, expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"projection\.start is encoder.*jobs/train_encoder\.py.*projection\.encoder"):
        Projector(generator, config, CPU)
