"""95 % intervals of accuracies: of a share, of two models on the same images, of the mean over trainings of a method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL = 1.959963984540054  # the 0.975 quantile of the normal distribution
Z = 1.959964  # the same as shares and their differences have always had it
ROUNDING = 1e-12  # a standard deviation of values in [-1, 1] below this is of their roundings alone


@dataclass(frozen=True)
class Accuracy:
    """A share with its 95 % interval; all in [0, 1]. Of means and UAR `count` is that of examples, the interval a bound."""

    value: float
    low: float
    high: float
    count: int


def wilson(correct: int, count: int) -> Accuracy:
    """Wilson score interval (Wilson 1927) of a proportion."""
    if count == 0:
        raise ValueError("no examples to take an accuracy of")
    p = correct / count
    centre = (p + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(p * (1 - p) / count + Z * Z / (4 * count * count))
    return Accuracy(p, max(0.0, centre - half), min(1.0, centre + half), count)


@dataclass(frozen=True)
class Difference:
    """How much more often one model is right than another on the same `count` examples, in [-1, 1], with its 95 % interval.

    `chance` is McNemar's exact two-sided p: how likely so uneven a split of the examples on which they differ would be if neither
    were better; None of means. All of it is about these models on such images, and not about trainings with other seeds.
    """

    value: float
    low: float
    high: float
    chance: float | None
    count: int


def paired(first_N: np.ndarray, second_N: np.ndarray) -> Difference:
    """The difference of the means of values in [0, 1], paired by example.

    The interval is Wald's with an example more on either side that only one is right on (Bonett and Price 2012, of shares), which
    keeps it honest for few examples and for none on which they differ. Raises ValueError if there are no examples.
    """
    moved = np.asarray(first_N, np.float64) - np.asarray(second_N, np.float64)
    if not len(moved):
        raise ValueError("no examples to compare models on")
    with_two = np.append(moved, [1.0, -1.0])
    middle, half = float(with_two.mean()), Z * float(with_two.std()) / math.sqrt(len(with_two))
    better, worse = int((moved == 1).sum()), int((moved == -1).sum())
    shares = bool(np.isin(moved, (-1, 0, 1)).all())
    chance = _of_halves(min(better, worse), better + worse) if shares else None
    return Difference(float(moved.mean()), max(-1.0, middle - half), min(1.0, middle + half), chance, len(moved))


def _of_halves(fewer: int, count: int) -> float:
    """Twice the chance of at most so many heads in `count` throws of a coin, or 1."""
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(log - count * math.log(2)) for log in logs))


@dataclass(frozen=True)
class Estimate:
    """A mean over trainings, or over pairs of them, in [-1, 1], with the half of its 95 % interval and how many are behind it.

    `others` is how many trainings the second method has where they are not paired, `error` the standard error, and `freedom` the
    degrees of freedom of Student's t, of which the half is a multiple of it.
    """

    value: float
    half: float
    trainings: int
    error: float = 0.0
    freedom: float = math.inf
    others: int | None = None

    @property
    def low(self) -> float:
        """Where the interval begins; it is not cut off where no accuracy can be."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Where the interval ends."""
        return self.value + self.half

    def chance(self, of: float = 0.0) -> float:
        """Two-sided p-value of the mean being `of`; 1 where all values were the same, which no t is of."""
        return student_chance((self.value - of) / self.error, self.freedom) if self.error else 1.0

    def __str__(self) -> str:
        """In per cent, as it is printed everywhere."""
        return f"{points(self.value):.1f} ± {points(self.half):.1f}"


def points(share: float) -> float:
    """In percentage points, to be rounded for print: 0.2875 are 28.75, which 100 * 0.2875 is not quite."""
    return round(100 * share, 9)


def estimate(trainings: Sequence[np.ndarray], *, share: bool = False) -> Estimate:
    """The mean of values in [-1, 1], a row a training of (N) examples, which are the same for all, with an interval over both.

    `share`: they are accuracies, in [0, 1], and not differences.

    The N images and the n trainings are taken for random draws, and the interval is about other images and other trainings of
    the same settings. With the variance over images of the means over trainings, and that over trainings of the means over
    images,

        error² = a + b,  a = variance over images / N,  b = variance over trainings / n  (0 of one training)
        half = t(0.975, f) · error,  f = error⁴ / (a² / (N - 1) + b² / (n - 1))

    f is Satterthwaite's (Biometrics Bulletin 2, 1946) and Welch's (Biometrika 34, 1947). What one training makes of one image
    counts in a and in b, so that the interval is a little wide (Owen, Annals of Applied Statistics 1, 2007). It is short where b
    is most of the error and trainings are few, whose spread is little known: a simulation is in
    tests/evaluation/test_intervals.py. Of a share of one training, whose values are 0 or 1, the half is that of Wilson's
    interval. Raises ValueError for fewer than two examples.
    """
    values = np.stack([np.asarray(row, np.float64) for row in trainings])
    count, examples = values.shape
    _require_two(examples)
    of_trainings = [(_variance(values.mean(axis=1)) / count, count - 1)] if count > 1 else []
    found = _of_parts(values.mean(axis=0), float(values.mean()), of_trainings, count)
    # of which Student's t covers too little near the ends
    if share and count == 1 and found.error and np.isin(values, (0.0, 1.0)).all():
        right = wilson(int(values.sum()), examples)
        return Estimate(found.value, (right.high - right.low) / 2, 1, found.error, found.freedom)
    return found


def estimate_apart(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """The mean of `first` less that of `second`: trainings of two methods that are not paired, on the same (N) examples.

    As `estimate`, with a variance over trainings of each method. Raises ValueError for fewer than two examples or trainings.
    """
    sides = [np.stack([np.asarray(row, np.float64) for row in side]) for side in (first, second)]
    _require_two(sides[0].shape[1])
    if min(map(len, sides)) < 2:
        raise ValueError("no spread over the trainings of a method that has one")
    moved = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    of_trainings = [(_variance(side.mean(axis=1)) / len(side), len(side) - 1) for side in sides]
    found = _of_parts(moved, float(moved.mean()), of_trainings, len(sides[0]))
    return Estimate(found.value, found.half, found.trainings, found.error, found.freedom, len(sides[1]))


def _require_two(examples: int) -> None:
    if examples < 2:
        raise ValueError(f"no spread over {examples} images")


def _variance(values: np.ndarray) -> float:
    spread = float(values.std(ddof=1))
    return spread**2 if spread >= ROUNDING else 0.0


def _of_parts(images_N: np.ndarray, value: float, of_trainings: Sequence[tuple[float, int]], trainings: int) -> Estimate:
    """Student's interval of a mean: images are one part of its variance, the others are given with their degrees of freedom."""
    examples = len(images_N)
    parts = [(_variance(images_N) / examples, examples - 1), *of_trainings]
    variance = sum(part for part, _ in parts)
    if variance == 0:  # all the same: what may still be is 3 of N, by the rule of three
        return Estimate(value, 3.0 / examples, trainings)
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    error = math.sqrt(variance)
    return Estimate(value, student_quantile(freedom) * error, trainings, error, freedom)


def student_chance(t: float, freedom: float) -> float:
    """How likely Student's t of so many degrees of freedom, whole or not or infinitely many, is at least as far from 0 as `t`.

    It is the incomplete beta function I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t²) (DLMF 8.17).
    """
    if math.isinf(freedom):
        return math.erfc(abs(t) / math.sqrt(2))
    a, x, y = freedom / 2, freedom / (freedom + t * t), t * t / (freedom + t * t)
    if y == 0:
        return 1.0
    front = math.lgamma(a + 0.5) - math.lgamma(a) - math.lgamma(0.5) + 0.5 * math.log(y)
    front += a * (math.log1p(-y) if y < 0.5 else math.log(x))
    if x < (a + 1) / (a + 2.5):
        return math.exp(front) / (a * _fraction(a, 0.5, x))
    return 1 - math.exp(front) / (0.5 * _fraction(0.5, a, y))


def _fraction(a: float, b: float, x: float) -> float:
    """1 over the continued fraction of the incomplete beta function (DLMF 8.17.22), which converges fast for x below
    (a + 1) / (a + b + 2); by the algorithm of Lentz.
    """
    value = up = 1.0
    down = 0.0
    for k in range(1, 10_000):
        m = k // 2
        if k % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        down = 1 / (1 + term * down)
        up = 1 + term / up
        value *= up * down
        if abs(up * down - 1) < 1e-15:
            break
    return value


def student_quantile(freedom: float) -> float:
    """The t that |t| exceeds once in twenty, of one degree of freedom or more, or infinitely many: 12.7 of one, 1.96 of many.

    Newton's steps begin below it, where `student_chance` is convex, and so rise to it.
    """
    t = NORMAL
    for _ in range(100 if math.isfinite(freedom) else 0):
        log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        density = math.exp(log - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (student_chance(t, freedom) - 0.05) / (2 * density)
        t += step
        if step < 1e-13 * t:
            break
    return t
