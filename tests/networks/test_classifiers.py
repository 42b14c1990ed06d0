"""Networks: they take the images' channels and normalise inside themselves."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from installed import install
from torch import Tensor

from dmat_ray.config import ClassifierConfig, Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers, wide_resnet
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.storage import at
from dmat_ray.storage.files import sha256
from dmat_ray.training import trained_models, trainer


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
        UserError,
        match=r"classifier\.name 'resnet19' is not known; did you mean resnet1\d\? choose 'digits_cnn', 'wrn-.*, timm.*resnet18",
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
grey = "theirs_{place}:grey"
wide = "theirs_{place}:wide"
old = "theirs_{place}:old"
lazy = "theirs_{place}:lazy"
idle = "theirs_{place}:idle"
still = "theirs_{place}:still"
tied = "theirs_{place}:tied"
batch = "theirs_{place}:batch"
noisy = "theirs_{place}:noisy"
"""
THEIRS = """
import torch
from torch import nn
def flat(channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, num_classes))
def text(channels, num_classes):
    return "a network"
def grey(channels, num_classes):
    return {1: nn.Flatten()}[channels]
def wide(channels, num_classes):
    return nn.Flatten()
def old(channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(channels * 64, num_classes)))
def lazy(channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def idle(channels, num_classes):
    network = flat(channels, num_classes)
    network[1].aside = nn.Linear(2, 2)
    return network
def still(channels, num_classes):
    return flat(channels, num_classes).requires_grad_(False)
def batch(channels, num_classes):
    return nn.Sequential(nn.BatchNorm2d(channels, track_running_stats=False), *flat(channels, num_classes))
class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)
def noisy(channels, num_classes):
    return nn.Sequential(Noise(), *flat(channels, num_classes))
def tied(channels, num_classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, channels * 64), nn.Linear(channels * 64, channels * 64))
    network[2].weight = network[1].weight
    return network
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
    with pytest.raises(
        UserError, match=r"'own/other': no installed package names it .* there are own/batch, own/flat, own/gone, "
    ):
        classifiers.build(ClassifierConfig(name="own/other"), 3, 5)
    monkeypatch.syspath_prepend(install(tmp_path / "there", PROJECT.format(place="there").replace("theirs", "others")))
    with pytest.raises(
        UserError, match="'own/flat': 2 packages have a network of this name: others_there:flat, theirs_here:flat"
    ):
        classifiers.build(ClassifierConfig(name="own/flat"), 3, 5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_wrong_with_a_network_is_told(
    make_config: Callable[..., Config], set_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, PROJECT.format(place="wrong"), theirs_wrong=THEIRS))
    for name, words in (
        ("grey", r"'theirs_wrong:grey' of 3 channels and 5 classes: KeyError: 3"),
        ("wide", r"does not put out one logit a class, shape \(2, 5\), but shape \(2, 192\)"),
        ("old", r"cannot be copied, as attacks do: RuntimeError: .*torch.nn.utils.parametrizations"),
        ("lazy", r"'own/lazy': 'theirs_wrong:lazy' leaves the shape of 1\.weight to the first images"),
        ("idle", r"'own/idle': its output does not depend on its 1\.aside\.weight, for whose gradient several workers"),
        ("batch", r"'own/batch' says something else of an image as the other images of its batch change; give one that"),
        ("still", r"'own/still' has no gradients: RuntimeError: .*does not require grad"),
    ):
        with pytest.raises(UserError, match=words):
            classifiers.require_trainable(ClassifierConfig(name=f"own/{name}"), 3, 8, 5, workers=2)
    classifiers.require_trainable(ClassifierConfig(name="own/tied"), 3, 8, 192, workers=2)
    classifiers.require_trainable(ClassifierConfig(name="own/noisy"), 3, 8, 5, workers=2)
    idle = make_config(classifier={"name": "own/idle"}, manifold_set=str(set_folder))
    trained_models.require_fit([idle], read_manifest(set_folder), workers=1)
    with pytest.raises(UserError, match="several workers would wait"):
        trained_models.require_fit([idle], read_manifest(set_folder), workers=2)
    with pytest.raises(UserError, match=r"'own/flat' cannot take 9x9 images: RuntimeError: mat1 and mat2"):
        classifiers.require_trainable(ClassifierConfig(name="own/flat"), 3, 9, 5)


def test_a_worker_of_one_image_a_step_is_refused_where_batch_norm_has_nothing_to_measure() -> None:
    """A ResNet leaves one pixel of an image of 32; of what leaves more, one image has statistics."""
    with pytest.raises(
        UserError, match=r"'resnet18' cannot take 32x32 images one at a time, as training\.batch_size over the workers"
    ):
        classifiers.require_trainable(ClassifierConfig(name="resnet18"), 3, 32, 5, images=1)
    classifiers.require_trainable(ClassifierConfig(name="resnet18"), 3, 32, 5)
    classifiers.require_trainable(ClassifierConfig(name="digits_cnn"), 3, 32, 5, images=1)


def saved(folder: Path, name: str, channels: int = 3) -> Config:
    config = Config(name="mine", classifier=ClassifierConfig(name=name))
    network = classifiers.build(config.classifier, channels, 5)
    run = checkpoint.describe_run(config, tuple("abcde"), channels, 8, None, None)
    checkpoint.save(folder, network, {**run, "finished": True, "history": []})
    return config


def test_layers_that_share_their_weights_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="tied"), theirs_tied=THEIRS))
    saved(tmp_path / "mine", "own/tied")
    again, _ = checkpoint.load_classifier(tmp_path / "mine")
    assert again.network[2].weight is again.network[1].weight


def test_a_changed_network_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source is not trained on, and what was measured of it counts no more; another package's is not even loaded."""
    monkeypatch.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="before"), theirs_before=THEIRS))
    saved(tmp_path / "mine", "own/flat")
    run, digest = checkpoint.read_run(tmp_path / "mine"), checkpoint.digest(tmp_path / "mine")
    source = tmp_path / "here" / "theirs_before.py"
    sha = sha256(source)
    assert run["network"] == {"package": "theirs", "version": "1.2", "entry": "theirs_before:flat", "sha256": sha}
    checkpoint.require_network_of(run, tmp_path / "mine", unchanged=True)
    source.write_text(THEIRS + "# more")
    with pytest.raises(UserError, match=r"own/flat of package theirs 1\.2, 'theirs_before:flat', whose source has changed"):
        checkpoint.require_network_of(run, tmp_path / "mine", unchanged=True)
    assert checkpoint.digest(tmp_path / "mine") != digest
    checkpoint.load_classifier(tmp_path / "mine")
    (tmp_path / "here" / "theirs-1.2.dist-info" / "entry_points.txt").write_text(
        "[dmat_ray.networks]\nflat = theirs_before:wide\n"
    )
    with pytest.raises(UserError, match="which here is 'theirs_before:wide' of theirs"):
        checkpoint.load_classifier(tmp_path / "mine")


@pytest.mark.slow
def test_a_training_does_not_go_on_with_a_changed_network(
    make_config: Callable[..., Config], set_folder: Path, generator: StyleGAN2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = THEIRS.replace("channels * 64", "64")
    monkeypatch.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="trained"), theirs_trained=grey))
    config = make_config(classifier={"name": "own/flat"}, name="mine", output=str(tmp_path), manifold_set=str(set_folder))
    sha = generators.fingerprint(config.generator.path)

    def train() -> None:
        trainer.train(config, open_set(set_folder, "train"), generator, sha, LocalContext(tmp_path / "training"))

    train()
    trained_models.publish(at(tmp_path / "training" / "checkpoint"), at(tmp_path / "models" / "mine"))
    assert trained_models.is_trained(config)
    train()
    (tmp_path / "here" / "theirs_trained.py").write_text(grey + "# more")
    assert not trained_models.is_trained(config)
    with pytest.raises(UserError, match=r"whose source has changed; train under another --name"):
        train()


LOAD_EACH = """
import sys
from dmat_ray import load_classifier
for folder in sys.argv[1:]:
    try:
        load_classifier(folder)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
def test_networks_of_no_installed_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though modules lie on the path that a model's folder may mean: they are not imported."""
    with monkeypatch.context() as patched:
        patched.syspath_prepend(install(tmp_path / "here", PROJECT.format(place="here"), theirs_here=THEIRS))
        saved(tmp_path / "mine", "own/flat")
    names = ["own/flat", "own/theirs_here", "own/theirs_here:flat"]
    for i, name in enumerate(names):
        folder = shutil.copytree(tmp_path / "mine", tmp_path / f"mine_{i}")
        run = json.loads((folder / "run.json").read_text())
        run["config"]["classifier"]["name"] = name
        (folder / "run.json").write_text(json.dumps(run))
    for module in ("theirs_here", "flat"):
        (tmp_path / f"{module}.py").write_text("open('imported', 'w')")
    command = [sys.executable, "-c", LOAD_EACH, *(f"mine_{i}" for i in range(len(names)))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert len(told) == len(names)
    for name, line in zip(names, told, strict=True):
        assert line.startswith(f"UserError: classifier.name '{name}': no installed package names it")
    assert not (tmp_path / "imported").exists()
