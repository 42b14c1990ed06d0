"""Networks: they take the images' channels and normalise inside themselves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from installed import install
from torch import Tensor

from dmat_ray import checkpoint, classifiers, wide_resnet
from dmat_ray.attack_view import AttackView
from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.errors import UserError


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_take_the_images_channels(name: str, channels: int) -> None:
    network = classifiers.build(ClassifierConfig(name=name, mean=(0.4,), std=(0.2,)), channels, 5).eval()
    with torch.no_grad():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 5)


def test_normalisation_is_inside_the_classifier() -> None:
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name="digits_cnn", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)), 3, 4).eval()
    x = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), network.network((x - mean) / std))


@pytest.mark.parametrize(
    ("name", "millions"), [("wrn-40-1", 0.6), ("wrn-40-2", 2.2), ("wrn-40-4", 8.9), ("wrn-16-8", 11.0), ("wrn-28-10", 36.5)]
)
def test_wide_resnets_have_the_published_size(name: str, millions: float) -> None:
    """Table 4 and 5 of arXiv 1605.07146."""
    with torch.device("meta"):
        network = wide_resnet.build(name, 3, 10)
    assert network is not None
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_a_wide_resnet_is_what_its_paper_draws() -> None:
    """Batch norm and activation before each convolution, features of groups, and a residual that the last group adds."""
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name="wrn-16-2"), 3, 10).eval().double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        state = {name.removeprefix("network."): value for name, value in network.state_dict().items()}
        h = F.conv2d((x - 0.5) / 0.5, state["0.weight"], padding=1)
        for k in range(1, 7):
            stride = 2 if k in (3, 5) else 1

            def norm(h: Tensor, which: str, k: int = k) -> Tensor:
                keys = ("running_mean", "running_var", "weight", "bias")
                return F.relu(F.batch_norm(h, *(state[f"{k}.{which}.{key}"] for key in keys)))

            active = norm(h, "bn1")
            moved = F.conv2d(active, state[f"{k}.conv1.weight"], stride=stride, padding=1)
            moved = F.conv2d(norm(moved, "bn2"), state[f"{k}.conv2.weight"], padding=1)
            shortcut = state.get(f"{k}.shortcut.weight")
            h = moved + (h if shortcut is None else F.conv2d(active, shortcut, stride=stride))
            assert h.shape == (2, 32 * 2 ** ((k - 1) // 2), 32 // 2 ** ((k - 1) // 2), 32 // 2 ** ((k - 1) // 2))
        h = F.relu(F.batch_norm(h, *(state[f"7.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))))
        expected = F.linear(h.mean(dim=(2, 3)), state["11.weight"], state["11.bias"])
        torch.testing.assert_close(network(x), expected)


def test_attacks_see_the_same_wide_resnet() -> None:
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name="wrn-10-1"), 3, 10)
    network(torch.rand(64, 3, 32, 32))  # moves the running statistics
    view = AttackView(network.eval())
    assert len(view.folded) == 3  # the batch norm between the two convolutions of each block
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(view(x), network(x), atol=1e-4, rtol=1e-4)


def test_a_network_that_cannot_be_built() -> None:
    with pytest.raises(UserError, match=r"wrn-11-2.*6 n \+ 4 layers"):
        classifiers.build(ClassifierConfig(name="wrn-11-2"), 3, 5)
    with pytest.raises(
        UserError, match=r"classifier\.name 'resnet19' is not known; choose 'digits_cnn', 'wrn-DEPTH-WIDTH', timm.*resnet18"
    ):
        classifiers.build(ClassifierConfig(name="resnet19"), 3, 5)
    with pytest.raises(UserError, match=r"classifier\.mean has 2 values, images have 3 channel"):
        classifiers.build(ClassifierConfig(name="digits_cnn", mean=(0.1, 0.2)), 3, 5)


PROJECT = """
[project]
name = "theirs"
version = "1.2"
[project.entry-points."dmat_ray.networks"]
flat = "theirs_{place}:flat"
text = "theirs_{place}:text"
gone = "theirs_{place}:gone"
"""
THEIRS = """
from torch import nn
def flat(channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, num_classes))
def text(channels, num_classes):
    return "a network"
"""


def test_a_network_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="here"), theirs_here=THEIRS))
    config = Config(name="mine", classifier=ClassifierConfig(name="own/flat", mean=(0.4,), std=(0.2,)))
    network = classifiers.build(config.classifier, 3, 5)
    x = torch.rand(2, 3, 8, 8)
    linear = network.get_parameter("network.1.weight"), network.get_parameter("network.1.bias")
    torch.testing.assert_close(network(x), F.linear((x.flatten(1) - 0.4) / 0.2, *linear))
    run = checkpoint.describe_run(config, tuple("abcde"), 3, 8, None, None)
    checkpoint.save(tmp_path / "mine", network, {**run, "finished": True, "history": []})
    again, _ = checkpoint.load_classifier(tmp_path / "mine")
    assert torch.equal(again(x), network(x))
    with pytest.raises(UserError, match=r"'own/text': 'theirs_here:text' gave a str, not a torch\.nn\.Module"):
        classifiers.build(ClassifierConfig(name="own/text"), 3, 5)
    with pytest.raises(UserError, match=r"'own/gone' is 'theirs_here:gone', which cannot be imported: .*has no attribute"):
        classifiers.build(ClassifierConfig(name="own/gone"), 3, 5)
    with pytest.raises(UserError, match=r"'own/other': no installed package names it .* there are own/flat, own/gone, own/text "):
        classifiers.build(ClassifierConfig(name="own/other"), 3, 5)
    monkeypatch.syspath_prepend(install(tmp_path / "there", PROJECT.format(place="there").replace("theirs", "others")))
    with pytest.raises(
        UserError, match="'own/flat': 2 packages have a network of this name: others_there:flat, theirs_here:flat"
    ):
        classifiers.build(ClassifierConfig(name="own/flat"), 3, 5)


@pytest.mark.slow
def test_networks_of_no_installed_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the module lies on the path, and is what the model's folder names: it is not imported."""
    with monkeypatch.context() as patched:
        patched.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="here"), theirs_here=THEIRS))
        config = Config(name="mine", classifier=ClassifierConfig(name="own/flat"))
        run = checkpoint.describe_run(config, tuple("abcde"), 3, 8, None, None)
        checkpoint.save(tmp_path / "mine", classifiers.build(config.classifier, 3, 5), {**run, "finished": True, "history": []})
    (tmp_path / "theirs_here.py").write_text("open('imported', 'w')")
    load = "from dmat_ray import load_classifier; load_classifier('mine')"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "UserError: classifier.name 'own/flat': no installed package names it" in done.stderr
    assert not (tmp_path / "imported").exists()
