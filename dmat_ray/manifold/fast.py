"""StyleGAN 1 and 2 for use at scale: frozen, with every constant computed once, in float32 or bfloat16.

The arithmetic is that of `stylegan1` and `stylegan2`, in another order of operations, and the gradient to w alone:

- gains, mirrored kernels, noise and biases are folded into constants; "double the pixels, then convolve 3x3" is one
  transposed convolution, which does 16 multiplications an input pixel where the plain one does 36;
- activations are channels_last, in which convolutions ran 1.1 to 1.7 times as fast on a CPU;
- the fixed filters are depthwise convolutions in both directions: they are symmetric, so that each is its own gradient,
  and autograd's way, which may turn to a slower kernel, is not needed;
- instance normalisation and its style are one function with four sums, and a gradient written out.

In bfloat16 weights and activations are rounded; styles, statistics, demodulation and the image are float32.
"""

import copy
from typing import cast

import torch
from torch import nn

from dmat_ray.errors import UserError
from dmat_ray.manifold import fast_stylegan1, fast_stylegan2, stylegan1, stylegan2
from dmat_ray.manifold.base import LatentGenerator


class FastStyleGAN(LatentGenerator):
    """A frozen StyleGAN with the fast synthesis; mapping, statistics of w and shapes are those of its original."""

    def __init__(self, generator: stylegan1.StyleGAN1 | stylegan2.StyleGAN2, synth: nn.Module) -> None:
        shape = generator.config
        super().__init__(shape.z_dim, shape.w_dim, shape.num_ws, shape.resolution, shape.channels, shape.num_classes)
        self.config = shape
        self.map = frozen(generator.map)
        self.synth = synth
        self.w_mean, self.w_std = generator.w_mean.clone(), generator.w_std.clone()


def frozen(module: nn.Module) -> nn.Module:
    """A copy whose parameters are buffers: they move with the module, and nothing can train them."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.detach())
    return module


@torch.no_grad()
def accelerate(generator: LatentGenerator, dtype: torch.dtype) -> LatentGenerator:
    """The same generator, frozen and faster, on the device where it is; `generator` itself is left as it was.

    In torch.float32 images differ by rounding (about 1e-6 of their size); in torch.bfloat16 by about 1 to 3 %, and the
    gradient to w by more (cosine 0.97 to 0.997 at random weights): the same manifold, seen with less precision.
    w is float32 and so are the images, whatever the dtype. Raises UserError for a generator that is no StyleGAN 1 or 2,
    or another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"a fast generator computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}")
    if isinstance(generator, stylegan1.StyleGAN1):
        synth: nn.Module = fast_stylegan1.FastSynthesis(cast(stylegan1.Synthesis, generator.synth), dtype)
    elif isinstance(generator, stylegan2.StyleGAN2):
        synth = fast_stylegan2.FastSynthesis(cast(stylegan2.Synthesis, generator.synth), dtype)
    else:
        raise UserError(f"only StyleGAN 1 and 2 have a fast path, not {type(generator).__name__}: use precision 'reference'")
    return FastStyleGAN(generator, synth.to(generator.w_mean.device)).train(generator.training)
