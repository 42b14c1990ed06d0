"""AutoAttack (Croce and Hein, arXiv 2003.01690) through its authors' library, pyautoattack: one of its attacks on one batch.

The library draws its random numbers anew from the seed for every batch, and an attack meets what the one before has left, cut
into batches in the order of the set. `evaluation` cuts the same batches, so that an evaluation by many actors gives, example
by example, what the library gives for the whole set in one go.
"""

import contextlib
import io
import logging

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from dmat_ray.attack import frozen
from dmat_ray.config import AutoAttackRow
from dmat_ray.errors import UserError
from dmat_ray.rng import kept_apart
from dmat_ray.threats.balls import ball_norm
from dmat_ray.types import Batch

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-ce": 2, "fab": 2, "square": 2, "apgd-dlr": 3, "fab-t": 3, "apgd-t": 4}


def require_fit(row: AutoAttackRow, num_classes: int) -> None:
    """Raise UserError if the part needs more classes than there are."""
    if num_classes < LEAST_CLASSES[row.part]:
        fit = ", ".join(part for part, least in LEAST_CLASSES.items() if least <= num_classes)
        raise UserError(f"{row.part} needs {LEAST_CLASSES[row.part]} classes or more, the set has {num_classes}; take of {fit}")


def library(network: nn.Module, row: AutoAttackRow, num_classes: int, seed: int, device: torch.device) -> AutoAttack:
    """The library's standard version, told to run this part; its targeted attacks take as many classes as there are, up to 9."""
    with contextlib.redirect_stdout(io.StringIO()):
        attack = AutoAttack(network, norm=NORMS[row.norm], eps=row.eps, seed=seed, version="standard", device=device)
    attack.logger = logging.getLogger("dmat_ray.attack.autoattack")
    attack.attacks_to_run = [row.part]
    for targeted in (attack.apgd_targeted, attack.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
    return attack


def run(network: nn.Module, batch: Batch, row: AutoAttackRow, seed: int) -> tuple[Tensor, Tensor]:
    """The attacked images, and the size of their perturbations (B) in the row's norm. torch's random state stays as it was."""
    with torch.no_grad():
        num_classes = network(batch.x_BCHW[:1]).shape[1]
    require_fit(row, num_classes)
    device = batch.x_BCHW.device
    with kept_apart(device), frozen(network):
        attack = library(network, row, num_classes, seed, device)
        x, _ = attack.run_standard_evaluation(batch.x_BCHW, batch.y_B, batch_size=len(batch))
    x = x.clamp(0.0, 1.0).detach()
    return x, ball_norm(x - batch.x_BCHW, row.norm)
