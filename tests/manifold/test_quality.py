"""Measures of samples against their published formulas, and the networks whose features they are taken of."""

import io
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from dmat_ray.config import Config, EncoderConfig, QualityConfig, StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import axes, diversity, gan, quality, weights
from dmat_ray.manifold import samples as sampling
from dmat_ray.manifold.axes import principal_axes
from dmat_ray.manifold.base import LatentGenerator
from dmat_ray.manifold.encoder import untrained
from dmat_ray.manifold.encoder_trainer import fresh_errors, sample_w
from dmat_ray.manifold.samples import sample_grid
from dmat_ray.manifold.starts import Nearest
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

CPU = torch.device("cpu")
HERE = LocalContext(Path())


def digits(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes of one grey level each, on noise, as bytes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    level = torch.tensor([0.2, 0.5, 0.8])[labels].view(-1, 1, 1, 1)
    return ((level + 0.1 * torch.randn(count, 1, 32, 32, generator=rng)).clamp(0, 1) * 255).to(torch.uint8), labels


class Copier(LatentGenerator):
    """Makes image number i of `images` from z with |z_0| in the i-th part of [0, 1); `freedom` 0 makes one image only."""

    def __init__(self, images: Tensor, freedom: float = 1.0) -> None:
        super().__init__(4, 4, 1, 32, 1)
        self.images, self.freedom = images, freedom

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        return z_BZ[:, None]

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        place = (torch.erf(w_BLD[:, 0, 0].abs() / 2**0.5) * len(self.images) * self.freedom).long()
        return self.images[place.clamp(max=len(self.images) - 1)].float() / 255


def test_fid_is_the_frechet_distance_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    made, real = rng.normal(size=(400, 6)), rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 0.5
    means = made.mean(axis=0) - real.mean(axis=0)
    covariances = np.cov(made, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = means @ means + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert quality.compare(torch.from_numpy(made), torch.from_numpy(real))["fid"] == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_of_their_paper() -> None:
    """The share of points of one set that lie within the third neighbour's distance of a point of the other."""
    rng = np.random.default_rng(1)
    made, real = rng.normal(size=(80, 2)), rng.normal(size=(90, 2)) * 1.5 + 0.7

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        radius = np.sort(np.linalg.norm(by[:, None] - by[None], axis=2), axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - by[None], axis=2) <= radius[None]).any(axis=1).mean())

    found = quality.compare(torch.from_numpy(made), torch.from_numpy(real))
    assert found["precision"] == pytest.approx(covered(made, real), abs=1e-6)
    assert found["recall"] == pytest.approx(covered(real, made), abs=1e-6)
    assert found["precision"] != found["recall"]


@pytest.fixture(scope="module")
def judge() -> quality.Judge:
    return quality.Judge(QualityConfig(samples=200, epochs=4), *digits(300), HERE)


def test_samples_like_the_images_are_good_and_others_are_not(judge: quality.Judge) -> None:
    copies = judge(Copier(digits(300, seed=5)[0]))
    noise = judge(Copier(torch.randint(0, 256, (300, 1, 32, 32), dtype=torch.uint8)))
    assert copies["fid"] < 0.1 * noise["fid"]
    assert copies["precision"] > 0.8
    assert copies["recall"] > 0.7
    assert noise["precision"] < 0.2
    assert judge(Copier(digits(300, seed=5)[0])) == copies, "the same samples are judged each time"


def test_diversity_is_relative_to_pairs_of_real_images() -> None:
    """Of an unconditional generator any two samples are compared, and any two images."""
    images, labels = digits(300, seed=5)
    judge = quality.Judge(QualityConfig(network="none", samples=200), images, labels, HERE, conditional=False)
    assert judge(Copier(images))["diversity"] == pytest.approx(1, abs=0.1)
    one_class = judge(Copier(images[0::3]))
    assert one_class["diversity"] < 0.7, "a class that is alone is less than all of the images"
    collapsed = judge(Copier(images, freedom=0))
    assert collapsed["diversity"] == 0
    assert judge.collapsed(collapsed)
    assert judge.collapsed({"lowest_diversity": float("nan")})
    assert not judge.collapsed({"lowest_diversity": 0.41})


class ClassCopier(LatentGenerator):
    """Makes images of the class that z asks for, of `dead` classes the same one always."""

    def __init__(self, images: Tensor, labels: Tensor, dead: tuple[int, ...] = ()) -> None:
        classes = int(labels.max()) + 1
        super().__init__(classes + 1, classes + 1, 1, images.shape[2], 1, num_classes=classes)
        self.groups, self.dead = [images[labels == c].float() / 255 for c in range(classes)], dead

    def mapping(self, z_BZ: Tensor, truncation_psi: float = 1.0) -> Tensor:
        return z_BZ[:, None]

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        images = []
        for z, c in zip(w_BLD[:, 0], self.class_of(w_BLD[:, 0]).tolist(), strict=True):
            place = 0 if c in self.dead else int(torch.erf(z[-1].abs() / 2**0.5) * len(self.groups[c]))
            images.append(self.groups[c][min(place, len(self.groups[c]) - 1)])
        return torch.stack(images)


def test_one_dead_class_is_a_collapse(judge: quality.Judge) -> None:
    images, labels = digits(300, seed=5)
    alive, dead = (judge(ClassCopier(images, labels, d)) for d in ((), (1,)))
    assert alive["diversity"] == pytest.approx(1, abs=0.1)
    assert alive["lowest_diversity"] == pytest.approx(1, abs=0.2)
    assert not judge.collapsed(alive)
    assert dead["diversity"] > 0.5
    assert dead["lowest_diversity"] == 0
    assert judge.collapsed(dead)


class WrongClass(ClassCopier):
    """Makes images of class 0 of every z, whatever its class."""

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        w = w_BLD.clone()
        w[:, :, 0] = 10
        return super().synthesis(w)


def test_a_generator_is_not_better_for_making_the_wrong_class() -> None:
    """Real images of each class, as they were not seen, against those of the frequent class alone."""
    images, labels = digits(600)
    real, made = digits(600, seed=5)[0], labels
    kept = torch.cat([torch.nonzero(labels == c).flatten()[:n] for c, n in enumerate((200, 20, 10))])
    rare = quality.Judge(QualityConfig(samples=300, epochs=4), images[kept], labels[kept], HERE)
    right, wrong = rare(ClassCopier(real, made)), rare(WrongClass(real, made))
    assert not rare.collapsed(wrong)
    assert rare.is_better(right, wrong)
    assert not rare.is_better(wrong, right)


def test_a_dead_class_of_a_hundred_is_a_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    """Far more classes than the samples would give pairs. One that has no two real images cannot be judged, which is said."""
    labels = torch.arange(500) % 100
    images = torch.randint(0, 256, (500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[labels == 41] = images[41].clone()
    judge = quality.Judge(QualityConfig(network="none", samples=200), images, labels, HERE)
    assert "of 1 of 100 classes no two real images differ" in capsys.readouterr().err
    found = [judge(ClassCopier(images, labels, dead)) for dead in ((41,), (7,))]
    assert [judge.collapsed(q) for q in found] == [False, True]
    assert found[1]["lowest_diversity"] == 0
    assert found[1]["diversity"] == pytest.approx(found[0]["diversity"], abs=0.05)


def test_classes_of_which_few_pairs_were_drawn_do_not_count() -> None:
    values, classes = torch.tensor([1.0] * 20 + [0.0] * 5), torch.tensor([0] * 20 + [1] * 5)
    assert quality.class_means(values, classes) == {None: pytest.approx(0.8), 0: 1.0}
    assert quality.class_means(values, None) == {None: pytest.approx(0.8)}


class Part:
    """One of two workers, in threads: `average_` waits for the other."""

    world_size, device = 2, CPU
    barrier, boxes = threading.Barrier(2), [None, None]

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def average_(self, tensors: list[Tensor]) -> None:
        self.boxes[self.rank] = [t.clone() for t in tensors]
        self.barrier.wait()
        means = [(a + b) / 2 for a, b in zip(*self.boxes, strict=True)]
        self.barrier.wait()
        for t, mean in zip(tensors, means, strict=True):
            t.copy_(mean)


@pytest.fixture
def classifier_folder(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    """An untrained classifier of three classes, as jobs/train.py leaves one."""
    config = make_config()
    torch.manual_seed(0)
    run = checkpoint.describe_run(config, ("a", "b", "c"), 1, 32, "g", "s") | {"epoch": 1}
    checkpoint.save(tmp_path / "model", classifiers.build(config.classifier, 1, 3), run)
    return tmp_path / "model"


def test_two_workers_judge_as_one(monkeypatch: pytest.MonkeyPatch, classifier_folder: Path) -> None:
    """Each renders its part of the samples, and both come to the numbers of one that renders all."""
    images, labels = digits(300, seed=5)
    monkeypatch.setattr(sampling, "CHUNK_PIXELS", 32 * 32 * 10)
    settings = QualityConfig(samples=110, network=str(classifier_folder))
    expected = quality.Judge(settings, images, labels, HERE)(ClassCopier(images, labels))

    def work(rank: int) -> dict[str, float]:
        return quality.Judge(settings, images, labels, Part(rank))(ClassCopier(images, labels))

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(work, range(2))
    assert one == two
    assert one == pytest.approx(expected, rel=1e-4)


def test_large_images_are_made_a_few_at_a_time() -> None:
    assert sampling.chunk_size(32) == 1024
    assert sampling.chunk_size(256) == 16
    assert sampling.chunk_size(2048) == 1


class Counted(LatentGenerator):
    """Makes grey images, and remembers the most that it made at once."""

    def __init__(self, resolution: int) -> None:
        super().__init__(4, 4, 2, resolution, 1)
        self.map, self.most = torch.nn.Identity(), 0

    def synthesis(self, w_BLD: Tensor, clamp: bool = True) -> Tensor:
        self.most = max(self.most, len(w_BLD))
        return w_BLD.mean(dim=(1, 2))[:, None, None, None].expand(-1, 1, self.resolution, self.resolution)


def errors_of(generator: LatentGenerator) -> dict[str, float]:
    config = EncoderConfig(width=4, width_max=4)
    encoder = untrained(config, generator)
    with torch.no_grad():
        encoder.head.bias.fill_(0.1)
    return fresh_errors(encoder, generator, config, samples=64)


@pytest.mark.parametrize(
    ("use", "most"),
    [
        (lambda generator: Nearest(generator, 100, 0), {128: 64, 256: 16}),
        (lambda generator: principal_axes(generator, 0), {256: 16, 512: 4}),
        (errors_of, {128: 64, 256: 16}),
    ],
    ids=["starts", "axes", "an encoder's errors"],
)
def test_whatever_renders_samples_makes_fewer_large_ones_at_a_time(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[LatentGenerator], object], most: dict[int, int]
) -> None:
    monkeypatch.setattr(axes, "SAMPLES", 16)
    for resolution, expected in most.items():
        generator = Counted(resolution)
        use(generator)
        assert generator.most == expected


def test_samples_in_parts_are_worth_the_same(monkeypatch: pytest.MonkeyPatch, make_generator: Callable[..., StyleGAN2]) -> None:
    generator = make_generator()

    def found() -> list[Tensor]:
        directions, lengths = principal_axes(generator, 0)
        values = torch.tensor(list(errors_of(generator).values()))
        return [Nearest(generator, 100, 0).pixels, values, directions @ torch.diag_embed(lengths) @ directions.transpose(1, 2)]

    whole = found()
    monkeypatch.setattr(sampling, "CHUNK_PIXELS", 8 * 8 * 5)
    torch.testing.assert_close(found(), whole, rtol=1e-4, atol=1e-5)


def test_pairs_share_their_class() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1])
    pairs = quality.real_pairs(labels, 200, torch.Generator().manual_seed(0))
    assert len(pairs) == 200
    assert all(labels[a] == labels[b] and a != b for a, b in zip(pairs[0::2], pairs[1::2], strict=True))
    assert torch.equal(labels[pairs[0::2]], torch.arange(100) % 3)
    assert len({(int(a), int(b)) for a, b in pairs.view(-1, 2)}) == 2 + 6 + 6, "any two of a class, in either order"
    torch.manual_seed(0)
    generator = StyleGAN2(StyleGAN2Config(resolution=8, channel_base=32, z_dim=8, num_classes=3))
    classes = torch.cat([c for _, _, c in sampling.samples(generator, 300, pairs=True)])
    assert torch.equal(classes[0::2], classes[1::2])
    assert torch.equal(classes[0::2], torch.arange(150) % 3)


def codes_of(draw: Callable[[StyleGAN2], object], generator: StyleGAN2) -> list[Tensor]:
    """Every batch of z that `draw` has mapped."""
    seen: list[Tensor] = []
    handle = generator.map.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    draw(generator)
    handle.remove()
    return seen


MIXING = EncoderConfig(style_mixing=1)


@pytest.mark.parametrize(
    ("draw", "within"),
    [
        (lambda generator: list(sampling.samples(generator, 960, pairs=True)), True),
        (lambda generator: gan.mixed_w(generator, 0.0, gan.StepDraws(0, 1, 960), pairs=True), True),
        (lambda generator: gan.mixed_w(generator, 1.0, gan.StepDraws(0, 1, 480)), False),
        (lambda generator: sample_w(generator, MIXING, gan.StepDraws(0, 1, 480)), False),
    ],
    ids=["the judge's", "a step's", "mixed in training", "mixed for an encoder"],
)
def test_two_z_of_a_class_have_nothing_else_in_common(draw: Callable[[StyleGAN2], object], within: bool) -> None:
    """Of a generator with as many classes as z has coordinates; the images lie as far apart as of z that a class was found in."""
    torch.manual_seed(0)
    shape = StyleGAN2Config(resolution=8, channel_base=64, channel_max=8, z_dim=16, w_dim=16, num_classes=16)
    generator = StyleGAN2(shape).requires_grad_(False)
    first, *more = codes_of(draw, generator)
    one, other = (first[0::2], first[1::2]) if within else (first, more[0])
    classes = one.argmax(dim=1)
    assert torch.equal(classes, other.argmax(dim=1))
    rest = torch.ones_like(one, dtype=torch.bool).scatter_(1, classes[:, None], False)
    assert torch.corrcoef(torch.stack([one[rest], other[rest]]))[0, 1].item() == pytest.approx(0, abs=0.04)

    z = torch.randn(480 * 40, 16)
    free = {c: z[z.argmax(dim=1) == c] for c in range(16)}
    independent = torch.stack([free[int(c)][2 * k % 960 : 2 * k % 960 + 2] for k, c in enumerate(classes)]).flatten(0, 1)
    apart, expected = (
        diversity.distances(generator.synthesis(generator.mapping(codes))).mean().item()
        for codes in (torch.stack([one, other], dim=1).flatten(0, 1), independent)
    )
    assert apart == pytest.approx(expected, rel=0.15)


def test_samples_are_of_the_classes_of_the_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer of these; one class as large as the other leaves z as it is drawn."""
    asked: list[Tensor | None] = []
    drawn = quality.samples
    monkeypatch.setattr(quality, "samples", lambda *a, **k: (asked.append(k.get("classes")), drawn(*a, **k))[1])
    images, labels = digits(300, seed=5)
    kept = torch.cat([torch.nonzero(labels == c).flatten()[:n] for c, n in enumerate((60, 30, 10))])
    for take, samples, frequencies in ((kept, 100, [60, 30, 10]), (kept, 1000, [600, 300, 100]), (torch.arange(300), 100, None)):
        asked.clear()
        judge = quality.Judge(QualityConfig(samples=samples, epochs=1), images[take], labels[take], HERE)
        judge(ClassCopier(images, labels))
        assert [None if a is None else torch.bincount(a).tolist() for a in asked] == [None, frequencies]
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.cat([c for _, _, c in sampling.samples(ClassCopier(images, labels), 100, pairs=False)])
    assert torch.equal(plain, z[:, :3].argmax(dim=1))
    classes = torch.arange(100) % 2
    made = torch.cat([c for _, _, c in sampling.samples(ClassCopier(images, labels), 100, pairs=False, classes=classes)])
    assert torch.equal(made, classes)


def test_z_of_a_class_is_what_was_drawn_with_two_coordinates_changed() -> None:
    z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    turned = diversity.of_classes(z, torch.arange(60) % 5, 5)
    assert torch.equal(turned[:, :5].argmax(dim=1), torch.arange(60) % 5)
    assert torch.equal(turned[:, :5].sort(dim=1).values, z[:, :5].sort(dim=1).values)
    assert torch.equal(turned[:, 5:], z[:, 5:])


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


def test_a_grid_shows_a_class_in_each_column() -> None:
    torch.manual_seed(0)
    generator, seen = StyleGAN2(StyleGAN2Config(resolution=8, channel_base=32, z_dim=8, num_classes=4)), []
    generator.map.register_forward_pre_hook(lambda module, inputs: seen.append(generator.class_of(inputs[0])))
    with Image.open(io.BytesIO(sample_grid(generator))) as grid:
        assert grid.size == (10 * 10 + 2, 8 * 10 + 2)
        pixels = np.asarray(grid) / 255
    assert torch.equal(torch.cat(seen).view(8, 10), torch.arange(10).remainder(4).expand(8, 10))
    z = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    z[13, 3] = z[13, :4].max() + 1
    expected = generator.synthesis(generator.mapping(z[13:14])).detach()[0, 0]
    np.testing.assert_allclose(pixels[12:20, 32:40], expected, atol=0.5 / 255 + 1e-4)


def test_images_of_which_there_are_too_few_for_neighbours_are_refused_at_the_start() -> None:
    labels = torch.tensor([0, 1, 0])
    with pytest.raises(UserError, match=r"needs 4 images or more, .* there are 3; take more, or gan.quality.network none"):
        quality.check(QualityConfig(), 1, 8, labels)
    quality.check(QualityConfig(network="none"), 1, 8, labels)
    quality.check(QualityConfig(), 1, 8, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(RuntimeError, match="out of range"):
        quality.compare(torch.rand(8, 5), torch.rand(3, 5))
    assert quality.compare(torch.rand(8, 5), torch.rand(4, 5))["fid"] > 0
