"""A step of dual manifold adversarial training, as published and as `TrainingStep` does it, for benchmarks/train_step.py."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.attack import frozen
from dmat_ray.config import Config
from dmat_ray.local import LocalContext
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.rng import Draws
from dmat_ray.training.step import TrainingStep
from dmat_ray.types import Batch, Generator

EPS, STEP, ETA, LATENT_STEP, STEPS = 4 / 255, 1 / 255, 0.02, 0.005, 5
RATE = 1e-4  # of the steps that are timed
Synthesis = Callable[[Tensor], Tensor]


def settings(**training: Any) -> Config:
    """The step's settings."""
    terms = {
        "image": {"weight": 0.5, "eps": EPS, "step_size": STEP, "steps": STEPS},
        "latent": {"weight": 0.5, "eps": ETA, "step_size": LATENT_STEP, "steps": STEPS},
    }
    return Config.model_validate({"objective": {"clean": {"weight": 0}, **terms}, "training": {"momentum": 0.9, **training}})


def input_gradient(network: nn.Module, x: Tensor, y_B: Tensor, of: Tensor) -> Tensor:
    """Of the cross entropy of images that were made of a tensor."""
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), y_B, reduction="sum"), of)
    return gradient


class Published:
    """The published step. `view` takes the network's place in attacks."""

    def __init__(self, network: nn.Module, synthesis: Synthesis, batch: Batch, view: bool = False) -> None:
        self.network, self.synthesis, self.batch = network, synthesis, batch
        self.view = AttackView(network, torch.float32, channels_last=False) if view else None
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
        x, w = batch.x_BCHW, self._w
        # those of `TrainingStep`, made once: drawing them is no part of what is timed
        self.delta = (Draws(0, batch.id, "train/0/image/0").uniform(*x.shape[1:], like=x) * 2 - 1) * EPS
        self.start = (Draws(0, batch.id, "train/0/latent/0").uniform(*w.shape[1:], like=w) * 2 - 1) * ETA

    @property
    def _w(self) -> Tensor:
        assert self.batch.w_BLD is not None
        return self.batch.w_BLD

    @contextlib.contextmanager
    def attacked(self) -> Iterator[nn.Module]:
        """What attacks go to."""
        if self.view is not None:
            self.view.refresh()
            yield self.view
        else:
            with frozen(self.network):
                yield self.network

    def image_attack(self, network: nn.Module) -> Tensor:
        x, delta = self.batch.x_BCHW, (self.batch.x_BCHW + self.delta).clamp(0, 1) - self.batch.x_BCHW
        for _ in range(STEPS):
            delta = delta.requires_grad_()
            gradient = input_gradient(network, x + delta, self.batch.y_B, delta)
            delta = (delta.detach() + STEP * gradient.sign()).clamp(-EPS, EPS)
            delta = (x + delta).clamp(0, 1) - x
        return (x + delta).clamp(0, 1)

    def latent_attack(self, network: nn.Module) -> Tensor:
        w, move = self._w, self.start
        for _ in range(STEPS):
            move = move.detach().requires_grad_()
            gradient = input_gradient(network, self.synthesis(w + move), self.batch.y_B, move)
            move = (move.detach() + LATENT_STEP * gradient.sign()).clamp(-ETA, ETA)
        with torch.no_grad():
            return self.synthesis(w + move)

    def backward(self, x_image: Tensor, x_latent: Tensor) -> Tensor:
        """Both terms' gradients, into the parameters; returns the loss."""
        self.optimizer.zero_grad()
        losses = [F.cross_entropy(self.network(x), self.batch.y_B) for x in (x_image, x_latent)]
        loss = 0.5 * losses[0] + 0.5 * losses[1]
        loss.backward()
        return loss.detach()

    def __call__(self, rate: float = RATE) -> Tensor:
        with self.attacked() as network:
            images = self.image_attack(network), self.latent_attack(network)
        loss = self.backward(*images)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return loss

    def update(self, x_image: Tensor, x_latent: Tensor) -> None:
        """The gradient to the weights, from these images."""
        self.backward(x_image, x_latent)


class Ours:
    """`TrainingStep` on one batch."""

    def __init__(self, network: nn.Module, generator: Generator, batch: Batch, device: torch.device, **training: Any) -> None:
        context = LocalContext(Path(tempfile.gettempdir()))  # which writes nothing
        context.device = device
        self.step = TrainingStep(settings(**training), network, generator, context)
        self.network, self.synthesis, self.batch = network, generator.synthesis, batch

    @contextlib.contextmanager
    def attacked(self) -> Iterator[nn.Module]:
        """What attacks go to."""
        self.step.view.refresh()
        yield self.step.view

    def __call__(self, rate: float = RATE) -> Tensor:
        return self.step(self.batch, 0, 0, rate)["loss"]

    def update(self, x_image: Tensor, x_latent: Tensor) -> None:
        """The gradient to the weights, from these images."""
        images = {"image": x_image, "latent": x_latent}
        self.step._backward([self.batch], [images], self.step.objective.weights)


Side = Published | Ours


def parts_of(side: Side) -> dict[str, Callable[[], Any]]:
    """What a step is made of, each by itself."""
    w, x, y = side.batch.w_BLD, side.batch.x_BCHW, side.batch.y_B
    assert w is not None

    def generator() -> None:
        for _ in range(STEPS):
            move = torch.zeros_like(w).requires_grad_()
            torch.autograd.grad(side.synthesis(w + move).sum(), move)
        with torch.no_grad():
            side.synthesis(w)

    def attacks() -> None:
        with side.attacked() as network:
            for _ in range(2 * STEPS):
                images = x.detach().requires_grad_()
                input_gradient(network, images, y, images)

    return {"step": side, "generator": generator, "attacks": attacks, "update": lambda: side.update(x, x)}
