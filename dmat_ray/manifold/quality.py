"""How good samples are: FID, precision and recall of features, and how far two samples of a class lie apart.

FID (Heusel et al., arXiv 1706.08500) and precision and recall (Kynkaanniemi et al., arXiv 1904.06991) are computed by
torch-fidelity. Features come from Inception, from any classifier trained here, or from a small classifier that is
trained on the labelled images themselves: the only one of the three that a machine without downloads and with digits
has. Numbers of different networks, or of different numbers of samples, do not compare.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.config import ClassifierConfig, QualityConfig
from dmat_ray.data.pixels import unit
from dmat_ray.errors import UserError
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.diversity import class_means, distances, pair_count, real_pairs, uneven
from dmat_ray.manifold.samples import chunk_size, samples
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.networks.weights import locate
from dmat_ray.rng import kept_apart
from dmat_ray.types import RunContext

# images (B, C, H, W), float in [0, 1], on the network's device -> features (B, F)
Features = Callable[[Tensor], Tensor]
State: TypeAlias = dict[str, Tensor]

NEIGHBOURS = 3  # of precision and recall, as published


def train_classifier(x_BCHW: Tensor, y_B: Tensor, num_classes: int, epochs: int, device: torch.device) -> classifiers.Classifier:
    """A small classifier of uint8 or [0, 1] images, with shifts as augmentation, in eval mode. Leaves the global RNG alone."""
    with kept_apart(device):
        torch.manual_seed(1)
        network = classifiers.build(ClassifierConfig(name="digits_cnn"), x_BCHW.shape[1], num_classes).to(device)
    rng = torch.Generator().manual_seed(1)
    steps = max(1, len(x_BCHW) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(x_BCHW), generator=rng)
        for step in range(steps):
            pick = order[step * 64 : (step + 1) * 64]
            shift = torch.randint(-2, 3, (2,), generator=rng).tolist()
            images = torch.roll(unit(x_BCHW[pick]).to(device), shift, dims=(2, 3))
            loss = F.cross_entropy(network(images), y_B[pick].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def classifier_features(network: nn.Module) -> Features:
    """What the last linear layer of a classifier takes in."""
    last = _linear_layers(network)[-1]
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))

    def features(x_BCHW: Tensor) -> Tensor:
        seen.clear()
        network(x_BCHW)
        return seen.pop().flatten(1)

    return features


def inception_features(path: Path, device: torch.device) -> Features:
    """Inception's 2,048 pooled features, by torch-fidelity, which resizes as FID's authors did."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever its file holds: give it one that was written here, from nothing but tensors
        tensors = io.BytesIO()
        torch.save({str(key): value for key, value in state.items() if isinstance(value, Tensor)}, tensors)
        tensors.seek(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tensors).to(device)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"gan.quality.weights '{path}' does not hold Inception's weights ({type(error).__name__})") from None

    def features(x_BCHW: Tensor) -> Tensor:
        colour = x_BCHW.expand(-1, 3, -1, -1) if x_BCHW.shape[1] == 1 else x_BCHW
        pooled: Tensor = network((colour * 255).round().to(torch.uint8))[0]
        return pooled

    return features


def check(config: QualityConfig, channels: int, resolution: int, labels: Tensor) -> None:
    """Raise UserError if what `config.network` names cannot judge such images; trains and loads nothing."""
    if config.network == "inception":
        locate("inception", config.weights, "gan.quality.weights", "gan.quality.network classifier does without")
    elif config.network == "classifier":
        if len(torch.unique(labels)) < 2:
            raise UserError("gan.quality.network 'classifier' needs images of two classes or more; choose 'inception' or 'none'")
    elif config.network != "none":
        run = checkpoint.read_run(config.network)
        if "program" in run:
            raise UserError(f"gan.quality.network '{config.network}' is an imported program, whose features cannot be had")
        if (run["channels"], run["resolution"]) != (channels, resolution):
            raise UserError(
                f"gan.quality.network '{config.network}' takes {run['resolution']}x{run['resolution']} images with "
                f"{run['channels']} channel(s), the generator makes {resolution}x{resolution} with {channels}"
            )
        classifier = checkpoint.settings_of(run).classifier
        with kept_apart():  # weights that nobody uses must not move what is drawn next
            network = classifiers.build(classifier, channels, len(run["class_names"]))
        if not _linear_layers(network):
            raise UserError(
                f"gan.quality.network '{config.network}' is a {classifier.name}, which has no linear layer to take features "
                "from; give another classifier's folder, 'classifier', 'inception' or 'none'"
            )
    if config.network != "none" and len(labels) <= NEIGHBOURS:
        raise UserError(
            f"gan.quality needs {NEIGHBOURS + 1} images or more, of which it looks for the nearest, and there are {len(labels)}; "
            "take more, or gan.quality.network none"
        )


@torch.no_grad()
def of_first_worker(network: nn.Module, context: RunContext) -> None:
    """Every worker's weights and statistics become the first one's: what GPUs train from one seed differs a little."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    for tensor in tensors:
        tensor.mul_(context.world_size if context.rank == 0 else 0)
    context.average_(tensors)


def own_network(
    config: QualityConfig, images: Tensor, labels: Tensor, context: RunContext, state: State | None = None
) -> classifiers.Classifier:
    """The classifier of the images themselves, the same on all workers: of an earlier one's `state`, or trained."""
    if not state:
        network = train_classifier(images, labels, int(labels.max()) + 1, config.epochs, context.device)
        of_first_worker(network, context)
        return network
    with kept_apart():
        network = classifiers.build(ClassifierConfig(name="digits_cnn"), images.shape[1], int(labels.max()) + 1)
    network.load_state_dict(state)
    return network.to(context.device).eval().requires_grad_(False)


def feature_network(
    config: QualityConfig, images: Tensor, labels: Tensor, context: RunContext, state: State | None = None
) -> tuple[Features | None, State]:
    """The features that `config.network` names, the same on all workers, or None for 'none'; and the weights of what was trained
    for them, which as `state` give the very same. Raises UserError if they cannot be had.
    """
    device = context.device
    check(config, images.shape[1], images.shape[2], labels)
    if config.network == "none":
        return None, {}
    if config.network == "inception":
        return inception_features(locate("inception", config.weights, "gan.quality.weights"), device), {}
    if config.network == "classifier":
        network = own_network(config, images, labels, context, state)
        return classifier_features(network), network.state_dict()
    return classifier_features(checkpoint.load_classifier(config.network, device)[0]), {}


class Judge:
    """Compares a generator's samples with `images` (N, C, H, W), uint8 or in [0, 1], of `labels` (N).

    Classes matter if the generator has them (`conditional`): samples whose features are compared have them as often as images.
    Trains its network when it is made, if the settings say so and there is no `state` of an earlier one: FIDs of two networks
    do not compare. All workers of `context` make one and call it together; each does its part. Raises UserError if the network
    cannot be had.
    """

    def __init__(
        self,
        config: QualityConfig,
        images: Tensor,
        labels: Tensor,
        context: RunContext,
        state: State | None = None,
        *,
        conditional: bool = True,
    ) -> None:
        self.config, self._context = config, context
        self._features, self.state = feature_network(config, images, labels, context, state)
        self._chunk = chunk_size(images.shape[2])
        rng = torch.Generator().manual_seed(0)
        self._paired = pair_count(config.samples, len(torch.unique(labels)) if conditional else 0)
        pairs = real_pairs(labels if conditional else torch.zeros_like(labels), self._paired, rng)
        distance = torch.zeros(self._paired // 2, device=context.device)
        for place in self._places(self._paired):
            x = unit(images[pairs[place]]).to(context.device)
            distance[place.start // 2 : place.stop // 2] = distances(x)
        self._real_distance = class_means(self._gathered(distance), labels[pairs[::2]] if conditional else None)
        if unjudged := [c for c, apart in self._real_distance.items() if c is not None and apart == 0]:
            context.say(
                f"note: of {len(unjudged)} of {len(self._real_distance) - 1} classes no two real images differ, so that how far "
                f"samples of them lie apart is not judged; the first is of label {unjudged[0]}"
            )
        self._real: Tensor | None = None
        self._classes: Tensor | None = None
        if self._features is not None:
            chosen = torch.randperm(len(images), generator=rng)[: self._count]
            rows = [(p, self._of(unit(images[chosen[p]]).to(context.device))) for p in self._places(len(chosen))]
            self._real = self._assembled(rows, len(chosen))
            if conditional and uneven(labels):
                self._classes = labels[chosen[torch.arange(self._count) % len(chosen)]]

    @property
    def _count(self) -> int:
        return self.config.samples // 2 * 2

    def _places(self, count: int) -> list[slice]:
        """This worker's chunks of `count` images, pairs kept together."""
        size = self._chunk + self._chunk % 2
        starts = range(self._context.rank * size, count, self._context.world_size * size)
        return [slice(start, min(start + size, count)) for start in starts]

    def _gathered(self, parts: Tensor) -> Tensor:
        """Every worker's rows, of which each filled its own and left the others at 0."""
        parts = parts * self._context.world_size
        self._context.average_([parts])
        return parts.cpu()

    def _assembled(self, rows: list[tuple[slice, Tensor]], count: int) -> Tensor:
        # every worker must know the width, also one that has no chunk
        width = torch.tensor([float(rows[0][1].shape[1]) if rows else 0.0], device=self._context.device)
        has = torch.tensor([float(bool(rows))], device=self._context.device)
        self._context.average_([width, has])
        features = torch.zeros(count, round(float(width / has)), device=self._context.device)
        for place, part in rows:
            features[place] = part
        return self._gathered(features)

    def __call__(self, generator: LatentGenerator) -> dict[str, float]:
        """`diversity`, `lowest_diversity`, and where there are features `fid`, `precision` and `recall`, of samples.

        Diversity is the mean pixel distance of two samples over that of two real images; of one class, if the generator has
        classes, which have as many pairs each, and then the lowest of them (of which real images differ) is told as well.
        """
        rank, world_size, device = self._context.rank, self._context.world_size, self._context.device
        distance, classes = torch.zeros(self._paired // 2, device=device), torch.zeros(self._paired // 2, device=device)
        for place, x, label in samples(generator, self._paired, pairs=True, rank=rank, world_size=world_size):
            half = slice(place.start // 2, place.stop // 2)
            distance[half] = distances(x)
            if label is not None:
                classes[half] = label[::2].float()
        made = class_means(self._gathered(distance), self._gathered(classes).round().long() if generator.num_classes else None)
        ratios = {c: made[c] / max(self._real_distance[c], 1e-6) for c in made if c is None or self._real_distance.get(c)}
        found = {"diversity": ratios[None], "lowest_diversity": min(ratios.values())}
        if self._real is not None:
            parts = samples(generator, self._count, pairs=False, classes=self._classes, rank=rank, world_size=world_size)
            found |= compare(self._assembled([(place, self._of(x)) for place, x, _ in parts], self._count), self._real)
        return found

    @torch.no_grad()
    def _of(self, x_BCHW: Tensor) -> Tensor:
        assert self._features is not None
        return self._features(x_BCHW).float()

    def collapsed(self, quality: dict[str, float]) -> bool:
        """True if samples (of a class) are much closer to each other than real images are, or are no numbers."""
        return not quality["lowest_diversity"] >= self.config.diversity_floor

    def is_better(self, new: dict[str, float], old: dict[str, float]) -> bool:
        """Whether a later snapshot of this quality takes the place of an earlier one.

        Alive before collapsed, then the lower FID, or without FID and both collapsed the higher diversity; of equals the later.
        """
        if self.collapsed(new) != self.collapsed(old):
            return self.collapsed(old)
        if "fid" in new:
            return new["fid"] <= old["fid"]
        return not self.collapsed(new) or not _or_lowest(new["lowest_diversity"]) < _or_lowest(old["lowest_diversity"])


def _or_lowest(diversity: float) -> float:
    return -math.inf if math.isnan(diversity) else diversity


def compare(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """FID, precision and recall of features (N, F) of samples against those of real images."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    if not bool(torch.isfinite(made).all()):
        return {"fid": math.inf, "precision": 0.0, "recall": 0.0}
    statistics = [fid_features_to_statistics(f.double()) for f in (made, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    prc = prc_features_to_metric(made, real, prc_neighborhood=neighbours, prc_batch_size=10_000, save_cpu_ram=True, verbose=False)
    return {"fid": float(fid), "precision": float(prc["precision"]), "recall": float(prc["recall"])}
