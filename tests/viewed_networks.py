"""Small networks for the copy that attacks see, with statistics and weights as of training."""

import torch
from torch import Tensor, nn


def trained_a_little(network: nn.Module, channels: int, size: int) -> nn.Module:
    """In float64 and eval mode, with batch-norm statistics and weights that are not those it starts with."""
    network.double().train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        network(torch.rand(4, channels, size, size, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


class Small(nn.Module):
    """A convolution and its batch norm; all else that a forward may have is with those that inherit from it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))
