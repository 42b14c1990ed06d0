"""Measures of samples against their published formulas, and what is judged a collapse, or better."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from copiers import HERE, ClassCopier, Copier, digits, untrained_classifier
from torch import Tensor

from dmat_ray.config import Config, QualityConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import quality
from dmat_ray.manifold import samples as sampling

CPU = torch.device("cpu")


@pytest.fixture
def classifier_folder(tmp_path: Path, make_config: Callable[..., Config]) -> Path:
    return untrained_classifier(tmp_path / "model", make_config())


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


def test_images_of_which_there_are_too_few_for_neighbours_are_refused_at_the_start() -> None:
    labels = torch.tensor([0, 1, 0])
    with pytest.raises(UserError, match=r"needs 4 images or more, .* there are 3; take more, or gan.quality.network none"):
        quality.check(QualityConfig(), 1, 8, labels)
    quality.check(QualityConfig(network="none"), 1, 8, labels)
    quality.check(QualityConfig(), 1, 8, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(RuntimeError, match="out of range"):
        quality.compare(torch.rand(8, 5), torch.rand(3, 5))
    assert quality.compare(torch.rand(8, 5), torch.rand(4, 5))["fid"] > 0
