"""Training a StyleGAN 2: losses, augmentation, and the loop.

Non-saturating logistic loss (Goodfellow et al. 2014), R1 penalty (Mescheder et al. 2018, arXiv 1801.04406) every
few steps with its weight scaled up to match (lazy regularisation, arXiv 1912.04958 section 3.1), exponential moving
average of the generator, style mixing, and small affine warps of everything that the discriminator sees, applied
with a probability below 0.8 so that they do not leak into the samples (arXiv 2006.06676). Short trainings need two
things more: class labels, and a mode-seeking term (arXiv 1903.05628) that keeps two z of one class apart.
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import GanConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.stylegan2 import Discriminator, StyleGAN2
from dmat_ray.types import RunContext


def generator_loss(fake_logit_B: Tensor) -> Tensor:
    """-log sigmoid(D(g(z))), the non-saturating form."""
    return F.softplus(-fake_logit_B).mean()


def discriminator_loss(real_logit_B: Tensor, fake_logit_B: Tensor) -> Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(g(z))))."""
    return F.softplus(-real_logit_B).mean() + F.softplus(fake_logit_B).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Mean squared norm of dD/dx at real images (equation 9 of arXiv 1801.04406, without gamma / 2)."""
    x = x_BCHW.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def augment(x_BCHW: Tensor, probability: float, rng: torch.Generator) -> Tensor:
    """Each image, with `probability`, shifted by up to 1/8, turned by up to 15 degrees and scaled by up to 15 %."""
    b = x_BCHW.shape[0]
    unit = torch.rand(5, b, generator=rng).to(x_BCHW.device) * 2 - 1
    on = (torch.rand(b, generator=rng) < probability).to(x_BCHW)
    angle, scale = on * unit[0] * math.radians(15), 1 + on * unit[1] * 0.15
    shift_x, shift_y = on * unit[2] * 0.25, on * unit[3] * 0.25
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)


def mixed_w(
    generator: StyleGAN2, batch: int, probability: float, rng: torch.Generator, *, pairs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Random w_BLD and their classes (None for an unconditional generator).

    With `probability` the layers after a random crossover take the w of a second z (style mixing) of the same class.
    With `pairs`, examples 2i and 2i + 1 share their class.
    """
    device, classes = generator.w_mean.device, generator.config.num_classes
    z = torch.randn(2, batch, generator.z_dim, generator=rng)
    if classes:
        if pairs:
            z[0, 1::2, :classes] = z[0, : batch // 2 * 2 : 2, :classes]
        z[1, :, :classes] = z[0, :, :classes]
    first, second = generator.mapping(z[0].to(device)), generator.mapping(z[1].to(device))
    cut = torch.randint(1, generator.num_ws, (batch,), generator=rng)
    cut = torch.where(torch.rand(batch, generator=rng) < probability, cut, generator.num_ws).to(device)
    layer = torch.arange(generator.num_ws, device=device)
    w = torch.where((layer[None] < cut[:, None])[:, :, None], first, second)
    return w, generator.map.class_of(z[0]).to(device) if classes else None


def mode_seeking(x_BCHW: Tensor) -> Tensor:
    """Inverse of the mean distance between images 2i and 2i + 1 (equation 3 of arXiv 1903.05628, z at distance 1)."""
    even = x_BCHW.shape[0] // 2 * 2
    x = x_BCHW[:even].clamp(-1, 1)
    return 1.0 / ((x[0::2] - x[1::2]).abs().mean() + 1e-3)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1.0 - decay)


def check_images(config: GanConfig, images: Tensor, labels: Tensor) -> None:
    """Raise UserError unless images (N, C, H, W) and labels (N) are those that the architecture makes."""
    shape = config.architecture
    if images.shape[1:] != (shape.channels, shape.resolution, shape.resolution):
        raise UserError(
            f"images are {tuple(images.shape[1:])} (C, H, W), but gan.architecture makes "
            f"({shape.channels}, {shape.resolution}, {shape.resolution})"
        )
    if shape.num_classes and int(labels.max()) >= shape.num_classes:
        raise UserError(f"labels reach {int(labels.max())}, but gan.architecture.num_classes is {shape.num_classes}")


def train_generator(
    config: GanConfig,
    images: Tensor,
    labels: Tensor,
    context: RunContext,
    on_report: Callable[[StyleGAN2], None] | None = None,
) -> StyleGAN2:
    """Train on `images` (N, C, H, W), float in [0, 1] or uint8, and return the averaged generator.

    `labels` (N) are used if the architecture has classes.

    Each worker draws its own `batch_size / world_size` images; gradients are averaged over workers before each
    optimiser step. Metrics go to `context.report` every `report_kimg`; `on_report` sees the averaged generator then.
    """
    check_images(config, images, labels)
    torch.manual_seed(config.seed)
    device = context.device
    generator, discriminator = StyleGAN2(config.architecture).to(device), Discriminator(config.architecture).to(device)
    average = copy.deepcopy(generator).eval().requires_grad_(False)
    opt_g = torch.optim.Adam(generator.parameters(), lr=config.lr_generator, betas=(0.0, 0.99), eps=1e-8)
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=config.lr_discriminator, betas=(0.0, 0.99), eps=1e-8)
    rng = torch.Generator().manual_seed(config.seed * 1_000_003 + context.rank)
    batch = config.batch_size // context.world_size
    steps = math.ceil(config.kimg * 1000 / config.batch_size)
    report_every = max(1, round(config.report_kimg * 1000 / config.batch_size))
    decay = 0.5 ** (config.batch_size / (config.ema_kimg * 1000))
    sums = torch.zeros(4)
    began = time.monotonic()

    def critic(x: Tensor, y: Tensor | None) -> Tensor:
        logits: Tensor = discriminator(augment(x, config.augment, rng), y)
        return logits

    def step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        context.average_([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()

    for i in range(1, steps + 1):
        fade = min(1.0, (1 - (i - 1) / steps) / config.fade) if config.fade else 1.0
        opt_g.param_groups[0]["lr"] = config.lr_generator * fade
        opt_d.param_groups[0]["lr"] = config.lr_discriminator * fade
        pick = torch.randint(len(images), (batch,), generator=rng)
        real = images[pick].to(device)
        real = (real.float() / 255 if real.dtype == torch.uint8 else real) * 2 - 1

        label = labels[pick].to(device)

        discriminator.requires_grad_(False)
        w, y = mixed_w(generator, batch, config.style_mixing, rng, pairs=True)
        fake = generator.synth(w)
        loss_g = generator_loss(critic(fake, y))
        step(opt_g, generator, loss_g + config.mode_seeking * mode_seeking(fake))
        discriminator.requires_grad_(True)

        with torch.no_grad():
            w, y = mixed_w(generator, batch, config.style_mixing, rng)
            fake = generator.synth(w)
        real_logit, fake_logit = critic(real, label), critic(fake, y)
        loss_d = discriminator_loss(real_logit, fake_logit)
        if i % config.r1_interval == 0:
            penalty = r1_penalty(partial(critic, y=label), real)
            step(opt_d, discriminator, loss_d + penalty * (config.r1_gamma / 2 * config.r1_interval))
        else:
            step(opt_d, discriminator, loss_d)

        # a short average at first, so that the early samples are not those of the untrained network
        _update_average(average, generator, min(decay, i / (i + 10)))
        sums += torch.stack([loss_g, loss_d, real_logit.sign().mean(), torch.ones(())]).detach().cpu()
        if i % report_every == 0 or i == steps:
            mean = (sums[:3] / sums[3]).tolist()
            sums.zero_()
            kimg = i * config.batch_size / 1000
            average.measure_w(seed=config.seed)
            if on_report is not None and context.rank == 0:
                on_report(average)
            context.report(
                {
                    "kimg": kimg,
                    "loss_g": mean[0],
                    "loss_d": mean[1],
                    "real_sign": mean[2],
                    "images_per_second": kimg * 1000 / (time.monotonic() - began),
                }
            )
    return average
