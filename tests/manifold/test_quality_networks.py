"""The networks whose features samples are judged by: trained here, a classifier by path, and Inception."""

import os
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from copiers import HERE, Copier, digits, untrained_classifier
from torch import Tensor

from dmat_ray.config import Config, QualityConfig
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import quality
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers, weights

CPU = torch.device("cpu")


@pytest.fixture
def classifier_folder(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    return untrained_classifier(tmp_path / "model", make_config())


def test_training_the_network_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    quality.Judge(QualityConfig(samples=20, epochs=1), *digits(), HERE)
    assert torch.equal(torch.rand(4), expected)


def test_features_are_what_the_last_layer_takes_in() -> None:
    images, labels = digits()
    network = quality.train_classifier(images, labels, 3, 1, CPU)
    features = quality.classifier_features(network)(images.float() / 255)
    head = network.network[-1]
    torch.testing.assert_close(features @ head.weight.T + head.bias, network(images.float() / 255))


def test_a_trained_classifier_gives_features(tmp_path: Path, classifier_folder: Path) -> None:
    settings = QualityConfig(network=str(classifier_folder), samples=20)
    assert quality.Judge(settings, *digits(), HERE)(Copier(digits()[0]))["fid"] >= 0
    small = torch.zeros(6, 1, 8, 8)
    with pytest.raises(UserError, match="takes 32x32 images with 1 channel"):
        quality.Judge(settings, small, torch.arange(6) % 3, HERE)
    with pytest.raises(UserError, match="no trained model at"):
        quality.Judge(QualityConfig(network=str(tmp_path / "none")), *digits(), HERE)


def test_a_network_without_a_linear_layer_has_no_features(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """SqueezeNet's classes come out of a convolution."""
    config = make_config(classifier={"name": "squeezenet1_1"})
    network = classifiers.build(config.classifier, 1, 3)
    run = checkpoint.describe_run(config, ("a", "b", "c"), 1, 32, "g", "s") | {"epoch": 1}
    checkpoint.save(tmp_path / "model", network, run)
    before = torch.random.get_rng_state()
    with pytest.raises(UserError, match="is a squeezenet1_1, which has no linear layer to take features from; give another"):
        quality.check(QualityConfig(network=str(tmp_path / "model")), 1, 32, torch.arange(3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_class_cannot_train_a_classifier() -> None:
    images, labels = digits()
    with pytest.raises(UserError, match="two classes or more; choose 'inception' or 'none'"):
        quality.Judge(QualityConfig(), images, torch.zeros_like(labels), HERE)
    assert "fid" not in quality.Judge(QualityConfig(network="none", samples=20), images, torch.zeros_like(labels), HERE)(
        Copier(images)
    )


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's weights as torch-fidelity stores them, but random: its own file cannot be had here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    empty = FeatureExtractorInceptionV3.load_state_dict
    try:
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None  # type: ignore[method-assign]
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = empty  # type: ignore[method-assign]
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_by_path(inception_file: Path) -> None:
    """Its features equal torch-fidelity's own, from the same file, of the same bytes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images, labels = digits(6)
    features, _ = quality.feature_network(QualityConfig(network="inception", weights=str(inception_file)), images, labels, HERE)
    assert features is not None
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(inception_file))
    expected = theirs(images.expand(-1, 3, -1, -1))[0]
    assert expected.shape == (6, 2048)
    torch.testing.assert_close(features(images.float() / 255), expected)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_inception_does_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "it ran"
    torch.save({"fc.weight": torch.zeros(2), "more": Malicious(marker)}, path)
    with pytest.raises(UserError, match=r"does not hold Inception's weights \(UnpicklingError\)"):
        quality.inception_features(path, CPU)
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        quality.inception_features(path, CPU)
    assert not marker.exists()


def test_inception_that_is_not_there_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as raised:
        quality.feature_network(QualityConfig(network="inception"), *digits(6), HERE)
    message = str(raised.value)
    for part in (weights.KNOWN["inception"].file, "torch-fidelity", "TORCH_HOME", "gan.quality.weights", "network classifier"):
        assert part in message
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / weights.KNOWN["inception"].file).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"its sha256 begins with \w{8}, not 6726825d; get it anew"):
        quality.feature_network(QualityConfig(network="inception"), *digits(6), HERE)


class OneOfTwo(LocalContext):
    """A worker that is a thread, and averages with the other one."""

    def __init__(self, folder: Path, rank: int, barrier: threading.Barrier, given: dict[int, list[Tensor]]) -> None:
        super().__init__(folder)
        self.rank, self.world_size, self._barrier, self._given = rank, 2, barrier, given

    def average_(self, tensors: Sequence[Tensor]) -> None:
        self._given[self.rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        for tensor, *both in zip(tensors, self._given[0], self._given[1], strict=True):
            tensor.copy_((both[0] + both[1]) / 2)
        self._barrier.wait()


def test_all_workers_judge_by_the_network_of_the_first(tmp_path: Path) -> None:
    networks = [classifiers.build(Config().classifier.model_copy(update={"name": "digits_cnn"}), 1, 3) for _ in range(2)]
    first = {name: value.clone() for name, value in networks[0].state_dict().items()}
    barrier, given = threading.Barrier(2), dict[int, list[Tensor]]()
    with ThreadPoolExecutor(2) as pool:
        contexts = [OneOfTwo(tmp_path, rank, barrier, given) for rank in range(2)]
        list(pool.map(quality.of_first_worker, networks, contexts))
    for network in networks:
        torch.testing.assert_close(network.state_dict(), first)
