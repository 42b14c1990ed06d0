"""LPIPS against the lpips package, and where its backbone's weights come from."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.networks import weights
from dmat_ray.networks.perceptual import Perceptual


@pytest.fixture(scope="module")
def squeeze() -> Perceptual:
    return Perceptual("squeeze", "random", seed=1)


@pytest.fixture(scope="module")
def squeeze_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's SqueezeNet with weights of its own, as torchvision stores them."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def images(count: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_distance_is_that_of_the_package(net: str) -> None:
    perceptual = Perceptual(net, "random")
    a, b = images(3, seed=0), images(3, seed=1)
    with torch.no_grad():
        expected = perceptual.metric(2 * a - 1, 2 * b - 1).flatten()
        found = perceptual.distance(a, perceptual.features(b))
    assert expected.min() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_linear_layers_are_the_published_ones(squeeze: Perceptual) -> None:
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth"
    published = torch.load(path, map_location="cpu", weights_only=True)
    own = squeeze.metric.state_dict()
    assert len(published) == 7
    assert all(torch.equal(own[key], value) for key, value in published.items())


def test_grey_images_are_seen_as_rgb(squeeze: Perceptual) -> None:
    grey = images(2, channels=1)
    with torch.no_grad():
        pairs = zip(squeeze.features(grey), squeeze.features(grey.repeat(1, 3, 1, 1)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_distance_to_itself_is_zero_and_others_do_not_matter(squeeze: Perceptual) -> None:
    a, b = images(3, seed=0), images(3, seed=1)
    with torch.no_grad():
        whole = squeeze.distance(a, squeeze.features(b))
        alone = squeeze.distance(a[1:2], squeeze.features(b[1:2]))
        itself = squeeze.distance(a, squeeze.features(a))
    torch.testing.assert_close(alone, whole[1:2], atol=1e-6, rtol=1e-5)
    assert (itself < 1e-12).all()


def test_random_backbone_is_seeded_and_leaves_the_global_rng_alone(squeeze: Perceptual) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    same, other = Perceptual("squeeze", "random", seed=1), Perceptual("squeeze", "random", seed=2)
    assert torch.equal(torch.rand(3), expected)
    a = images(1)
    with torch.no_grad():
        assert torch.equal(same.features(a)[0], squeeze.features(a)[0])
        assert not torch.equal(other.features(a)[0], squeeze.features(a)[0])


def test_nothing_trains(squeeze: Perceptual) -> None:
    assert not any(p.requires_grad for p in squeeze.parameters())
    assert not any(module.training for module in squeeze.modules())


def require_torchvisions_features(perceptual: Perceptual, path: Path) -> None:
    """The maps that LPIPS reads of SqueezeNet, computed by torchvision itself from the file."""
    network = torchvision.models.squeezenet1_1(weights=None)
    network.load_state_dict(torch.load(path, weights_only=True))
    x = images(2)
    # ImageNet's mean and deviation, which LPIPS states for [-1, 1] images
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        found = perceptual.features(x)
        h = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        for k, (start, stop) in enumerate([(0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13)]):
            h = network.features[start:stop](h)
            torch.testing.assert_close(found[k], h / h.norm(dim=1, keepdim=True).clamp_min(1e-10), atol=1e-4, rtol=1e-4)


def test_a_state_dict_by_path_is_really_loaded(squeeze_file: Path) -> None:
    perceptual = Perceptual("squeeze", str(squeeze_file))
    assert not perceptual.random
    require_torchvisions_features(perceptual, squeeze_file)


def test_pretrained_weights_come_from_torchs_cache(tmp_path: Path, squeeze_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    known = weights.KNOWN["lpips_squeeze"]
    (folder / known.file).write_bytes(squeeze_file.read_bytes())
    with pytest.raises(UserError, match=r"is not torchvision's pretrained squeezenet1_1: its sha256 begins with"):
        Perceptual("squeeze", "pretrained")
    digest = hashlib.sha256(squeeze_file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.KNOWN, "lpips_squeeze", dataclasses.replace(known, sha256=digest))
    require_torchvisions_features(Perceptual("squeeze", "pretrained"), squeeze_file)


@pytest.mark.parametrize(
    ("net", "entry"),
    [
        ("alex", torchvision.models.AlexNet_Weights.IMAGENET1K_V1),
        ("vgg", torchvision.models.VGG16_Weights.IMAGENET1K_V1),
        ("squeeze", torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1),
    ],
)
def test_file_names_are_torchvisions(net: str, entry: torchvision.models.WeightsEnum) -> None:
    assert entry.url.rsplit("/", 1)[-1] == weights.KNOWN[f"lpips_{net}"].file


def test_missing_pretrained_weights_name_the_file_and_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as raised:
        Perceptual("vgg", "pretrained")
    message = str(raised.value)
    parts = [
        str(tmp_path),
        weights.KNOWN["lpips_vgg"].file,
        "TORCH_HOME",
        "projection.lpips_weights",
        "lpips_weights=random",
        "torchvision",
    ]
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


def _absent(path: Path) -> None:
    assert not path.exists()


def _other_network(path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, path)


def _other_shape(path: Path) -> None:
    state = torchvision.models.squeezenet1_0(weights=None).state_dict()
    torch.save(state, path)


def _text(path: Path) -> None:
    path.write_text("not weights at all")


def _list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def _module(path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), path)


@pytest.mark.parametrize("make", [_absent, _other_network, _other_shape, _text, _list, _module])
def test_wrong_files_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(UserError, match=r"weights\.pth' (is no file|does not hold the weights of squeeze)") as raised:
        Perceptual("squeeze", str(path))
    assert "\n" not in str(raised.value)
