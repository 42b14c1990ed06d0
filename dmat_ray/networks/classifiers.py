"""Networks to be trained. Every one takes images in [0, 1] and normalises them inside itself."""

import copy
import difflib
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dmat_ray.config import ClassifierConfig
from dmat_ray.errors import UserError, first_line
from dmat_ray.networks import batch_norm, wide_resnet
from dmat_ray.rng import kept_apart
from dmat_ray.storage.files import sha256
from dmat_ray.wording import did_you_mean

PROGRAM = "program"  # classifier.name of what came as a program
OWN = (
    "own/"  # what classifier.name begins with if it is a network of an installed package, which names it among these entry points
)
NETWORKS = "dmat_ray.networks"
ROUNDING = 1e-3  # of the largest logit: what rounding may make of another batch
HEEDS_OTHERS = (
    "says something else of an image as the other images of its batch change; give one that in eval mode looks at each by itself "
    "(its batch norm with track_running_stats)"
)


class DigitsCNN(nn.Sequential):
    """Four convolutions with batch norm and a linear head, for 32x32 images; about 100,000 weights."""

    def __init__(self, channels: int, num_classes: int) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(channels, 16, 2),
            *block(16, 32, 1),
            *block(32, 64, 2),
            *block(64, 64, 2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4, num_classes),
        )


class Classifier(nn.Module):
    """Normalisation, then the network: x_BCHW in [0, 1] -> logits_BK."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network((x_BCHW - self.mean) / self.std)
        return logits


class Program(nn.Module):
    """A network of others that came as a program (see `model_import`), as the network of a Classifier: frozen, in eval mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def train(self, mode: bool = True) -> "Program":
        """Nothing: a program has the one mode that it was exported in."""
        return self

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.program(x_BCHW)
        return logits


def require_normalisation(config: ClassifierConfig, channels: int) -> None:
    """Raise UserError for a normalisation of another number of channels."""
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, channels):
            raise UserError(f"classifier.{name} has {len(values)} values, images have {channels} channel(s)")


def build(config: ClassifierConfig, channels: int, num_classes: int) -> Classifier:
    """A freshly initialised classifier; raises UserError for an unknown name or a normalisation of another shape.

    Its batch norm knows of terms, see `batch_norm`.
    """
    require_normalisation(config, channels)
    built = network(config.name, channels, num_classes)
    return Classifier(batch_norm.prepare(built), config.mean, config.std)


def network(name: str, channels: int, num_classes: int) -> nn.Module:
    """The bare network of this name: normalised x_BCHW -> logits_BK. Raises UserError for an unknown name."""
    if name == "digits_cnn":
        return DigitsCNN(channels, num_classes)
    if name == PROGRAM:
        raise UserError(f"classifier.name '{PROGRAM}' stands for a program that was imported; it is not built or trained here")
    if (wide := wide_resnet.build(name, channels, num_classes)) is not None:
        return wide
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), channels, num_classes)
    if name.startswith(OWN):
        return _own(name, channels, num_classes)
    import torchvision  # four seconds of imports, which the small network does without

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"classifier.name '{name}' is not known; {did_you_mean(name, ['digits_cnn', *known])}"
            f"choose 'digits_cnn', 'wrn-DEPTH-WIDTH', timm/NAME, {OWN}NAME (of your "
            f"package, see docs/extending.md), or a torchvision model: {', '.join(known)}"
        )
    built: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if channels == 1:
        _take_grey(built)
    return built


def _timm(name: str, channels: int, num_classes: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"classifier.name 'timm/{name}' needs the package timm: uv pip install 'dmat_ray[timm]'") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        like = f"; similar names: {', '.join(near)}" if near else ""
        raise UserError(f"classifier.name 'timm/{name}' is not known to timm {timm.__version__}{like}")
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    return network


def entry_point(name: str) -> EntryPoint:
    """Where the network that `name`, own/..., stands for is made.

    A package says so that is installed, or that Python finds as it finds any other (in the folder that `python -c` starts in,
    too); a model's folder says but the name. Raises UserError if none has it, or two have.
    """
    every = entry_points(group=NETWORKS)
    found = [entry for entry in every if entry.name == name.removeprefix(OWN)]
    if len(found) == 1:
        return found[0]
    if found:
        said = f"{len(found)} packages have a network of this name: {', '.join(sorted(entry.value for entry in found))}"
    else:
        there = ", ".join(sorted(f"{OWN}{entry.name}" for entry in every))
        said = (
            f"no installed package names it among its entry points '{NETWORKS}'; there {f'are {there}' if there else 'is none'}"
        )
    raise UserError(f"classifier.name '{name}': {said} (docs/extending.md: a network)")


def origin(name: str) -> dict[str, str] | None:
    """Of a network of a package: package and version, entry point, digest of the module's file. None for any other."""
    if not name.startswith(OWN):
        return None
    entry = entry_point(name)
    spec = find_spec(entry.module)
    file = Path(spec.origin) if spec is not None and spec.origin else None
    return {
        "package": entry.dist.name if entry.dist is not None else entry.module,
        "version": entry.dist.version if entry.dist is not None else "",
        "entry": f"{entry.module}:{entry.attr}",
        "sha256": sha256(file) if file is not None and file.is_file() else "",
    }


def _told(error: Exception) -> str:
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def _own(name: str, channels: int, num_classes: int) -> nn.Module:
    entry = entry_point(name)
    try:
        make = entry.load()
    except Exception as error:  # whatever a module of the user's may raise
        raise UserError(f"classifier.name '{name}' is '{entry.value}', which cannot be imported: {_told(error)}") from error
    try:
        network = make(channels, num_classes)
    except Exception as error:
        raise UserError(
            f"classifier.name '{name}': '{entry.value}' of {channels} channels and {num_classes} classes: {_told(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"classifier.name '{name}': '{entry.value}' gave a {type(network).__name__}, not a torch.nn.Module")
    if lazy := [key for key, tensor in (*network.named_parameters(), *network.named_buffers()) if is_lazy(tensor)]:
        raise UserError(
            f"classifier.name '{name}': '{entry.value}' leaves the shape of {lazy[0]} to the first images; give its layer's "
            "inputs as a number (nn.Linear, not nn.LazyLinear)"
        )
    return network


@torch.no_grad()
def moved_by_others(network: nn.Module, x_BCHW: Tensor, logits_BK: Tensor) -> float:
    """How far an image's logits move as the other images of its batch change, as a share of the largest logit.

    `logits_BK` is what the network, in eval mode, says of x_BCHW, two images or more. The first half is looked at, the other is
    replaced by images that are far from it: a batch of the same size is computed alike, so that nothing but the others makes a
    difference.
    """
    kept = (len(x_BCHW) + 1) // 2
    # half as bright: the inverse of an image may have its mean and variance
    others = (x_BCHW[kept:] < 0.5).to(x_BCHW) / 2
    with kept_apart(x_BCHW.device):
        moved = network(torch.cat([x_BCHW[:kept], others]))[:kept] - logits_BK[:kept]
    return float(moved.nan_to_num(0.0, 0.0, 0.0).abs().max() / logits_BK.abs().max().clamp_min(1e-12))


@torch.no_grad()
def heeds_others(network: nn.Module, x_BCHW: Tensor) -> bool:
    """Whether a network, in eval mode, says something else of an image as the other images of its batch change.

    Not of one that says something else each time, nor of one that takes no such batch.
    """
    try:
        with kept_apart(x_BCHW.device):
            logits, again = network(x_BCHW), network(x_BCHW)
        steady = float((logits - again).abs().max()) <= ROUNDING * float(logits.abs().max())
        return steady and moved_by_others(network, x_BCHW, logits) > ROUNDING
    except Exception:  # a program for one image at a time, say; what else is wrong with it shows where it is called
        return False


def require_trainable(
    config: ClassifierConfig, channels: int, resolution: int, num_classes: int, images: int = 2, workers: int = 1
) -> None:
    """Raise UserError for a network that cannot be trained by so many workers, each with so many images.

    It must take them in training mode, put out a logit a class, be copied and have gradients: for several workers, which
    exchange them, of every parameter. In eval mode it must look at each image by itself.
    """
    network = build(config, channels, num_classes).train()
    try:
        logits = network(torch.zeros(images, channels, resolution, resolution))
    except Exception as error:  # whatever a network of others may raise
        alone = " one at a time, as training.batch_size over the workers is" if images == 1 else ""
        raise UserError(
            f"classifier.name '{config.name}' cannot take {resolution}x{resolution} images{alone}: {_told(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (images, num_classes):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"classifier.name '{config.name}' does not put out one logit a class, shape ({images}, {num_classes}), but {found}"
        )
    try:
        copy.deepcopy(network)
    except Exception as error:
        raise UserError(
            f"classifier.name '{config.name}' cannot be copied, as attacks do: {_told(error)} (of torch's weight_norm and "
            "spectral_norm take those of torch.nn.utils.parametrizations)"
        ) from error
    try:
        logits.sum().backward()
    except Exception as error:
        raise UserError(f"classifier.name '{config.name}' has no gradients: {_told(error)}") from error
    idle = [name for name, p in network.network.named_parameters() if p.requires_grad and p.grad is None]
    if workers > 1 and idle:
        raise UserError(
            f"classifier.name '{config.name}': its output does not depend on its {idle[0]}, for whose gradient several workers "
            "would wait; leave it out, freeze it by requires_grad_(False), or train with one worker"
        )
    x = torch.rand(2, channels, resolution, resolution, generator=torch.Generator().manual_seed(0))
    if heeds_others(network.eval(), x):
        raise UserError(f"classifier.name '{config.name}' {HEEDS_OTHERS}")


def _take_grey(network: nn.Module) -> None:
    """Make the first convolution take one channel: a grey image then counts as an RGB image with three equal ones."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            module.weight = nn.Parameter(module.weight.detach().sum(dim=1, keepdim=True))
            module.in_channels = 1
            return
    raise UserError("this torchvision model has no three-channel convolution to replace; set data.channels 3")
