"""Classifiers by others as state dicts: the same logits as the network that they were made of."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from imported_models import (  # noqa: F401  (fixtures)
    CLASSES,
    IMAGENET,
    NAME,
    SIZE,
    Normalised,
    images_fixture,
    imported,
    read,
    saved,
    shufflenet_fixture,
    small,
    unsettle,
    wrapped,
)
from installed import install
from safetensors.torch import save_file
from torch import Tensor, nn

from dmat_ray import settings
from dmat_ray.config import ClassifierConfig
from dmat_ray.errors import UserError
from dmat_ray.exchange import model_import
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
]


class TheirBlock(nn.Module):
    """As TRADES' code has it: where the number of features changes, the shortcut takes what is activated, too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        kept = self.convShortcut(active) if hasattr(self, "convShortcut") else x
        return kept + self.conv2(self.bn2(self.conv1(active)).relu())


class TheirGroup(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(TheirBlock(inputs, outputs, stride), TheirBlock(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TheirWideResNet(nn.Module):
    """wrn-16-2 by the names of TRADES' code, with the group that it makes and does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1, self.sub_block1 = TheirGroup(16, 32, 1), TheirGroup(16, 32, 1)
        self.block2, self.block3 = TheirGroup(32, 64, 2), TheirGroup(64, 128, 2)
        self.bn1, self.fc = nn.BatchNorm2d(128), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu()
        return self.fc(nn.functional.avg_pool2d(x, 8).flatten(1))


@pytest.mark.parametrize("prefix", ["", "module.", "1."])
def test_a_wide_resnet_may_have_the_names_of_trades(tmp_path: Path, images: Tensor, prefix: str) -> None:
    theirs = small(TheirWideResNet)
    state = wrapped(theirs.state_dict(), prefix)
    found = read(saved(state, tmp_path / "theirs.pt"), "wrn-16-2")
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), theirs(images), rtol=1e-5, atol=1e-5)
    ours, source = found.network.network.state_dict(), theirs.state_dict()
    for mine, their in (
        ("2.conv1.weight", "block1.layer.1.conv1.weight"),
        ("3.shortcut.weight", "block2.layer.0.convShortcut.weight"),
    ):
        assert torch.equal(ours[mine], source[their])
    again = read(saved(ours, tmp_path / "ours.pt"), "wrn-16-2")
    with torch.no_grad():
        assert torch.equal(again.network(images), found.network(images))
    state.pop(f"{prefix}fc.bias")
    with pytest.raises(UserError, match=r"does not fit classifier.name 'wrn-16-2': 1 of its \d+ tensors are missing"):
        read(saved(state, tmp_path / "theirs.pt"), "wrn-16-2")


def test_a_torchvision_network_is_torchvisions(tmp_path: Path, shufflenet: nn.Module, images: Tensor) -> None:
    network, run = imported(saved(shufflenet.state_dict(), tmp_path / "theirs.pth"), tmp_path / "theirs", given=IMAGENET)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    with torch.no_grad():
        assert torch.equal(network(images), shufflenet((images - mean) / std))
    assert not network.training
    assert (run["class_names"], run["channels"], run["resolution"]) == (list(CLASSES), 3, SIZE)
    assert (run["source"]["file"], len(run["source"]["sha256"])) == ("theirs.pth", 64)
    assert str(tmp_path) not in json.dumps(run["source"])
    assert run["sha256"].keys() == {"model.safetensors"}
    checkpoint.require_whole(tmp_path / "theirs", "run.json")


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": 0.5, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "model": lambda s: {"model": wrapped(s, "module."), "args": None},
    "net": lambda s: {"net": wrapped(s, "module.network."), "acc": 94.1},
    "nested": lambda s: {"model": {"state_dict": wrapped(s, "_orig_mod.")}},
    "averaged": lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s},
    "swa": lambda s: {"state_dict": {**wrapped(s, "module."), "n_averaged": torch.tensor(7)}},
    "half": lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_and_prefixes(tmp_path: Path, shufflenet: nn.Module, images: Tensor, how: str) -> None:
    found = read(saved(WRAPPED[how](shufflenet.state_dict()), tmp_path / "x.pth"))
    with torch.no_grad():
        assert torch.equal(found.network(images), shufflenet(images)), "in [0, 1], as nothing else was said"
    assert any("as they are" in note for note in found.notes)
    if how == "averaged":
        assert "the weights are those under 'state_dict_ema'" in found.notes


def test_safetensors(tmp_path: Path, shufflenet: nn.Module, images: Tensor) -> None:
    save_file(shufflenet.state_dict(), tmp_path / "theirs.bin")
    found = read(tmp_path / "theirs.bin")
    assert found.format == "safetensors"
    with torch.no_grad():
        assert torch.equal(found.network(images), shufflenet(images))


ROBUST: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mean": lambda net: Normalised(net),
    "mu": lambda net: Normalised(net, ("mu", "sigma"), "network"),
    "normalize": lambda net: nn.Sequential(OrderedDict(normalize=Normalised(nn.Identity()), model=net)),
    "sequential": lambda net: nn.Sequential(Normalised(nn.Identity()), net),
    "data_parallel": lambda net: nn.DataParallel(Normalised(net, ("mu", "sigma"))),
}


@pytest.mark.parametrize("how", ROBUST)
def test_networks_that_normalise_inside(tmp_path: Path, shufflenet: nn.Module, images: Tensor, how: str) -> None:
    """RobustBench's convention."""
    theirs = ROBUST[how](shufflenet).eval()
    path = saved(theirs.state_dict(), tmp_path / "x.pth")
    found = read(path)
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert found.config.mean == pytest.approx(IMAGENET[0])
    assert any("the file's own" in note for note in found.notes)
    told = read(path, given=((0.5,), (0.25,)))
    with torch.no_grad():
        assert torch.equal(told.network(images), shufflenet((images - 0.5) / 0.25))
    assert any("take their place" in note for note in told.notes)


OWN = """
[project]
name = "theirs"
version = "1"
[project.entry-points."dmat_ray.networks"]
inside = "theirs_inside:inside"
"""
INSIDE = """
from imported_models import Normalised, small
def inside(channels, num_classes):
    return Normalised(small())
"""


def test_buffers_that_the_network_itself_has_are_its_own(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "here", OWN, theirs_inside=INSIDE))
    theirs = Normalised(small()).eval()
    theirs.mean += 0.1  # other values than the network begins with
    found = read(saved(theirs.state_dict(), tmp_path / "x.pth"), "own/inside")
    with torch.no_grad():
        assert torch.equal(found.network(images), theirs(images))
    assert (found.config.mean, found.config.std) == model_import.IDENTITY
    around = wrapped(Normalised(nn.Identity()).state_dict(), "normalize.")
    found = read(saved(around | wrapped(theirs.state_dict(), "model."), tmp_path / "y.pth"), "own/inside")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), theirs((images - mean) / std))


@pytest.mark.parametrize("scale", [1.0, 1 / 58.4], ids=["mean and std", "mean alone"])
def test_a_normalisation_of_levels_is_one_of_unit_images(
    tmp_path: Path, shufflenet: nn.Module, images: Tensor, scale: float
) -> None:
    """Networks that were trained on bytes: what they say of levels is what is said here of the same image in [0, 1]."""
    theirs = Normalised(shufflenet).eval()
    theirs.mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    theirs.std = torch.tensor([58.4, 58.4, 58.4]).view(1, 3, 1, 1) * scale
    network, _ = imported(saved(theirs.state_dict(), tmp_path / "x.pth"), tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images * 255), rtol=1e-4, atol=1e-4)
    assert "they are of levels up to 255: divided by 255, for images in [0, 1]" in read(tmp_path / "x.pth").notes


def test_a_normalisation_of_levels_by_hand_is_refused() -> None:
    with pytest.raises(UserError, match=r"^classifier: mean \[123\.675\] and std \[58\.4\] .* in \[0, 1\]; divide both by 255$"):
        settings(classifier={"mean": [123.675], "std": [58.4]})
    of_minus_one_to_one = settings(classifier={"mean": [-1.0], "std": [2.0]}).classifier
    assert (of_minus_one_to_one.mean, of_minus_one_to_one.std) == ((-1.0,), (2.0,))


def test_robustness_checkpoints(tmp_path: Path, shufflenet: nn.Module) -> None:
    """MadryLab's library keeps the network twice, and its normaliser beside it."""
    state = shufflenet.state_dict()
    normaliser = {"module.normalizer.new_mean": torch.zeros(3, 1, 1), "module.normalizer.new_std": torch.ones(3, 1, 1)}
    tree = {"model": {**normaliser, **wrapped(state, "module.model."), **wrapped(state, "module.attacker.model.")}, "epoch": 1}
    assert read(saved(tree, tmp_path / "x.pt")).config.std == (1.0, 1.0, 1.0)


def test_grey_networks(tmp_path: Path) -> None:
    grey = classifiers.build(ClassifierConfig(name=NAME), 1, 4).network.eval()
    x = torch.rand(2, 1, SIZE, SIZE)
    found = read(saved(grey.state_dict(), tmp_path / "x.pth"), channels=1)
    with torch.no_grad():
        assert torch.equal(found.network(x), grey(x))


def test_a_timm_network_is_timms(tmp_path: Path, images: Tensor) -> None:
    timm = pytest.importorskip("timm")
    theirs = unsettle(timm.create_model("mobilenetv3_small_050", num_classes=4))
    found = read(saved({"model_ema": theirs.state_dict()}, tmp_path / "x.pth"), name="timm/mobilenetv3_small_050")
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), theirs(images))
