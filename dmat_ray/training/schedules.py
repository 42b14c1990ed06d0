"""Learning rates as functions of the epoch, counted in fractions."""

import math

import numpy as np

from dmat_ray.config import TrainingConfig

RISE, START, END = 0.3, 1 / 25, 1 / 25 / 1e4  # of the one-cycle policy: share of epochs, and rates as shares of the largest


def learning_rate(config: TrainingConfig, epoch: float) -> float:
    """The rate at `epoch`, in [0, config.epochs]; constant beyond either end."""
    if config.schedule == "piecewise":
        return float(np.interp(epoch, config.lr_epochs, config.lr_values))
    epoch = min(max(epoch, 0.0), config.epochs)
    if config.schedule == "cosine":
        if epoch < config.lr_warmup:
            return config.lr * epoch / config.lr_warmup
        return _half_cosine(config.lr, 0.0, (epoch - config.lr_warmup) / (config.epochs - config.lr_warmup))
    top = RISE * config.epochs
    if epoch < top:
        return _half_cosine(config.lr * START, config.lr, epoch / top)
    return _half_cosine(config.lr, config.lr * END, (epoch - top) / (config.epochs - top))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
