"""Classifiers by others: the same logits as the network they were made of, and a plain line for what does not fit."""

import json
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign_files import Call, torch_saved, with_ids
from installed import install
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmat_ray import checkpoint, classifiers, model_import, settings, threats
from dmat_ray.attack import attack
from dmat_ray.attack_view import AttackView
from dmat_ray.config import AttackConfig, ClassifierConfig, Config, ImageThreat
from dmat_ray.errors import UserError
from dmat_ray.types import Batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
]
JOB = Path(__file__).parent.parent / "jobs" / "import_model.py"
CLASSES = ("cat", "dog", "fox", "owl")
SIZE = 32
NAME = "shufflenet_v2_x0_5"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unsettle(network: nn.Module) -> nn.Module:
    """Batch-norm statistics other than those that every network begins with."""
    rng = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=rng)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2, generator=rng)  # type: ignore[union-attr]
    return network.eval()


@pytest.fixture(scope="session")
def shufflenet() -> nn.Module:
    """A small network of torchvision's, for four classes."""
    torch.manual_seed(0)
    return unsettle(torchvision.models.shufflenet_v2_x0_5(num_classes=4))


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


class Normalised(nn.Module):
    """What papers wrap their networks in: takes [0, 1]."""

    def __init__(self, network: nn.Module, names: tuple[str, str] = ("mean", "std"), inner: str = "model") -> None:
        super().__init__()
        for name, values in zip(names, IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.names, self.inner = names, inner
        self.add_module(inner, network)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (getattr(self, name) for name in self.names)
        return self.get_submodule(self.inner)((x - mean) / std)


class Small(nn.Module):
    """x (B, 3, 32, 32) -> logits (B, 4), with batch norm and dropout."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


def small(kind: Callable[..., nn.Module] = Small, *arguments: Any) -> nn.Module:
    torch.manual_seed(2)
    return unsettle(kind(*arguments))


def program(network: nn.Module, path: Path, how: str, *, dynamic: bool = True) -> Path:
    """Exported as the guide says."""
    x = torch.rand(2, 3, SIZE, SIZE)
    if how == "script":
        torch.jit.script(network).save(str(path))
    elif how == "trace":
        torch.jit.trace(network, x, check_trace=False).save(str(path))
    else:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=shapes), path.with_suffix(".pt2"))
        return path.with_suffix(".pt2")
    return path


def read(path: Path, name: str = NAME, given: Any = None, classes: int = 4, channels: int = 3) -> model_import.Imported:
    return model_import.read_model(path, ClassifierConfig(name=name), given, channels, SIZE, classes)


def imported(path: Path, folder: Path, **options: Any) -> tuple[classifiers.Classifier, dict[str, Any]]:
    """Read, written, and loaded as evaluation does."""
    found = read(path, **options)
    channels = options.get("channels", 3)
    model_import.save_model(found, path, Config(name="theirs"), CLASSES[: options.get("classes", 4)], channels, SIZE, folder)
    return checkpoint.load_classifier(folder)


def saved(tree: Any, path: Path) -> Path:
    path.write_bytes(torch_saved(tree))
    return path


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in state.items())


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
from test_model_import import Normalised, small
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


@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_programs(tmp_path: Path, images: Tensor, how: str) -> None:
    theirs = Normalised(small()).eval() if how != "script" else small()
    path = program(theirs, tmp_path / "theirs.pt", how)
    network, run = imported(path, tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert run["config"]["classifier"]["name"] == "program"
    x = images.clone().requires_grad_(True)
    expected = images.clone().requires_grad_(True)
    torch.testing.assert_close(
        torch.autograd.grad(network(x).square().sum(), x)[0],
        torch.autograd.grad(theirs(expected).square().sum(), expected)[0],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    # whoever evaluates may call these, and attacks look at a copy
    assert not network.train().eval().training
    torch.testing.assert_close(AttackView(network)(images), network(images), rtol=1e-4, atol=1e-5)
    found = attack(
        network,
        threats.build(ImageThreat(eps=0.1), None),
        Batch(["a", "b", "c"], images, torch.tensor([0, 1, 2])),
        AttackConfig(steps=3),
        seed=0,
        purpose="test",
    )
    assert float((found.x_BCHW - images).abs().max()) == pytest.approx(0.1, abs=1e-5)
    # a normalisation around the program, if one is asked for
    given = read(path, given=((0.5,), (0.25,)))
    with torch.no_grad():
        torch.testing.assert_close(given.network(images), theirs((images - 0.5) / 0.25), rtol=1e-5, atol=1e-6)


def test_a_stored_program_is_one_that_plain_torch_loads(tmp_path: Path, images: Tensor) -> None:
    imported(program(small(), tmp_path / "x.pt", "export"), tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model" / "program.pt2").module()(images), small()(images))


def test_another_program_in_its_place_is_noticed(tmp_path: Path) -> None:
    imported(program(small(), tmp_path / "x.pt", "export"), tmp_path / "model")
    other = program(small(Small, 5), tmp_path / "y.pt", "export")
    (tmp_path / "model" / "program.pt2").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="is not the program that was imported"):
        checkpoint.load_classifier(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no whole model\.safetensors"):
        checkpoint.load_classifier(tmp_path / "model")


class Features(Small):
    """Not one logit a class."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Frozen(Small):
    """No gradient to the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Overflowing(Small):
    """Infinite logits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0.0


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: small(), {"classes": 10}, "puts out 4 classes for 3 images, there are 10 class names"),
        (lambda: small(), {"channels": 1}, r"fails on 3 image\(s\) of 1x32x32 \(.*\); is that its shape"),
        (lambda: small(Features), {}, r"makes \(3, 8, 8, 8\) of 3 image\(s\)"),
        (lambda: small(Frozen), {}, "no finite gradient reaches the images"),
        (lambda: small(Overflowing), {}, "not finite"),
        (lambda: small().train(), {}, "otherwise alone than among others|fails on"),
    ],
)
def test_programs_that_are_refused(tmp_path: Path, network: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(program(network(), tmp_path / "x.pt", "trace"), **options)
    assert "\n" not in str(raised.value)


def test_programs_that_are_not_run(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    numbers.write_bytes(bytes(16))

    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] + torch.from_file(str(numbers), False, 4)

    with pytest.raises(UserError, match="mentions 'from_file'"):
        read(program(Reader(), tmp_path / "x.pt", "trace"))
    path = program(small(), tmp_path / "y.pt", "export", dynamic=False)
    with pytest.raises(UserError, match=r"fails on (3|1) image\(s\)"):
        read(path)


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(JOB), *map(str, arguments)])
    try:
        runpy.run_path(str(JOB), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_job(tmp_path: Path, set_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes and shape of the set, or of the options."""
    torch.manual_seed(0)
    digits = unsettle(classifiers.DigitsCNN(1, 3))
    path = saved({"net": digits.state_dict()}, tmp_path / "digits.pth")
    options = ["--checkpoint", path, "--classifier.name", "digits_cnn", "--model", "theirs", "--output", tmp_path / "x"]
    assert run_job(monkeypatch, *options) == 2
    assert "no on-manifold set" in capsys.readouterr().err
    assert run_job(monkeypatch, *options, "--manifold_set", set_folder, "--classifier.mean", 0.1) == 2
    assert "give both" in capsys.readouterr().err
    assert run_job(monkeypatch, *options, "--manifold_set", set_folder, "--classifier.mean", 0.1, "--classifier.std", 0.3) == 0
    assert "8x8 images with 1 channel(s), 3 classes" in capsys.readouterr().out
    network, run = checkpoint.load_classifier(tmp_path / "x" / "models" / "theirs")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(x), digits((x - 0.1) / 0.3))
    assert run["class_names"] == json.loads((set_folder / "manifest.json").read_text())["class_names"]
    assert run_job(monkeypatch, *options, "--manifold_set", set_folder) == 2
    assert "is there already" in capsys.readouterr().err

    names = tmp_path / "names.json"
    more = ["--classes", names, "--data.resolution", 32, "--overwrite"]
    for content, message in (("[1, 2]", "list of two class names"), ('["a", "a"]', "'a' twice"), ("[", "is no JSON")):
        names.write_text(content)
        assert run_job(monkeypatch, *options, *more) == 2
        assert message in capsys.readouterr().err
    names.write_text('["a", "b", "c"]')
    assert run_job(monkeypatch, *options, *more) == 0
    _, run = checkpoint.load_classifier(tmp_path / "x" / "models" / "theirs")
    assert (run["class_names"], run["resolution"]) == (["a", "b", "c"], 32)
    assert run_job(monkeypatch, *options[:4], "--model", "a/b", "--output", tmp_path / "x", *more) == 2
    assert "name:" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "x" / "models").iterdir()} == {"theirs"}
    assert load_file(tmp_path / "x" / "models" / "theirs" / "model.safetensors").keys() >= {"mean", "std", "network.0.weight"}


@pytest.mark.parametrize("what", ["program", "own buffers", "no buffers"])
@pytest.mark.parametrize("included", [False, True])
def test_a_presets_normalisation_is_not_for_models_of_others(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, what: str, included: bool
) -> None:
    inner = small() if what == "program" else small(classifiers.network, "wrn-10-1", 3, 4)
    theirs = inner if what == "no buffers" else Normalised(inner).eval()
    made = program(theirs, tmp_path / "x.pt", "trace") if what == "program" else saved(theirs.state_dict(), tmp_path / "x.pt")
    (tmp_path / "names.json").write_text(json.dumps(CLASSES))
    preset, model = tmp_path / "mine.yaml", tmp_path / "runs" / "models" / "theirs"
    options = ["--checkpoint", made, "--model", "theirs", "--classes", tmp_path / "names.json", "--output", tmp_path / "runs"]
    options += ["--classifier.name", "wrn-10-1", "--overwrite", "--preset", preset if included else "cifar10"]
    if included:
        preset.write_text("include: [cifar10]")
    assert run_job(monkeypatch, *options) == 0
    network, run = checkpoint.load_classifier(model)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-5, atol=1e-5)
    if not included:
        return
    # what a file of the user's own says, though it includes a preset, or one comes after it
    preset.write_text("include: [cifar10]\nclassifier: {mean: [0.25], std: [0.5]}")
    assert run_job(monkeypatch, *options, "cifar10", "--classifier.std", 0.75) == 0
    network, run = checkpoint.load_classifier(model)
    assert (network.mean.flatten().tolist(), network.std.flatten().tolist()) == ([0.25], [0.75])
    if what == "program":
        told = "images go in normalised by mean (0.25,) and std (0.75,), besides what the program does inside"
        assert run["source"]["notes"] == [told]
    preset.write_text("include: [cifar10]\nclassifier: {mean: [0.25]}")
    assert run_job(monkeypatch, *options) == 2, "both, or neither"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["state", "trace", "export"])
def test_on_a_gpu(tmp_path: Path, shufflenet: nn.Module, images: Tensor, how: str) -> None:
    path = saved(shufflenet.state_dict(), tmp_path / "x.pth") if how == "state" else program(small(), tmp_path / "x.pt", how)
    on_cpu, _ = imported(path, tmp_path / "model")
    on_gpu, _ = checkpoint.load_classifier(tmp_path / "model", "cuda")
    x = images.cuda().requires_grad_(True)
    logits = on_gpu(x)
    torch.testing.assert_close(logits.detach().cpu(), on_cpu(images).detach(), rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().max() > 0
