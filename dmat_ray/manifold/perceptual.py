"""LPIPS (Zhang et al., arXiv 1801.03924) through the lpips package, shaped for optimisation.

The target's features are computed once; gradients reach the other image only. The linear layers are those that the
package ships; the backbone is torchvision's pretrained one, a file of the user's, or, only if asked for by name, a
seeded random one.
"""

import contextlib
import io
import pickle
import warnings
from pathlib import Path

import lpips
import torch
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.weights import locate

SMALLEST = {"alex": 32, "vgg": 32, "squeeze": 32}


class Perceptual(torch.nn.Module):
    """LPIPS distance between rendered images and fixed targets."""

    def __init__(self, net: str, weights: str, seed: int = 0) -> None:
        super().__init__()
        self.random = weights == "random"
        without = "projection.lpips_weights=random does without"
        path = None if self.random else locate(f"lpips_{net}", weights, "projection.lpips_weights", without)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # the package calls torchvision in a deprecated way
            torch.manual_seed(seed)
            self.metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path is not None:
            self._load(path, net)
        self.requires_grad_(False).eval()
        self.smallest = SMALLEST[net]

    def _load(self, path: Path, net: str) -> None:
        """torchvision's feature layers into the package's slices, which keep torchvision's layer numbers."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            layers = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise UserError(f"'{path}' does not hold the weights of {net}: no state dict ({type(error).__name__})") from None
        own = self.metric.net.state_dict()
        try:
            filled = {key: layers[key.split(".", 1)[1]] for key in own}
            self.metric.net.load_state_dict(filled)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"'{path}' does not hold the weights of {net}: {str(error).splitlines()[0]}") from None

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Unit-normalised features of images in [0, 1]; grey images are repeated to RGB."""
        x = x_BCHW.expand(-1, 3, -1, -1) if x_BCHW.shape[1] == 1 else x_BCHW
        maps = self.metric.net(self.metric.scaling_layer(x * 2 - 1))
        return [lpips.normalize_tensor(m) for m in maps]

    def distance(self, features: list[Tensor], target: list[Tensor]) -> Tensor:
        """LPIPS per image (B) from two lists of features."""
        total = features[0].new_zeros(features[0].shape[0])
        for layer, a, b in zip(self.metric.lins, features, target, strict=True):
            # a 1x1 convolution to one channel is a weighted sum over channels
            weight = layer.model[-1].weight.view(1, -1, 1, 1)
            total = total + ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total
