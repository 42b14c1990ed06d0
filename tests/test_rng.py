"""Random numbers belong to an example: nothing else may move them, and they are as random as they should be."""

import hashlib

import numpy as np
import scipy.stats
import torch

from dmat_ray.rng import Draws, derive

LIKE = torch.empty(0)


def test_derived_seeds_are_a_hash_of_their_parts() -> None:
    """Written out, since a set or a checkpoint of today must give the same numbers on another machine in a year."""
    digest = hashlib.blake2b(b"7\x1ftrain/0\x1fimage-3", digest_size=8).hexdigest()
    assert derive(7, "train/0", "image-3") == int(digest, 16) // 2
    assert derive(7, "a", "b") != derive(7, "ab")
    assert len({derive(seed, part, i) for seed in range(3) for part in "xy" for i in range(1000)}) == 6000


def test_draws_belong_to_the_example() -> None:
    ids = [f"image-{i}" for i in range(5)]
    whole, one = Draws(0, ids, "p"), Draws(0, ids[3:4], "p")
    torch.manual_seed(1)
    np.random.seed(1)
    for _ in range(3):
        assert torch.equal(whole.normal(2, 3, like=LIKE)[3:4], one.normal(2, 3, like=LIKE))
        assert torch.equal(whole.uniform(4, like=LIKE)[3:4], one.uniform(4, like=LIKE))


def test_draws_differ_by_seed_purpose_example_and_call() -> None:
    draws = Draws(0, ["a", "b"], "p")
    first = draws.uniform(8, like=LIKE)
    others = [first[1], draws.uniform(8, like=LIKE)[0]]
    others += [Draws(seed, ["a"], purpose).uniform(8, like=LIKE)[0] for seed, purpose in ((1, "p"), (0, "q"))]
    assert all(not torch.equal(first[0], other) for other in others)


def test_draws_have_their_distribution_across_examples() -> None:
    ids = [f"image-{i}" for i in range(1000)]
    uniform = Draws(0, ids, "p").uniform(2, like=LIKE).numpy()
    normal = Draws(0, ids, "q").normal(2, like=LIKE).numpy()
    assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 0.01
    assert scipy.stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    neighbours = scipy.stats.pearsonr(uniform[:-1, 0], uniform[1:, 0])
    assert abs(neighbours.statistic) < 0.1


def test_draws_take_the_kind_of_their_model() -> None:
    like = torch.empty(3, dtype=torch.float64)
    assert Draws(0, ["a"], "p").normal(2, 2, like=like).dtype == torch.float64
    assert Draws(0, ["a"], "p").uniform(2, 2, like=like).shape == (1, 2, 2)
