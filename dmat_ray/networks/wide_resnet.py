"""Wide residual networks (arXiv 1605.07146), the usual networks for images of 32 pixels in work on robustness."""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from dmat_ray.errors import UserError

NAME = re.compile(r"wrn-(\d+)-(\d+)")


class _Block(nn.Module):
    """Normalisation and activation before each of two convolutions; the first activation is shared where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        moved: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return kept + moved


class WideResNet(nn.Sequential):
    """`depth` = 6 n + 4 layers in three groups of n blocks, with 16, 32 and 64 times `width` features.

    x (B, channels, H, W), H and W multiples of 4 -> logits (B, num_classes).
    """

    def __init__(self, depth: int, width: int, channels: int, num_classes: int) -> None:
        blocks: list[nn.Module] = []
        inputs = 16
        for features, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for k in range((depth - 4) // 6):
                blocks.append(_Block(inputs, features, stride if k == 0 else 1))
                inputs = features
        super().__init__(
            nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
            *blocks,
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# the same network as in the code of TRADES (arXiv 1901.08573), from which RobustBench and many others have theirs
FIRST_OF_TRADES = "block1.layer.0.conv1.weight"  # by which its files are told
UNUSED_BY_TRADES = "sub_block1."  # a group of blocks that has weights and is never called


def names_of_trades(network: nn.Module) -> dict[str, str]:
    """What each tensor of a wide ResNet is called in files of that code -> its name here; nothing for another network."""
    if not isinstance(network, WideResNet):
        return {}
    first, *blocks, norm, _, _, _, head = (name for name, _ in network.named_children())
    of_group = len(blocks) // 3
    layers = {f"block{1 + k // of_group}.layer.{k % of_group}": name for k, name in enumerate(blocks)}
    layers |= {"conv1": first, "bn1": norm, "fc": head}
    return {
        f"{theirs}.{key.replace('shortcut', 'convShortcut')}": f"{ours}.{key}"
        for theirs, ours in layers.items()
        for key in network.get_submodule(ours).state_dict()
    }


def build(name: str, channels: int, num_classes: int) -> WideResNet | None:
    """The network called wrn-DEPTH-WIDTH, or None for another name. Raises UserError for a depth that is not 6 n + 4."""
    if (match := NAME.fullmatch(name)) is None:
        return None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or depth % 6 != 4 or not width:
        raise UserError(f"classifier.name '{name}': a wide ResNet has 6 n + 4 layers and a width of 1 or more, e.g. wrn-28-10")
    return WideResNet(depth, width, channels, num_classes)
