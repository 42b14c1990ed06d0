"""The course of one image's search: rate and noise by position, Adam for a batch of images at steps of their own.

Rates and noise are the published ones (code of arXiv 2009.02470): up over the first 5 % and down by a cosine over the
last 25 %, noise on w that dies out. An image that stops improving does not stop at once: it goes on at the beginning of
its ramp down, because a plateau at the full rate is where the rate is too large.
"""

import math

import torch
from torch import Tensor

from dmat_ray.config import ProjectionConfig

BETA1, EPSILON = 0.9, 1e-8


def learning_rate(config: ProjectionConfig, step: int) -> float:
    """Adam's rate at `step` of `config.steps`: linear ramp up, constant, cosine ramp down."""
    t = step / config.steps
    down = min(1.0, (1.0 - t) / config.lr_rampdown) if config.lr_rampdown else 1.0
    up = min(1.0, t / config.lr_rampup) if config.lr_rampup else 1.0
    return config.lr * (0.5 - 0.5 * math.cos(down * math.pi)) * up


def noise_scale(config: ProjectionConfig, step: int) -> float:
    """Strength of the noise on w at `step`, in units of the length of w_std."""
    t = step / config.steps
    return config.noise * max(0.0, 1.0 - t / config.noise_ramp) ** 2


def rampdown_start(config: ProjectionConfig) -> int:
    """The first position of the ramp down; with lr_rampdown 0 the end."""
    return min(config.steps, math.ceil(config.steps * (1.0 - config.lr_rampdown) - 1e-9))


class Schedule:
    """Tables of a ProjectionConfig on a device.

    `rate`, `noise` and `smooth` by position (steps + 1 entries, the last for the final w, which is only looked at);
    `first` and `second`, Adam's bias corrections, by the number of updates before (steps entries).
    """

    def __init__(self, config: ProjectionConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        def table(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).to(device, dtype)

        positions = range(config.steps + 1)
        self.steps, self.rampdown = config.steps, rampdown_start(config)
        self.rate = table([learning_rate(config, k) for k in positions])
        self.noise = table([noise_scale(config, k) for k in positions])
        self.smooth = table([config.l1_smooth * (1.0 - k / config.steps) for k in positions])
        # from here on there is no noise, for an image and for all that are further
        self.quiet = next(k for k in positions if all(noise_scale(config, j) == 0 for j in range(k, config.steps + 1)))
        self.first = table([1.0 / (1.0 - BETA1 ** (k + 1)) for k in range(config.steps)])
        self.second = table([1.0 / math.sqrt(1.0 - config.beta2 ** (k + 1)) for k in range(config.steps)])


def adam(m: Tensor, v: Tensor, grad: Tensor, rate_B: Tensor, first_B: Tensor, second_B: Tensor, beta2: float) -> Tensor:
    """What Adam (arXiv 1412.6980) takes off w (B, L, D), each image at its rate and bias corrections; m and v change in place."""
    m.lerp_(grad, 1.0 - BETA1)
    v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    return m.div(v.sqrt().mul_(second_B[:, None, None]).add_(EPSILON)).mul_((rate_B * first_B)[:, None, None])
