"""What a job will compute and what that will cost, before any machine starts.

Passes of the networks are counted from the settings, and the operations of a pass by PyTorch, on tensors without data. All
numbers are upper bounds, but for FAB's and for terms that are sampled, of which it is the mean: searches that stop early, and
rows that meet only what others have left, take less. What is not multiplied with matrices (decoding, rendering of unseen threats,
batch norm) is not counted, nor are the images of a report.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dmat_ray.attack.search import STRAYS
from dmat_ray.config import (
    ON_MANIFOLD,
    AttackConfig,
    AttackRow,
    AutoAttackRow,
    Config,
    EvaluationConfig,
    PerceptualThreat,
    ProjectionConfig,
    Row,
)
from dmat_ray.evaluation import probes
from dmat_ray.evaluation.units import applies, rows_to_run
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.discriminator import GROUP, Discriminator
from dmat_ray.manifold.encoder import untrained
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.networks import classifiers
from dmat_ray.training import objectives, validation
from dmat_ray.types import Generator
from dmat_ray.wording import number_of

# passes an image, forward and back, and forward alone, of AutoAttack's parts: their usual steps, ten classes; FAB's are rough
AUTOATTACK = {
    "apgd-ce": (100, 0),
    "apgd-dlr": (100, 0),
    "apgd-t": (900, 0),
    "fab": (1000, 300),
    "fab-t": (900, 900),
    "square": (0, 5000),
}
# passes forward of the network of a perceptual attack, of a step and of a search besides: most are its way back into the ball
NOISE, DISTANCE = 12, 2  # the same of a random start, and of a distance
PERCEPTUAL = {"pgd": (36, 14), "momentum": (36, 14), "apgd": (48, 14), "lagrange": (5, 26), "lpa": (5, 26), "random": (12, 14)}


@dataclass(frozen=True)
class Passes:
    """Floating-point operations of one image (of shape `image`, C H W) through each network: forward, forward and back to the
    input, with weights too.
    """

    generator: int
    generator_back: int
    classifier: int
    classifier_back: int
    classifier_train: int
    lpips_back: int
    image: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """A stage's work: how many images, at most so many operations in all, on so many workers."""

    name: str
    images: int
    work: str
    flops: float
    workers: int

    def hours(self, tflops: float) -> float:
        """Of its workers together, each of which keeps up so many TFLOP/s."""
        return self.flops / (tflops * 1e12) / 3600


def counted(forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, back: bool = False, device: str = "meta") -> int:
    """Operations of a call on a tensor of this shape, without data; with `back` also of the gradient to it, and to the weights
    that want one."""
    x = torch.zeros(shape, device=device, requires_grad=back)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(back):
        y = forward(x)
        if back:
            y.sum().backward()
    return int(counter.get_total_flops())


def passes(config: Config, generator: Generator, num_classes: int) -> Passes:
    """What one image costs. `generator` is on the CPU; it, the classifier and LPIPS are copied without their data."""
    shape = (1, generator.channels, generator.resolution, generator.resolution)
    bare: Generator = copy.deepcopy(generator).to("meta")  # type: ignore[attr-defined]
    w_shape = (1, generator.num_ws, generator.w_dim)
    # batch norm of one image has no statistics in training mode; its operations are the same
    network = classifiers.build(config.classifier, generator.channels, num_classes).eval()
    forward, back, train = _of_classifier(network, shape)
    return Passes(
        generator=counted(bare.synthesis, w_shape),
        generator_back=counted(bare.synthesis, w_shape, back=True),
        classifier=forward,
        classifier_back=back,
        classifier_train=train,
        lpips_back=_lpips(config.projection, shape),
        image=shape[1:],
    )


def with_classifier(one: Passes, network: nn.Module) -> Passes:
    """The same of another classifier, which is on the CPU and in eval mode."""
    forward, back, train = _of_classifier(network, (1, *one.image))
    return replace(one, classifier=forward, classifier_back=back, classifier_train=train)


def _of_classifier(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Forward, forward and back to the input, with weights too. Its parameters want no gradients afterwards."""
    device = "cpu"
    try:
        bare = copy.deepcopy(network).to("meta")
        train = counted(bare, shape, back=True)
        network, device = bare, "meta"
    except Exception:  # without data nothing can be done that depends on the values of the input
        train = counted(network, shape, back=True, device=device)
    network.requires_grad_(False)
    return counted(network, shape, device=device), counted(network, shape, back=True, device=device), train


def _lpips(config: ProjectionConfig, shape: tuple[int, ...]) -> int:
    if config.lpips == 0:
        return 0
    from dmat_ray.networks.perceptual import SMALLEST, Perceptual  # lpips takes seconds to import

    if shape[-1] < SMALLEST:
        return 0  # projection refuses them; other stages have no use for it
    network = Perceptual(config.lpips_net, "random", config.seed).to("meta")
    features = network.features(torch.zeros(shape, device="meta"))
    return counted(lambda x: network.distance(x, features), shape, back=True)


@functools.cache
def _judged(net: str, image: tuple[int, ...]) -> int:
    """The network that a perceptual attack compares images by, forward."""
    from dmat_ray.networks.perceptual import SMALLEST, Perceptual

    network, least = Perceptual(net, "random").to("meta"), min(image[1:])
    sides = image[1:] if least >= SMALLEST else [-(-side * SMALLEST // least) for side in image[1:]]
    return counted(lambda x: torch.cat([m.flatten() for m in network.maps(x)]), (1, image[0], *sides))


def _render(one: Passes, row: AttackConfig) -> int:
    return one.generator if isinstance(row, ON_MANIFOLD) else 0


def attack(one: Passes, row: AttackConfig) -> int:
    """An image under one attack at one eps, the image that it ends with included."""
    on_manifold = isinstance(row, ON_MANIFOLD)
    render = _render(one, row)
    gradient = row.method not in ("square", "random")
    step = one.classifier_back + (one.generator_back if on_manifold else 0) if gradient else one.classifier + render
    besides = 0
    if isinstance(row, PerceptualThreat):
        a_step, besides = (passes * _judged(row.net, one.image) for passes in PERCEPTUAL[row.method])
        step += a_step
    targets = row.targets if isinstance(row, Row) else 0
    # what is looked at once more: the image that it ends with, APGD's last candidate
    looks = 1 + (row.method == "apgd")
    searches = row.restarts * max(1, targets)
    likeliest = (searches + 1) * one.classifier if targets else 0  # classes of the clean image
    return searches * (row.steps * step + besides + looks * (render + one.classifier)) + likeliest


def train_generator(config: Config, images: int) -> Stage:
    """Both networks' updates and the penalties; each of these, the gradient of a gradient, is two passes forward and back.
    The judging of snapshots is not counted."""
    settings = config.gan
    shape = settings.architecture
    x_shape = (GROUP, shape.channels, shape.resolution, shape.resolution)
    generator, critic = StyleGAN2(shape).to("meta"), Discriminator(shape).to("meta")
    w_shape = (GROUP, generator.num_ws, generator.w_dim)
    learned, judged = counted(generator.synth, w_shape, back=True), counted(critic, x_shape, back=True)
    generator.requires_grad_(False)  # PyTorch's counter does without a gradient only where none is wanted
    made, felt = counted(generator.synth, w_shape), counted(critic.requires_grad_(False), x_shape, back=True)
    step = learned + felt + made + 2 * judged
    step += 2 * judged // settings.r1_interval if settings.r1_gamma else 0
    step += learned // settings.path_interval if settings.path_length else 0  # two passes of half of the images
    flops = settings.kimg * 1000 * step / GROUP
    work = f"{settings.kimg:g} thousand shown"
    return Stage("generator", images, work, flops, config.cluster.train_workers)


def train_encoder(config: Config, generator: LatentGenerator) -> Stage:
    """Samples of the generator, the encoder's updates, and what they are decoded to."""
    settings = config.encoder
    encoder, bare = untrained(settings, generator).to("meta"), copy.deepcopy(generator).to("meta")
    shape = (1, generator.channels, generator.resolution, generator.resolution)
    w_shape = (1, generator.num_ws, generator.w_dim)
    made, felt = counted(bare.synthesis, w_shape), counted(bare.synthesis, w_shape, back=True)
    each = made + counted(encoder.offset, shape, back=True) + felt
    samples = round(settings.kimg * 1000)
    return Stage("encoder", samples, "samples, once each", samples * each, config.cluster.train_workers)


def project(config: Config, one: Passes, images: int) -> Stage:
    """Every image with all of its steps."""
    settings = config.projection
    flops = images * settings.steps * (one.generator_back + one.lpips_back)
    work = f"at most {settings.steps} steps each"
    return Stage("project", images, work, flops, config.cluster.projection_actors)


def train(config: Config, one: Passes, generator: Generator, images: int) -> Stage:
    """Attacks and updates of every epoch, and what is held out, attacked after each."""
    objective, settings = objectives.build(config.objective, generator), config.training
    held_out = min(settings.val_examples, images)
    looked_at = one.classifier + sum(attack(one, term) for term in validation.terms(config).values())
    attacks = [attack(one, term) for _, term, _ in objective.active]
    kl = [term.divergence == "kl" for _, term, _ in objective.active]
    share, passes = [1.0] * len(attacks), float(len(objective.passes))
    if config.objective.terms == "sample":
        share = [term.weight / sum(objective.weights.values()) for _, term, _ in objective.active]
        # the drawn term's images, and the clean ones that a divergence needs
        passes = 1 + sum(s for s, needs in zip(share, kl, strict=True) if needs)
    attacks = [round(s * (a + needs * one.classifier)) for a, s, needs in zip(attacks, share, kl, strict=True)]
    updates = round(passes * one.classifier_train * (2 if settings.awp_gamma else 1))
    epoch = (images - held_out) * (sum(attacks) + updates) + held_out * looked_at
    name = f"train {config.name}".strip()
    return Stage(name, images, number_of(settings.epochs, "epoch"), settings.epochs * epoch, config.cluster.train_workers)


def evaluate(config: Config, networks: Sequence[Passes], images: int) -> Stage:
    """Every row on every image of every set, of every model, one of `networks` each; with the checks and what is transferred."""
    settings, flops = config.evaluation, 0
    images = min(images, settings.limit or images)
    looked_at = len(probes.examples(settings, np.arange(images)))
    for one in networks:
        for set_name in settings.sets:
            rows = [row for row in rows_to_run(settings).values() if applies(row, set_name)]
            flops += images * sum(_of_row(settings, one, row, len(networks)) for row in rows)
        flops += looked_at * _checks(settings, one)
    work = f"{number_of(len(settings.attacks), 'row')}, {number_of(len(networks), 'model')}"
    return Stage("evaluate", images, work, flops, config.cluster.evaluation_actors)


def _of_row(settings: EvaluationConfig, one: Passes, row: AttackRow, models: int) -> int:
    """An image under one row, and what a model says of it and of the clean image.

    Where images are transferred, each model says so of those of all `models`.
    """
    flops = 2 * one.classifier * (models if row.name in settings.transfer else 1)
    if settings.lpips != "none":
        flops += DISTANCE * _judged(settings.lpips, one.image)
    if isinstance(row, AutoAttackRow):
        back, forward = AUTOATTACK[row.part]
        return flops + back * one.classifier_back + forward * one.classifier
    if not isinstance(row, Row):
        return flops
    if isinstance(row, PerceptualThreat):
        flops += DISTANCE * _judged(row.net, one.image)
    return flops + attack(one, row)


def _checks(settings: EvaluationConfig, one: Passes) -> int:
    """An image in all that `probes` measures of a model and of the attacks on it."""
    # two answers, two ranges, other images in the batch, a step to either side; the gradients of two losses of one answer
    flops = 6 * one.classifier + 2 * one.classifier_back + attack(one, probes.LARGE_ATTACK)
    for row in probes.attacks(settings).values():
        flops += _course(one, row)
        if probes.has_restarts(row):
            flops += probes.RESTARTS * attack(one, row.model_copy(update={"restarts": 1}))
    return flops


def _course(one: Passes, row: Row) -> int:
    """An image in one search of a row, of which every query is noted, and under noise of its budget."""
    noise = _render(one, row) + one.classifier
    flops = attack(one, row.model_copy(update={"restarts": 1, "targets": 0})) + (row.targets > 0) * one.classifier
    if isinstance(row, PerceptualThreat):
        noise += NOISE * _judged(row.net, one.image)
        flops += (row.method in STRAYS) * (row.steps + 1) * DISTANCE * _judged(row.net, one.image)
    return flops + probes.RESTARTS * noise


def search(config: Config, each: Stage, trials: int) -> Stage:
    """Every trial with all of its epochs; schedulers end most of them sooner. What trials are judged by is not counted."""
    work = f"{number_of(trials, 'trial')}, {number_of(config.tune.epochs, 'epoch')}"
    return replace(each, name="search", work=work, flops=trials * each.flops)


def confirm(config: Config, each: Stage) -> Stage:
    """The best settings and those of the start, trained anew with several seeds; `each` is a trial."""
    count, epochs = 2 * config.tune.confirm_seeds, config.training.epochs
    flops = count * each.flops * epochs / config.tune.epochs
    return replace(each, name="confirm", work=f"{number_of(count, 'training')}, {number_of(epochs, 'epoch')}", flops=flops)
