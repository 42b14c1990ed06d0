"""LPIPS (Zhang et al., arXiv 1801.03924) through the lpips package, shaped for optimisation.

The target's features are computed once; gradients reach the other image only. The linear layers are those that the
package ships; the backbone is torchvision's pretrained one, a file of the user's, or, only if asked for by name, a
seeded random one.
"""

import contextlib
import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import lpips
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmat_ray.errors import UserError, first_line
from dmat_ray.networks.weights import locate_lpips
from dmat_ray.rng import kept_apart

EPSILON = 1e-10  # the package's
SMALLEST = 32  # pixels of an image that every backbone takes


class LayerDistance(torch.autograd.Function):
    """Weighted squared distance (B), the mean over pixels, of maps a / |a| from unit-normalised b; gradient to a alone.

    |a| is the length over channels. Written out because autograd takes twice the passes over the maps, which are what is
    largest in a projection, and makes NaN of a pixel where all channels are 0.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = torch.linalg.vector_norm(a, dim=1, keepdim=True, dtype=torch.float32)
        inverse = torch.where(length > 0, 1.0 / (length + EPSILON), 0.0)
        minus = torch.addcmul(b, a, inverse.to(a.dtype), value=-1)
        pixels = minus.square().permute(0, 2, 3, 1) @ weight_C.to(a.dtype)
        return pixels.flatten(1).mean(dim=1, dtype=torch.float32), minus, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, _, weight = inputs
        _, minus, inverse = output
        ctx.mark_non_differentiable(minus, inverse)
        ctx.save_for_backward(a, weight, minus, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        a, weight, minus, inverse = ctx.saved_tensors
        factor = grads[0][:, None] * weight * (-2.0 / (a.shape[2] * a.shape[3]))
        of_unit = minus * factor.to(a.dtype)[:, :, None, None]
        along = (of_unit * a).sum(dim=1, keepdim=True, dtype=torch.float32)
        inverse_cubed = (along * inverse.pow(3)).to(a.dtype)
        return of_unit.mul_(inverse.to(a.dtype)).addcmul_(a, inverse_cubed, value=-1), None, None


class Perceptual(torch.nn.Module):
    """LPIPS distance between rendered images and fixed targets. `setting` is what errors call the setting of `weights`."""

    def __init__(self, net: str, weights: str, seed: int = 0, setting: str = "projection.lpips_weights") -> None:
        super().__init__()
        self.random = weights == "random"
        path = None if self.random else locate_lpips(net, weights, setting)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), kept_apart():
            warnings.simplefilter("ignore")  # the package calls torchvision in a deprecated way
            torch.manual_seed(seed)
            self.metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if path is not None:
            self._load(path, net)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.dtype = torch.float32

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
            raise UserError(f"'{path}' does not hold the weights of {net}: {first_line(error)}") from None

    def lowered(self, dtype: torch.dtype) -> "Perceptual":
        """A copy whose backbone computes in `dtype`; distances stay float32."""
        copied = copy.deepcopy(self)
        copied.metric.net.to(dtype)
        copied.dtype = dtype
        return copied

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """What the layers that LPIPS reads say of images in [0, 1]; grey images are repeated to RGB."""
        scaling = self.metric.scaling_layer
        x = (x_BCHW * 2 - (1 + scaling.shift)) / scaling.scale
        return list(self.metric.net(x.to(self.dtype, memory_format=torch.channels_last)))

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Unit-normalised features of images in [0, 1], for `distance` to measure other images from."""
        return [lpips.normalize_tensor(m) for m in self.maps(x_BCHW)]

    def distance(self, x_BCHW: Tensor, features: list[Tensor]) -> Tensor:
        """LPIPS (B), float32, of images in [0, 1] from those whose `features` are given; differentiable in x."""
        layers = zip(self.maps(x_BCHW), features, self.metric.lins, strict=True)
        parts = [LayerDistance.apply(m, f, lin.model[-1].weight.flatten()) for m, f, lin in layers]  # type: ignore[no-untyped-call]
        return torch.stack([distance for distance, _, _ in parts]).sum(dim=0)
