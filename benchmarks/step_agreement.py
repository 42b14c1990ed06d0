"""Is it the same step? Sides of benchmarks/train_step.py beside the published one, from the same weights."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from step_sides import Published, Side, input_gradient
from torch import Tensor

FIRST_RATE = 0.01  # of the step that is compared


@dataclass(frozen=True)
class Seen:
    """What a side does from where all sides start."""

    signs: tuple[Tensor, Tensor]
    gradient: Tensor
    loss: float
    weights: dict[str, Tensor]
    move: Tensor


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().contiguous().flatten().double() for t in tensors])


def see(side: Side, start: Published, images: tuple[Tensor, Tensor]) -> Seen:
    """First gradients, the update from given images, and a whole step; `start` says where attacks begin."""
    x, w, y = side.batch.x_BCHW, side.batch.w_BLD, side.batch.y_B
    assert w is not None
    delta, shift = ((x + start.delta).clamp(0, 1) - x).requires_grad_(), start.start.clone().requires_grad_()
    with side.attacked() as network:
        signs = (
            input_gradient(network, x + delta, y, delta).sign(),
            input_gradient(network, side.synthesis(w + shift), y, shift).sign(),
        )
    parameters, statistics = dict(side.network.named_parameters()), copy.deepcopy(dict(side.network.named_buffers()))
    side.update(*images)
    gradient = flat(p.grad for p in parameters.values() if p.grad is not None)
    with torch.no_grad():
        for name, buffer in side.network.named_buffers():
            buffer.copy_(statistics[name])
    before = flat(parameters.values())
    loss = float(side(FIRST_RATE))
    weights = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in parameters.items()}
    return Seen(signs, gradient, loss, weights, flat(parameters.values()) - before)


def agreement(sides: Mapping[str, Side], control: Published) -> dict[str, dict[str, float]]:
    """Every side beside the published one, printed; and each one's move beside that of ours in float32.

    `control` is the published one with rounding of its input, the row that whole steps are to be held against.
    """
    first = sides["published"]
    assert isinstance(first, Published)
    compared = [k for k, p in first.network.named_parameters() if p.abs().max() > 0]
    with first.attacked() as network:
        images = first.image_attack(network), first.latent_attack(network)
    found = {name: see(side, first, images) for name, side in {**sides, "published, w off by 1e-6": control}.items()}
    truth, single = found["published"], found.get("ours float32")
    print(f"{'':25}  signs of the first gradient  gradient, same images   whole step")
    print(
        f"{'to published':25} {'image':>14} {'latent':>14} {'off by':>10} {'cosine':>9} {'loss':>10} {'weights':>8} {'cosine':>8}"
    )
    rows = {}
    for name, own in found.items():
        signs = [float((a == b).float().mean()) for a, b in zip(own.signs, truth.signs, strict=True)]
        row = {
            "image_signs": signs[0],
            "latent_signs": signs[1],
            "gradient": float((own.gradient - truth.gradient).norm() / truth.gradient.norm()),
            "gradient_cosine": float(F.cosine_similarity(own.gradient, truth.gradient, dim=0)),
            "loss": abs(own.loss - truth.loss) / abs(truth.loss),
            "weights": max(
                float((own.weights[k] - w).abs().max() / w.abs().max()) for k, w in truth.weights.items() if k in compared
            ),
            "cosine": float(F.cosine_similarity(own.move, truth.move, dim=0)),
        }
        if single is not None:
            row["cosine_to_float32"] = float(F.cosine_similarity(own.move, single.move, dim=0))
            row["gradient_cosine_to_float32"] = float(F.cosine_similarity(own.gradient, single.gradient, dim=0))
        print(
            f"{name:25} {signs[0]:14.3%} {signs[1]:14.3%} {row['gradient']:10.1e} {row['gradient_cosine']:9.6f} "
            f"{row['loss']:10.1e} {row['weights']:8.1e} {row['cosine']:8.5f}"
        )
        rows[name] = row
    if "ours bf16" in rows and single is not None:
        row = rows["ours bf16"]
        print(
            f"ours bf16 to ours float32: cosine of the gradient from the same images {row['gradient_cosine_to_float32']:.6f}, "
            f"of a whole step's move {row['cosine_to_float32']:.6f}"
        )
    print(f"loss of the published step: {truth.loss:.6f}")
    return rows
