"""The loop of encoder training, on the generator's own samples: no images are needed, and w is known of each.

Loss: squared error of w in units of w_std, and pixel errors of g(encoder(x)) against x. W+ is covered by style mixing and
by noise on the w of every layer: projected natural images lie some w_std off W.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from dmat_ray.config import EncoderConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.diversity import of_same_class
from dmat_ray.manifold.encoder import Encoder, as_stored, untrained
from dmat_ray.manifold.gan import StepDraws
from dmat_ray.manifold.samples import chunk_size
from dmat_ray.models import checkpoint, steps
from dmat_ray.pace import Pace
from dmat_ray.rng import derive
from dmat_ray.storage import Place, at
from dmat_ray.types import RunContext

PROGRESS = "encoder_progress.json"
RAMP = 0.1  # share of the steps in which the rate grows: without normalisation, full steps at first cost much of the rest


def check_workers(config: EncoderConfig, world_size: int) -> None:
    """Raise UserError unless the batch can be cut into equal parts for this many workers."""
    if config.batch_size % world_size:
        raise UserError(
            f"encoder.batch_size {config.batch_size} must be a multiple of {world_size}, the number of workers; change it or "
            "cluster.train_workers"
        )


def learning_rate(highest: float, done: float, step: float) -> float:
    """Adam's rate when a share `done` of the training is done, of which one step is `step`: linear up, cosine to 0."""
    return highest * min(1.0, (done + step) / RAMP) * (0.5 + 0.5 * math.cos(math.pi * done))


def sample_w(generator: LatentGenerator, config: EncoderConfig, draws: StepDraws) -> Tensor:
    """Random w_BLD: mapped z, with `style_mixing` the later layers of a second z of the same class, and `spread`."""
    device, layers = generator.w_mean.device, generator.num_ws
    one, other = draws.normal(generator.z_dim), draws.normal(generator.z_dim)
    other = of_same_class(other, one, generator.num_classes)
    cut, coin = draws.integers(1, max(2, layers)), draws.uniform()
    cut = torch.where(coin < config.style_mixing, cut, layers).to(device)
    first = torch.arange(layers, device=device)[None] < cut[:, None]
    w = torch.where(first[:, :, None], generator.mapping(one.to(device)), generator.mapping(other.to(device)))
    return w + config.spread * generator.w_std * draws.normal(layers, generator.w_dim).to(device)


def losses(encoder: Encoder, generator: LatentGenerator, w_BLD: Tensor, config: EncoderConfig) -> Tensor:
    """(3): mean squared error of w in units of w_std, mean absolute and mean squared pixel error, over samples g(w_BLD)."""
    with torch.no_grad():
        x = generator.synthesis(w_BLD)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        offset = encoder.offset(x)
    # where w_std is 0 there is nothing to learn
    wanted = (w_BLD - encoder.w_mean) / encoder.w_std.clamp(min=1e-8)
    # unclamped: a pixel outside [0, 1] must still feel which way its target lies
    difference = generator.synthesis(encoder.w_mean + encoder.w_std * offset, clamp=False) - x
    return torch.stack([(offset - wanted).square().mean(), difference.abs().mean(), difference.square().mean()])


class _Training:
    """Everything that a step changes: the encoder, its optimiser, and sums for the next report."""

    def __init__(self, config: EncoderConfig, generator: LatentGenerator, context: RunContext) -> None:
        torch.manual_seed(derive(config.seed, "encoder weights") % 2**31)
        self.config, self.context, self.generator = config, context, generator
        self.encoder = untrained(config, generator)
        self.optimizer = torch.optim.Adam(self.encoder.parameters(), lr=config.lr)
        self.sums = torch.zeros(4, device=context.device)  # the three errors, steps
        self.weights = torch.tensor([config.w_weight, config.l1_weight, config.l2_weight], device=context.device)
        self.steps = max(1, math.ceil(config.kimg * 1000 / config.batch_size))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next step is the one that would have come."""
        return {"encoder": self.encoder.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums}

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken."""
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "sums" in state:  # older checkpoints were written when they were zero
            self.sums = state["sums"].to(self.context.device)

    def step(self, i: int) -> None:
        """Step `i`, counted from 1, on this worker's part of its samples."""
        config, context = self.config, self.context
        draws = StepDraws(derive(config.seed, "encoder"), i, config.batch_size, context.rank, context.world_size)
        self.optimizer.param_groups[0]["lr"] = learning_rate(config.lr, (i - 1) / self.steps, 1 / self.steps)
        with torch.no_grad():
            w = sample_w(self.generator, config, draws)
        errors = losses(self.encoder, self.generator, w, config)
        self.optimizer.zero_grad(set_to_none=True)
        (errors @ self.weights).backward()
        context.average_([p.grad for p in self.encoder.parameters() if p.grad is not None])
        self.optimizer.step()
        self.sums += torch.cat([errors.detach(), errors.new_ones(1)])

    def report(self) -> dict[str, float]:
        """Mean errors since the last call, over all workers; raises UserError if they are no numbers."""
        self.context.average_([self.sums])
        means = self.sums[:3] / self.sums[3]
        w, l1, l2 = means.tolist()
        loss = float(means @ self.weights)
        self.sums.zero_()
        if not math.isfinite(loss):
            raise UserError(f"encoder training diverged: its loss is {loss}; lower encoder.lr (now {self.config.lr:g})")
        return {"loss": loss, "w_error": w, "l1": l1, "l2": l2}


def train_encoder(config: EncoderConfig, generator: LatentGenerator, generator_sha256: str, context: RunContext) -> Encoder:
    """Train an encoder for a frozen generator on `context.device`, which is where the generator must be.

    Each worker works on its part of every batch; gradients are averaged. Every `report_kimg` errors and a checkpoint go
    to `context.report`. Goes on from the newest checkpoint, on one CPU worker with the very numbers of an
    uninterrupted run. The samples of a step depend on (seed, step) alone. The weights that are returned are rounded as they are
    stored. Raises UserError if training diverges.
    """
    check_workers(config, context.world_size)
    training = _Training(config, generator, context)
    about = {"config": config.model_dump(mode="json"), "generator_sha256": generator_sha256}
    first = 0
    if (found := checkpoint.newest(context, PROGRESS)) is not None:
        progress, state = _read_checkpoint(found, about)
        first = progress["step"]
        training.load(state)
    per_kimg = 1000 / config.batch_size
    # a last interval of a few steps would say little
    report_every = math.ceil(training.steps / max(1, round(config.kimg / config.report_kimg)))
    began, pace = time.monotonic(), Pace(context, None)
    for i in range(first + 1, training.steps + 1):
        training.step(i)
        leaving = i < training.steps and pace.looks() and pace.wants_checkpoint()[1]
        progress = {**about, "step": i, "of": training.steps}
        if i % report_every and i < training.steps:
            if leaving:
                context.average_([training.sums])  # a checkpoint holds one worker's
                checkpoint.hand_over_state(context, {}, PROGRESS, progress, training.state(), wait=True)
            continue
        speed = (i - first) * config.batch_size / (time.monotonic() - began)
        metrics = {"kimg": i / per_kimg, **training.report(), "images_per_second": speed}
        wait = leaving or i == training.steps
        checkpoint.hand_over_state(context, metrics, PROGRESS, progress, training.state(), wait=wait)
    training.encoder.load_state_dict(as_stored(training.encoder))
    return training.encoder.eval().requires_grad_(False)


def _read_checkpoint(folder: Place, about: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of itself, and its tensors; raises UserError if it is damaged or of another training."""
    path = at(folder) / PROGRESS
    if not path.is_file():
        raise UserError(f"'{folder}' is no checkpoint of an encoder training (no {PROGRESS})")
    progress: dict[str, Any] = path.read_json()
    if progress["generator_sha256"] != about["generator_sha256"]:
        raise UserError(f"'{folder}' was trained for another generator; give another --output or remove it")
    if EncoderConfig.recorded(progress["config"]) != about["config"]:
        raise UserError(f"'{folder}' was trained with other settings under encoder.*; give another --output or remove it")
    return progress, checkpoint.load_state(folder)


def result_of(folder: Place, config: EncoderConfig, generator: LatentGenerator, generator_sha256: str) -> Encoder:
    """The encoder of a finished training's last checkpoint, with its weights as they are stored.

    Raises UserError if it is damaged, of another training, or not the last.
    """
    about = {"config": config.model_dump(mode="json"), "generator_sha256": generator_sha256}
    progress, state = _read_checkpoint(folder, about)
    steps.require_last(folder, progress)
    encoder = untrained(config, generator)
    encoder.load_state_dict(state["encoder"])
    encoder.load_state_dict(as_stored(encoder))
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def fresh_errors(encoder: Encoder, generator: LatentGenerator, config: EncoderConfig, samples: int = 1024) -> dict[str, float]:
    """Pixel errors of g(encoder(x)), and of g(w_mean), on samples that no training step has seen.

    `l1` and `l2` are over samples as in training, `l1_of_w` over plain ones (no spread, no mixing), `l1_of_mean` is what
    w_mean has on the first. Images are clamped to [0, 1].
    """
    size, together = min(64, samples), chunk_size(generator.resolution)
    sums = torch.zeros(4)
    of_mean = generator.synthesis(generator.w_mean.expand(1, generator.num_ws, -1))
    for k in range(samples // size):
        draws = StepDraws(derive(config.seed, "fresh samples"), k, size)
        mixed, z = sample_w(generator, config, draws), draws.normal(generator.z_dim)
        for w, z_part in zip(mixed.split(together), z.split(together), strict=True):
            x = generator.synthesis(w)
            difference = generator.synthesis(encoder(x)) - x
            plain = generator.synthesis(generator.mapping(z_part.to(x.device)))
            of_w = generator.synthesis(encoder(plain)) - plain
            values = [difference.abs(), difference.square(), of_w.abs(), (of_mean - x).abs()]
            sums += torch.stack([v.mean() for v in values]).cpu() * (len(x) / size)
    names = ("l1", "l2", "l1_of_w", "l1_of_mean")
    return {**dict(zip(names, (sums / (samples // size)).tolist(), strict=True)), "samples": samples // size * size}
