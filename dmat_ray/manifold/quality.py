"""How good samples are: FID, precision and recall of features, and how far two samples of a class lie apart.

FID (Heusel et al., arXiv 1706.08500) and precision and recall (Kynkaanniemi et al., arXiv 1904.06991) are computed by
torch-fidelity. Features come from Inception, from any classifier trained here, or from a small classifier that is
trained on the labelled images themselves: the only one of the three that a machine without downloads and with digits
has. Numbers of different networks, or of different numbers of samples, do not compare.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray import checkpoint, classifiers
from dmat_ray.config import ClassifierConfig, QualityConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.samples import samples
from dmat_ray.weights import locate

BATCH = 250

# images (B, C, H, W), float in [0, 1], on the network's device -> features (B, F)
Features = Callable[[Tensor], Tensor]


def train_classifier(x_BCHW: Tensor, y_B: Tensor, num_classes: int, epochs: int, device: torch.device) -> classifiers.Classifier:
    """A small classifier of uint8 or [0, 1] images, with shifts as augmentation, in eval mode. Leaves the global RNG alone."""
    with torch.random.fork_rng(devices=[]):
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
            images = torch.roll(_unit(x_BCHW[pick]).to(device), shift, dims=(2, 3))
            loss = F.cross_entropy(network(images), y_B[pick].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def classifier_features(network: nn.Module) -> Features:
    """What the last linear layer of a classifier takes in."""
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
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


def feature_network(config: QualityConfig, images: Tensor, labels: Tensor, device: torch.device) -> Features | None:
    """The features that `config.network` names, or None for 'none'; raises UserError if they cannot be had."""
    if config.network == "none":
        return None
    if config.network == "inception":
        path = locate("inception", config.weights, "gan.quality.weights", "gan.quality.network classifier does without")
        return inception_features(path, device)
    if config.network != "classifier":
        network, run = checkpoint.load_classifier(Path(config.network), device)
        if (run["channels"], run["resolution"]) != (images.shape[1], images.shape[2]):
            raise UserError(
                f"gan.quality.network '{config.network}' takes {run['resolution']}x{run['resolution']} images with "
                f"{run['channels']} channel(s), the generator makes {images.shape[2]}x{images.shape[2]} with {images.shape[1]}"
            )
        return classifier_features(network)
    num_classes = int(labels.max()) + 1
    if len(torch.unique(labels)) < 2:
        raise UserError("gan.quality.network 'classifier' needs images of two classes or more; choose 'inception' or 'none'")
    return classifier_features(train_classifier(images, labels, num_classes, config.epochs, device))


def _unit(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


class Judge:
    """Compares a generator's samples with `images` (N, C, H, W), uint8 or in [0, 1], of `labels` (N).

    Trains its network when it is made, if the settings say so. Raises UserError if the network cannot be had.
    """

    def __init__(self, config: QualityConfig, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.config, self.device = config, device
        self._features = feature_network(config, images, labels, device)
        rng = torch.Generator().manual_seed(0)
        self._real_distance = distance_of_pairs(_unit(images[real_pairs(labels, config.samples, rng)]))
        self._real = None
        if self._features is not None:
            chosen = torch.randperm(len(images), generator=rng)[: config.samples]
            self._real = torch.cat([self._of(_unit(images[part]).to(device)) for part in chosen.split(BATCH)])

    def __call__(self, generator: LatentGenerator) -> dict[str, float]:
        """`diversity` of the samples, and where there are features their `fid`, `precision` and `recall`.

        Diversity is the mean pixel distance of two samples of one class over that of two real images of one class.
        """
        chunks = [distance_of_pairs(x) * len(x) for x in samples(generator, self.config.samples, pairs=True)]
        made_distance = sum(chunks) / (self.config.samples // 2 * 2)
        found = {"diversity": made_distance / max(self._real_distance, 1e-6)}
        if self._real is not None:
            made = torch.cat([self._of(x) for x in samples(generator, self.config.samples, pairs=False)])
            found |= compare(made, self._real)
        return found

    @torch.no_grad()
    def _of(self, x_BCHW: Tensor) -> Tensor:
        assert self._features is not None
        return self._features(x_BCHW).float().cpu()

    def collapsed(self, quality: dict[str, float]) -> bool:
        """True if samples of a class are much closer to each other than real images are."""
        return quality["diversity"] < self.config.diversity_floor


def compare(made: Tensor, real: Tensor, neighbours: int = 3) -> dict[str, float]:
    """FID, precision and recall of features (N, F) of samples against those of real images."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    statistics = [fid_features_to_statistics(f.double()) for f in (made, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    prc = prc_features_to_metric(made, real, prc_neighborhood=neighbours, prc_batch_size=10_000, save_cpu_ram=True, verbose=False)
    return {"fid": float(fid), "precision": float(prc["precision"]), "recall": float(prc["recall"])}


def distance_of_pairs(x_BCHW: Tensor) -> float:
    """Mean absolute pixel difference between images 2i and 2i + 1, in the images' units."""
    return float((x_BCHW[0::2] - x_BCHW[1::2]).abs().mean())


def real_pairs(labels: Tensor, count: int, rng: torch.Generator) -> list[int]:
    """Positions of `count` images: a random one, then another of its class, and so on."""
    members = {int(c): torch.nonzero(labels == c).flatten() for c in torch.unique(labels)}
    pairs: list[int] = []
    for i in torch.randint(len(labels), (max(1, count // 2),), generator=rng).tolist():
        group = members[int(labels[i])]
        others = group[group != i] if len(group) > 1 else group
        pairs += [i, int(others[int(torch.randint(len(others), (1,), generator=rng))])]
    return pairs
