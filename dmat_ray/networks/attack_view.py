"""The classifier as attacks see it: frozen, its batch norm folded into the convolutions, in the precision of the attack.

An attack asks for gradients to the input alone, in eval mode, some ten or twenty times a step. There batch norm is a
constant factor and offset a channel, which a convolution's weights take up; what is left is a network with fewer passes over
memory. The copy follows the trained network by `refresh`, once a step.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.networks import batch_norm
from dmat_ray.networks.stem import Stem, fits
from dmat_ray.rng import kept_apart

BATCH_NORM = (nn.BatchNorm2d, batch_norm.TermBatchNorm2d)
TRACES = 6  # of a forward pass: a coin of its own is seen by all but one network in 32
SAME_LOGITS, SAME_GRADIENT = 0.01, 0.1  # relative; rounding is far below, another function far above


class _Tracer(fx.Tracer):
    """Raises for a forward whose gradients are not those of its operations, which is all that a graph holds.

    They are where it switches gradients off, and inside an autograd.Function, which has a backward of its own.
    """

    def create_node(self, *given: Any, **named: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise NotImplementedError("gradients are switched off")
        return super().create_node(*given, **named)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(m, module_qualified_name)


class _Called(nn.Module):
    """A network as it is called: with one argument, so that all others have their defaults, and with the hooks that it has."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def _named(name: str) -> str:
    """A layer's name in a network, by that in `_Called`."""
    return name.removeprefix("network.")


def _has_hooks(module: nn.Module) -> bool:
    """Whether something else is done when a layer is called: pruning and older norms of weights make its weights anew."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _foldable(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, fx.Node]]:
    """Convolutions whose output goes to one batch norm and nowhere else, and those batch norms.

    Not those whose weights are at work elsewhere, too: tied to another layer's, or taken out of it by the network's own forward.
    Nor those with hooks, which may see or change what goes in and out, or the weights.
    """
    calls: dict[Any, int] = {}
    owners: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for node in graph.nodes:
        calls[node.target] = calls.get(node.target, 0) + 1
    taken = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in BATCH_NORM or modules[node.target].running_mean is None:
            continue
        conv = node.args[0]
        alone = isinstance(conv, fx.Node) and len(conv.users) == 1 and calls[conv.target] == calls[node.target] == 1
        if not alone or conv.op != "call_module" or type(modules[conv.target]) is not nn.Conv2d or conv.target in taken:
            continue
        if _has_hooks(modules[conv.target]) or _has_hooks(modules[node.target]):
            continue
        if all(owners[id(parameter)] == 1 for parameter in modules[conv.target].parameters()):
            pairs.append((conv, node))
    return pairs


def _fold(view: fx.GraphModule) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """Take batch norms out, in place; the convolutions that are to take them up, and they, by name."""
    modules, folded = dict(view.named_modules()), []
    for conv, bn in _foldable(view.graph, modules):
        layer = modules[str(conv.target)]
        assert isinstance(layer, nn.Conv2d)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=layer.weight.device))
        # how it does on GPUs has not been measured
        if fits(layer) and layer.weight.device.type == "cpu":
            view.set_submodule(str(conv.target), Stem(layer))
        bn.replace_all_uses_with(conv)
        view.graph.erase_node(bn)
        folded.append((str(conv.target), str(bn.target)))
    view.delete_all_unused_submodules()
    view.recompile()
    return view, folded


def _traced(view: nn.Module) -> fx.GraphModule | None:
    """The network as a graph; None for one that a graph cannot stand for."""
    try:
        with torch.enable_grad():
            graph, *others = [_Tracer().trace(view) for _ in range(TRACES)]
    except Exception:  # whatever a foreign network does with a stand-in for its input
        return None
    # what forward draws by itself was drawn once, while tracing, and would be the same ever after: of tensors it shows as a
    # constant, of Python's numbers as another graph each time
    constant = any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes)
    return None if constant or any(str(other) != str(graph) for other in others) else fx.GraphModule(view, graph)


def _logits_and_gradients(network: nn.Module, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """And how a mix of them changes with the images."""
    x = x_BCHW.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = network(x)
        mix = torch.linspace(-1.0, 1.0, logits.numel(), device=x.device, dtype=logits.dtype).view_as(logits)
        total = (logits * mix).sum() + 0.0 * x.sum()  # of some networks no gradient reaches the images
        (gradient,) = torch.autograd.grad(total, x)
    return logits.detach(), gradient


def _near(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool((found - expected).norm() <= share * expected.norm())


def takes(network: Callable[[Tensor], Any], x_BCHW: Tensor, layout: torch.memory_format) -> bool:
    """Whether a network, in eval mode, computes on activations of this layout: one that takes a map apart by `view` may not."""
    try:
        with torch.no_grad():
            network(x_BCHW.contiguous(memory_format=layout))
    except RuntimeError:
        return False
    return True


def view_of(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What attacks see of a network: an `AttackView`, or of a TorchScript program, which has no layers to fold, itself."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        if dtype != torch.float32:
            raise UserError("a TorchScript program computes in the precision it was made for; attack it in float32")
        return network
    return AttackView(network, dtype)


def _follow(mine: nn.Module, theirs: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Take over a tensor of another module, in `dtype` if it holds fractions: its values, or one of another shape, or None."""
    old, new = getattr(mine, name), getattr(theirs, name)
    if old is not None and new is not None and old.shape == new.shape:
        old.copy_(new)
    else:
        setattr(mine, name, None if new is None else new.detach().to(dtype if new.is_floating_point() else new.dtype, copy=True))


class AttackView(nn.Module):
    """A copy of `network` for attacks; x_BCHW in [0, 1] -> logits_BK, computed in `dtype`, of bfloat16 as float32.

    `folded` names the convolutions and the batch norms that went into them. Nothing is folded in a network whose forward cannot
    be traced (one that decides by the values of its input), nor in one of which the first call finds that the folded copy is
    another function, or has other gradients: an attack on it would find less.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> None:
        super().__init__()
        self._source = (network,)  # in a tuple, so that it is no submodule
        self._dtype = dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._is_laid_out = not channels_last
        plain = _Called(copy.deepcopy(network).eval())
        traced = _traced(plain)
        view, folded = (plain, []) if traced is None else _fold(traced)
        self._use(view if folded else plain, folded)

    def _use(self, view: nn.Module, folded: list[tuple[str, str]]) -> None:
        """Compute with this copy of the network, into which these batch norms were folded."""
        network = self.source
        self.folded, self._is_checked = [(_named(conv), _named(bn)) for conv, bn in folded], not folded
        self.view = view.to(self._dtype, memory_format=self._layout).requires_grad_(False)  # type: ignore[call-overload]
        inside = {f"{conv}.{part}" for conv, _ in folded for part in ("weight", "bias", "kernel")}
        source = _Called(network)
        names = [*dict(self.view.named_parameters()), *dict(self.view.named_buffers())]
        places = [name.rpartition(".") for name in names if name not in inside]
        # where they are, not the tensors themselves: a forward pass may put a new one in a buffer's place
        self._copied = [(self.view.get_submodule(at), source.get_submodule(at), tensor) for at, _, tensor in places]
        modules, seen = dict(source.named_modules()), dict(self.view.named_modules())
        self._pairs: list[tuple[Any, Any, Any]] = [(seen[conv], modules[conv], modules[bn]) for conv, bn in folded]
        self._stems = [module for module in self.view.modules() if isinstance(module, Stem)]
        self.refresh()

    @property
    def source(self) -> nn.Module:
        """The network that is copied."""
        return self._source[0]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the network's weights and running statistics as they are now."""
        for mine, theirs, name in self._copied:
            _follow(mine, theirs, name, self._dtype)
        for view, conv, bn in self._pairs:
            scale = torch.rsqrt(bn.running_var + bn.eps)
            scale = scale if bn.weight is None else scale * bn.weight
            shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
            view.weight.copy_(conv.weight * scale[:, None, None, None])
            view.bias.copy_(shift * scale if bn.bias is None else torch.addcmul(bn.bias, shift, scale))
        for stem in self._stems:
            stem.refresh()

    @tf32(False)
    def _check(self, x_BCHW: Tensor) -> None:
        """Give the folding up if the network's outputs or gradients, at two images of noise, are not those of the folded copy."""
        plain = _Called(copy.deepcopy(self.source).eval()).requires_grad_(False)
        dtype = next(self.source.parameters()).dtype
        # in the network's own precision: that of the attack may hide a difference
        folded = self if dtype == self._dtype else AttackView(self.source, dtype)
        folded.refresh()
        folded._is_checked = True
        with kept_apart(x_BCHW.device):
            torch.manual_seed(0)
            x = torch.rand(2, *x_BCHW.shape[1:], dtype=dtype).to(x_BCHW.device)
            (theirs, g_theirs), (ours, g_ours) = _logits_and_gradients(plain, x), _logits_and_gradients(folded, x)
        if not (_near(ours, theirs, SAME_LOGITS) and _near(g_ours, g_theirs, SAME_GRADIENT)):
            compiled = self.view._compiled_call_impl is not None
            self._use(plain, [])
            if compiled:
                self.view.compile()
        self._is_checked = True

    def _lay_out(self, x_BCHW: Tensor) -> None:
        """Give channels last up for a network that does not take it; what else is wrong with it shows as it is called."""
        # its forward: a call would have it compiled for two images, if it is to be
        if not takes(self.view.forward, x_BCHW[:2].to(self._dtype), self._layout):
            self._layout = torch.contiguous_format
            self.view.to(memory_format=self._layout)
        self._is_laid_out = True

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self._is_laid_out:
            self._lay_out(x_BCHW)
        if not self._is_checked:
            self._check(x_BCHW)
        logits: Tensor = self.view(x_BCHW.to(self._dtype, memory_format=self._layout))
        return logits.float() if self._dtype == torch.bfloat16 else logits
