"""Projection: for each image x, find w with g(w) close to x.

Adam in W+ on LPIPS + L1 + L2 (`schedule` has rates and noise), the target's features computed once, gradient to w only.
Images are searched for side by side in slots; one that is done leaves, and the next takes its place, so that steps run
full batches while there is work. The result of an image depends on (image, settings, generator, seed), not on its
neighbours; but rounding is not the same in batches of different sizes, and may decide into which of two valleys a search goes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmat_ray.config import ProjectionConfig
from dmat_ray.data.pixels import unit
from dmat_ray.devices import require_compiler, tf32
from dmat_ray.errors import UserError
from dmat_ray.manifold import noise, starts
from dmat_ray.manifold.axes import principal_axes
from dmat_ray.manifold.schedule import Schedule, adam, learning_rate, noise_scale
from dmat_ray.manifold.slots import Slots
from dmat_ray.rng import derive
from dmat_ray.types import Generator

if TYPE_CHECKING:
    from dmat_ray.networks.perceptual import Perceptual

__all__ = ["Projection", "Projector", "learning_rate", "noise_scale"]


@dataclass(frozen=True)
class Projection:
    """Result for N images, on the CPU: `w_BLD` (float32), its clamped image, that image's errors, updates made of w, and whether
    the search broke off because its loss or gradient was not finite, or led to no image (`given_up_B`, bool).

    The errors are LPIPS (0 where it has no weight in the loss), mean absolute and mean squared pixel difference.
    """

    w_BLD: Tensor
    x_BCHW: Tensor
    lpips_B: Tensor
    l1_B: Tensor
    l2_B: Tensor
    steps_B: Tensor
    given_up_B: Tensor


def _perceptual(config: ProjectionConfig, resolution: int, device: torch.device) -> "Perceptual | None":
    if config.lpips == 0:
        return None
    from dmat_ray.networks.perceptual import SMALLEST, Perceptual  # lpips takes seconds to import

    if resolution < SMALLEST:
        raise UserError(
            f"LPIPS needs images of {SMALLEST} pixels or more, the generator makes {resolution}; set projection.lpips 0"
        )
    return Perceptual(config.lpips_net, config.lpips_weights, config.seed).to(device)


class Projector:
    """Projects images onto one generator's range. Build it once per process; `project` is called per shard, by one thread
    at a time.

    `encoder` (x_BCHW in [0, 1] -> w_BLD, on the same device) is where the search starts with `start` encoder. At most
    `batch_size` images are searched for or measured at a time; samples that are rendered once before, for `start` nearest and
    `axes` principal, come in chunks by their size. Raises UserError for settings that do not fit the generator, or if `compile`
    finds no compiler.
    """

    def __init__(
        self, generator: Generator, config: ProjectionConfig, device: torch.device, encoder: nn.Module | None = None
    ) -> None:
        if config.compile:
            require_compiler(device, "projection.compile")
        self.generator, self.config, self.device, self.dtype = generator, config, device, generator.w_mean.dtype
        # what is reported is measured in float32, whatever guides the search, on images in the generator's own precision
        self.perceptual = _perceptual(config, generator.resolution, device)
        lowered = self.perceptual is not None and config.lpips_precision == "bf16"
        self.guide = self.perceptual.lowered(torch.bfloat16) if lowered and self.perceptual else self.perceptual
        self.start = starts.build(generator, config, encoder)
        self.spread = generator.w_std.square().sum().sqrt()
        self.schedule = Schedule(config, device, self.dtype)
        self.axes = principal_axes(generator, config.seed) if config.axes == "principal" else None
        self.loss = torch.compile(self._loss, dynamic=False) if config.compile else self._loss
        self.slots: Slots | None = None

    def _errors(
        self, x: Tensor, target: Tensor, perceptual: "Perceptual | None", features: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        difference = x - target
        l1, l2 = difference.abs().mean(dim=(1, 2, 3)), difference.square().mean(dim=(1, 2, 3))
        return (torch.zeros_like(l1) if perceptual is None else perceptual.distance(x, features)), l1, l2

    def _loss(self, w: Tensor, target: Tensor, features: list[Tensor], smooth_B: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B), and what is descended in its place: the same where `l1_smooth` is 0."""
        config = self.config
        # unclamped: a pixel outside [0, 1] must still feel which way its target lies
        x = self.generator.synthesis(w, clamp=False)
        lpips_B, l1_B, l2_B = self._errors(x, target, self.guide, features)
        loss = config.lpips * lpips_B + config.l1 * l1_B + config.l2 * l2_B
        if config.l1_smooth == 0:
            return loss, loss
        # the smallest number keeps the root's derivative finite where a pixel is exact and the width has come to 0
        rounded = ((x - target).square() + (smooth_B.square() + 1e-12)[:, None, None, None]).sqrt().mean(dim=(1, 2, 3))
        return loss, loss + config.l1 * (rounded - l1_B)

    def loss_and_gradient(self, w: Tensor, target: Tensor, features: list[Tensor], smooth_B: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B) of the images g(w) and the gradient to w of what is descended, each image as if it were alone."""
        w = w.detach().requires_grad_(True)
        with torch.enable_grad():
            loss, descended = self.loss(w, target, features, smooth_B)
            (gradient,) = torch.autograd.grad(descended.sum(), w)
        return loss.detach(), gradient

    def step(self, slots: Slots, count: int, noisy: bool) -> None:
        """One step of the first `count` slots: look at w, remember it if it is the best, and move on unless done."""
        schedule, config, rows = self.schedule, self.config, slice(count)
        w, position, updates = slots.w[rows], slots.position[rows], slots.updates[rows]
        best, lowest, done = slots.best[rows], slots.lowest[rows], slots.done[rows]
        scale, seen = schedule.noise[position], w
        if noisy:
            draws = noise.normal(slots.key[rows], updates, w.shape[1:])
            seen = w + draws * (self.spread * scale[:, None, None])
        features = [f[rows] for f in slots.features]
        loss, gradient = self.loss_and_gradient(seen, slots.target[rows], features, schedule.smooth[position])
        better = (scale == 0) & (loss < best) & ~done
        slots.best_w[rows] = torch.where(better[:, None, None], w, slots.best_w[rows])
        slots.best[rows] = torch.where(better, loss, best)
        slots.lowest[rows] = torch.where(done, lowest, torch.fmin(lowest, loss))
        ended = position >= schedule.steps
        sound = loss.isfinite() & (ended | gradient.isfinite().all(dim=2).all(dim=1))
        moving = ~done & sound & ~ended
        slots.given_up[rows] |= ~done & ~sound
        slots.done[rows] = ~moving
        # one that stays has no rate and no gradient: 0 times what is not finite would not be 0
        gradient = torch.where(moving[:, None, None], gradient, 0.0)
        place, rate = updates.clamp(max=config.steps - 1), schedule.rate[position] * moving
        if self.axes is not None:
            gradient = torch.einsum("bld,lde->ble", gradient, self.axes[0])
        corrections = schedule.first[place], schedule.second[place]
        change = adam(slots.m[rows], slots.v[rows], gradient, rate, *corrections, config.beta2)
        if self.axes is not None:
            axes, lengths = self.axes
            change = torch.einsum("ble,lde->bld", change * lengths, axes)
        w -= change
        following = position + 1
        if config.stop_window:
            following = torch.where(self._plateau(slots, rows), following.clamp(min=schedule.rampdown), following)
        slots.position[rows] = torch.where(moving, following, position)
        slots.updates[rows] += moving

    def _plateau(self, slots: Slots, rows: slice) -> Tensor:
        """Whether the lowest loss fell by less than a share over the last `stop_window` steps; notes it for later."""
        place = (slots.updates[rows] % self.config.stop_window)[:, None]
        lowest, before = slots.lowest[rows], slots.history[rows].gather(1, place)[:, 0]
        slots.history[rows] = slots.history[rows].scatter(1, place, lowest[:, None])
        return (lowest > before * (1.0 - self.config.stop_improvement)) | (lowest == 0)

    def enter(self, slots: Slots, index: list[int], x: Tensor, ids: list[str]) -> None:
        """Give slots to the images of these numbers."""
        target = self._target(x[index])
        features = [] if self.guide is None else self.guide.features(target)
        w = self.start(target)
        # an encoder may say anything of an image unlike those it knows
        sound = w.isfinite().all(dim=2).all(dim=1)[:, None, None]
        w = torch.where(sound, w, self.generator.w_mean)
        key = torch.tensor([derive(self.config.seed, "projection", ids[i]) for i in index])
        new = slice(len(slots.index), len(slots.index) + len(index))
        slots.fill(index, target, features, w, key.to(self.device))
        if self.config.noise > 0:  # or the first step looks at the start itself
            loss = self._loss(w, target, features, w.new_zeros(len(w)))[0]
            slots.best[new] = torch.where(loss.isfinite(), loss, torch.inf)

    def _target(self, x: Tensor) -> Tensor:
        return unit(x.to(self.device)).to(self.dtype, memory_format=torch.channels_last)

    def reserved(self) -> Slots:
        if self.slots is None:
            shape = (1, self.generator.channels, self.generator.resolution, self.generator.resolution)
            example = [] if self.guide is None else self.guide.features(torch.zeros(shape, device=self.device))
            self.slots = Slots.reserve(self.config, self.generator, example, self.device)
        self.slots.drop(list(range(len(self.slots.index))))
        return self.slots

    def _search(self, x: Tensor, ids: list[str]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Numbers of images, their best w, updates, and whether they were given up, as they are done."""
        config, schedule, slots = self.config, self.schedule, self.reserved()
        waiting, look = list(range(len(ids)))[::-1], 0
        noisy_steps = schedule.quiet  # an image has noise at none but its first so many steps
        ages: dict[int, int] = {}
        while waiting or slots.index:
            free = slots.size - len(slots.index)
            # a few at a time: their features cost a pass of the network, and one image does not fill a GPU
            if waiting and free >= max(1, slots.size // 8):
                index = [waiting.pop() for _ in range(min(free, len(waiting)))]
                self.enter(slots, index, x, ids)
                ages |= dict.fromkeys(index, 0)
                look = 0
            count = slots.size if config.compile else len(slots.index)
            self.step(slots, count, any(ages[i] < noisy_steps for i in slots.index))
            for i in slots.index:
                ages[i] += 1
            look -= 1
            if look > 0:
                continue
            # the only wait for the device; nobody can be done before the next look, unless an image was given up
            used = slice(len(slots.index))
            done, position = slots.done[used].tolist(), slots.position[used].tolist()
            if rows := [row for row, over in enumerate(done) if over]:
                index = [slots.index[row] for row in rows]
                yield index, slots.best_w[rows].cpu(), slots.updates[rows].cpu(), slots.given_up[rows].cpu()
                slots.drop(rows)
            # from before the ramp down a plateau may lead there in one step
            furthest = schedule.rampdown - 1 if config.stop_window else 0
            look = min(
                (schedule.steps - max(p, furthest) + 1 for p, over in zip(position, done, strict=True) if not over), default=0
            )

    @torch.no_grad()
    def project(self, x_BCHW: Tensor, ids: list[str]) -> Projection:
        """N images (uint8, or float in [0, 1]; on the CPU) -> their projections, in their order; N may be 0.

        Ids seed each image's noise. The w of an image is that of the lowest loss seen at a w without noise, its start among
        them. An image whose
        loss or gradient is not finite is given up there (`given_up_B`); its errors say what its best w so far, or its first, is
        worth.
        Raises ValueError for images of another shape or range than the generator's.
        """
        shape = (len(ids), self.generator.channels, self.generator.resolution, self.generator.resolution)
        if tuple(x_BCHW.shape) != shape:
            raise ValueError(f"{len(ids)} images of this generator have the shape {shape}, not {tuple(x_BCHW.shape)}")
        if ids and x_BCHW.is_floating_point():
            low, high = float(x_BCHW.min()), float(x_BCHW.max())
            if not 0 <= low <= high <= 1:
                raise ValueError(f"images must lie in [0, 1], not in [{low:g}, {high:g}]")
        w = torch.empty(len(ids), self.generator.num_ws, self.generator.w_dim, dtype=self.dtype)
        steps, given_up = torch.empty(len(ids), dtype=torch.int32), torch.empty(len(ids), dtype=torch.bool)
        for index, best, updates, broken in self._search(x_BCHW, ids):
            w[index], steps[index], given_up[index] = best, updates.int(), broken
        return self.measured(x_BCHW, w, steps, given_up)

    def measured(self, x_BCHW: Tensor, w: Tensor, steps: Tensor, given_up: Tensor | None = None) -> Projection:
        """The clamped images of w in the generator's precision, and their errors, a batch at a time, without TF32: the set holds
        them for good.

        The mean of w takes the place of a w whose image or errors are no numbers, and the image counts as given up. Raises
        UserError if its are not either.
        """
        w, rendered = w.clone(), torch.empty(x_BCHW.shape, dtype=self.dtype)
        lost = torch.zeros(len(w), dtype=torch.bool) if given_up is None else given_up.clone()
        lpips, l1, l2 = errors = torch.empty(3, len(w), dtype=self.dtype)
        for start in range(0, len(w), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            image, found = self._measure(x_BCHW[part], w[part])
            if not bool(found.isfinite().all()):
                lost[part] |= (bad := ~found.isfinite().all(dim=0))
                w[part] = torch.where(bad[:, None, None], self.generator.w_mean.cpu(), w[part])
                image, found = self._measure(x_BCHW[part], w[part])
                if not bool(found.isfinite().all()):
                    raise UserError("the generator's image of the mean of w, or LPIPS of it, is not finite: is it damaged?")
            rendered[part], errors[:, part] = image, found
        return Projection(w, rendered, lpips, l1, l2, steps, lost)

    def _measure(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Images of w, clamped, and their errors (3, B), on the CPU."""
        with tf32(allowed=False):
            target, image = self._target(x), self.generator.synthesis(w.to(self.device))
            features = [] if self.perceptual is None else self.perceptual.features(target)
            return image.cpu(), torch.stack(self._errors(image, target, self.perceptual, features)).cpu()
