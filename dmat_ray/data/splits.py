"""Which images go to the test split, and which are taken when not all are."""

import numpy as np

from dmat_ray.errors import UserError


def split_by_class(labels: np.ndarray, test_share: float, seed: int) -> np.ndarray:
    """True for what goes to the test split: a seeded shuffle inside each class, `test_share` of it (rounded, 1 or more).

    Of two images or more one stays for training.
    """
    in_test = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[by_class], return_index=True)
    for label, members in zip(values, np.split(by_class, starts[1:]), strict=True):
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        in_test[order[: max(1, min(round(len(order) * test_share), len(order) - 1))]] = True
    return in_test


def limited(members: np.ndarray, labels: np.ndarray, limit: int | None, num_classes: int, split: str) -> np.ndarray:
    """At most `limit` of the members, taking the classes in turn (members come shuffled)."""
    if limit is None or limit >= len(members):
        return members
    if limit < num_classes:
        raise UserError(f"data.{split}_limit {limit} cannot hold all {num_classes} classes; raise it")
    chosen: np.ndarray = members[np.lexsort((labels, _rank(labels)))[:limit]]
    return chosen


def balanced(members: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Of these members (which come shuffled) as many of every class as the smallest class has, each group in proportion."""
    least = np.unique(labels, return_counts=True)[1].min()
    place = _rank(groups) + 0.5
    share = place / np.bincount(groups)[groups]
    order = np.lexsort((share, labels))
    taken = np.zeros(len(members), bool)
    taken[order[_rank(labels[order]) < least]] = True
    chosen: np.ndarray = members[taken]
    return chosen


def _rank(values: np.ndarray) -> np.ndarray:
    """How often the same value has come before each place."""
    order = np.argsort(values, kind="stable")
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return rank
