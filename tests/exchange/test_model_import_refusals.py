"""Classifiers by others that do not fit, or that would run code: a plain line for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign_files import Call, with_ids
from imported_models import read, saved, shufflenet_fixture, wrapped  # noqa: F401  (fixtures)
from safetensors.torch import save_file
from torch import Tensor, nn

from dmat_ray.config import ClassifierConfig
from dmat_ray.errors import UserError
from dmat_ray.exchange import model_import

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
]


class Evil:
    """A pickle that would run code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def _without_head(s: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in s.items() if not k.startswith("fc.")} | {"head.weight": torch.zeros(4, 1024)}


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "classes": (lambda s: s, {"classes": 3}, r"knows 4 classes \(fc\.(weight|bias)\), there are 3 class names"),
    "channels": (lambda s: s, {"channels": 1}, r"takes images of 3 channel\(s\) \(conv1\.0\.weight\), here they have 1"),
    "head": (
        _without_head, {},
        r"does not fit classifier.name '\w+': 2 of its \d+ tensors are missing \(fc.bias, fc.weight\); 1 has no place in "
        r"it \(head.weight\)",
    ),
    "architecture": (lambda s: s, {"name": "resnet18"}, r"'resnet18': \d+ of its \d+ tensors are missing \(bn1\.bias"),
    "width": (
        lambda s: {**s, "stage2.0.branch1.2.weight": torch.ones(9, 24, 1, 1)}, {},
        r"1 have another shape \(stage2.0.branch1.2.weight \(9, 24, 1, 1\) instead of \(24, 24, 1, 1\)\)",
    ),
    "nan": (lambda s: {**s, "fc.bias": torch.full((4,), torch.nan)}, {}, "fc.bias is not finite"),
    "integers": (lambda s: {**s, "fc.bias": torch.ones(4, dtype=torch.int64)}, {}, r"fc.bias is of torch.int64"),
    "twice": (lambda s: {**s, **wrapped(s, "module.")}, {}, "holds 'conv1.0.weight' twice: as conv1.0.weight and as module"),
    "grey mean": (lambda s: {**s, "mean": torch.ones(2), "std": torch.ones(2)}, {}, r"'mean' of shape \(2,\)"),
    "zero std": (lambda s: {**s, "mu": torch.ones(3), "sigma": torch.zeros(3)}, {}, "'sigma' of .* must be above 0"),
    "no tensors": (lambda s: {"epoch": 3, "acc": 0.5}, {}, "holds no state dict, but acc, epoch"),
    "a tensor": (lambda s: torch.ones(3), {}, "holds no state dict, but one tensor"),
    "unknown": (lambda s: s, {"name": "resnet19"}, "'resnet19' is not known"),
    "given": (lambda s: s, {"given": ((0.1, 0.2), (1.0,))}, r"classifier.mean has 2 values, images have 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(tmp_path: Path, shufflenet: nn.Module, what: str) -> None:
    tree, options, message = BAD[what]
    with pytest.raises(UserError, match=message) as raised:
        read(saved(tree(shufflenet.state_dict()), tmp_path / "x.pth"), **options)
    assert "\n" not in str(raised.value)


def test_a_resolution_that_the_network_does_not_take(tmp_path: Path) -> None:
    state = torchvision.models.squeezenet1_1(num_classes=4).state_dict()
    with pytest.raises(UserError, match=r"fails on 3 image\(s\) of 3x8x8 \(.*too small.*is that its shape"):
        model_import.read_model(saved(state, tmp_path / "x.pth"), ClassifierConfig(name="squeezenet1_1"), None, 3, 8, 4)


def test_nothing_is_executed(tmp_path: Path, shufflenet: nn.Module) -> None:
    path = saved({"state_dict": shufflenet.state_dict(), "hook": Evil(tmp_path / "marker")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth' asks for .*nothing in it was run"):
        read(path)
    whole = tmp_path / "whole.pth"
    torch.save(shufflenet, whole)
    with pytest.raises(UserError, match=r"asks for torchvision.models.shufflenetv2.ShuffleNetV2"):
        read(whole)
    assert not (tmp_path / "marker").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path, shufflenet: nn.Module) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "page").write_text("<html>")
    with pytest.raises(UserError, match="is a web page"):
        read(tmp_path / "page")
    save_file(shufflenet.state_dict(), tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"cut\.safetensors' is damaged"):
        read(tmp_path / "cut.safetensors")
    path = saved(shufflenet.state_dict(), tmp_path / "cut.pth")
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(UserError, match="damaged or cut short"):
        read(path)
    # a tensor that claims more than is there
    path.write_bytes(
        with_ids({"fc.weight": Call(torch._utils._rebuild_tensor_v2, torch.ones(1), 0, (4, 512), (512, 1), False, {})})
    )
    with pytest.raises(UserError):
        read(path)
