"""What a study's differences say to the paper's claims: means with intervals over images and seeds, and verdicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dmat_ray.metrics import wilson

NEAR = 2.0  # points of accuracy that count as comparable
UNSEEN = ("L2", "fog", "snow", "elastic", "gabor", "jpeg L1", "L1", "stadv")


@dataclass(frozen=True)
class Claim:
    """`better` has a larger accuracy than `than` in a column; with `comparable` one not smaller by more than NEAR points."""

    text: str
    better: str
    than: str
    column: str
    comparable: bool = False

    @property
    def bound(self) -> float:
        """The difference beyond which it holds."""
        return -NEAR if self.comparable else 0.0


def claims(columns: list[str]) -> list[Claim]:
    """Those of the paper's abstract, as far as a test set has the columns."""
    image = next((c for c in columns if c.startswith("PGD-")), "")
    latent = next((c for c in columns if c.startswith("OM-PGD")), "")
    found = [
        Claim("DMAT has a better clean accuracy than AT", "dmat", "at", "clean"),
        Claim("DMAT is about as robust to L∞ as AT", "dmat", "at", image, comparable=True),
        Claim("DMAT is more robust to unseen attacks than AT", "dmat", "at", "unseen mean"),
        *(
            Claim(f"DMAT is more robust to {c} than AT", "dmat", "at", c)
            for c in UNSEEN
        ),
        Claim("AT is not robust on the manifold, DMAT is more", "dmat", "at", latent),
        Claim("OM-AT is not robust to L∞, DMAT is more", "dmat", "om_at", image),
        Claim("OM-AT has a better clean accuracy than standard training", "om_at", "standard", "clean"),
        Claim("DMAT with TRADES is more robust to unseen attacks than TRADES", "dmat_trades", "trades", "unseen mean"),
        *(
            Claim(f"{name} is more robust than DMAT in its worst case over all attacks", method, "dmat", "worst")
            for method, name in (("joint", "The joint threat"),
                                 ("joint_plus", "The joint threat, with averaged and perturbed weights,"),
                                 ("dmat_trades", "DMAT with TRADES"),
                                 ("dmat_trades_plus", "DMAT with TRADES, averaged and perturbed weights"),
                                 ("dmat_trades_wide", "DMAT with TRADES, averaged and perturbed weights, twice the radius,"))
        ),
        *(
            Claim(f"DMAT with {terms} is {better} than {name} {where}", with_more, method, column)
            for with_more, terms in (("dmat_recolor", "ReColorAdv as a third term"),
                                     ("dmat_fog_recolor", "fog and ReColorAdv as further terms"),
                                     ("dmat_fog_recolor_stadv", "fog, ReColorAdv and StAdv as further terms"))
            for method, name in (("dmat", "DMAT"), ("at", "AT"))
            for column, better, where in (("worst", "more robust", "in its worst case over all attacks"),
                                          ("clean", "more accurate", "on clean images"))
        ),
        Claim("DMAT with ReColorAdv is about as robust to L∞ as AT", "dmat_recolor", "at", image, comparable=True),
        Claim("DMAT with fog and ReColorAdv is about as robust to L∞ as AT", "dmat_fog_recolor", "at", image, comparable=True),
        Claim("DMAT with all three is about as robust to L∞ as AT", "dmat_fog_recolor_stadv", "at", image, comparable=True),
        *(
            Claim(f"DMAT with fog and ReColorAdv is more robust to {c} than DMAT", "dmat_fog_recolor", "dmat", c)
            for c in (image, *(c for c in UNSEEN if c != "fog"))
        ),
        Claim("DMAT with twice the radius is more robust than DMAT in its worst case", "dmat_eps_20", "dmat", "worst"),
        *(
            Claim(f"With twice the radius in both, DMAT is better than AT {where}", "dmat_eps_20", "at_eps_20", column)
            for column, where in (("clean", "on clean images"), ("unseen mean", "under unseen attacks"),
                                  (latent, "on the manifold"), ("worst", "in its worst case"))
        ),
    ]  # fmt: skip
    return [claim for claim in found if claim.column in columns]


@dataclass(frozen=True)
class Estimate:
    """A mean with the half of its 95 % interval, in points, how many models are behind it, and the t that the interval is of."""

    value: float
    half: float
    models: int
    error: float = 0.0
    freedom: float = math.inf

    def chance(self, of: float) -> float:
        """Two-sided p-value of the mean being `of`; 1 where all values were the same, which no t is of."""
        return float(2 * stats.t.sf(abs(self.value - of) / self.error, self.freedom)) if self.error else 1.0

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half:.1f}"


def estimate(models: Sequence[np.ndarray]) -> Estimate:
    """Of values in [-1, 1], a row a model of (N) examples, which are the same for all models.

    The half is that of Student's interval, or of Wilson's where one model is right (1) or wrong (0).
    """
    values = 100 * np.stack(models)
    count, examples = values.shape
    of_images = values.mean(axis=0).std(ddof=1) ** 2 / examples
    of_seeds = values.mean(axis=1).std(ddof=1) ** 2 / count if count > 1 else 0.0
    variance = of_images + of_seeds
    if variance == 0:  # all the same: what may still be is 3 of N, by the rule of three
        return Estimate(float(values.mean()), 300.0 / examples, count)
    # few seeds: Student's t with the degrees of freedom of a sum of two variances (Welch, Satterthwaite)
    freedom = variance**2 / (of_images**2 / (examples - 1) + of_seeds**2 / max(count - 1, 1))
    error = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, freedom)) * error
    if count == 1 and np.isin(values, (0.0, 100.0)).all():  # a proportion, of which Student's t covers too little near the ends
        share = wilson(int((values > 0).sum()), examples)
        half = 50 * (share.high - share.low)
    return Estimate(float(values.mean()), half, count, error, freedom)


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of claims that are made together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(chances, kind="stable")
    together = np.empty(len(chances))
    together[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(chances)[order] * np.arange(len(chances), 0, -1)))
    return [float(p) for p in together]


def verdict(found: Estimate, bound: float) -> str:
    """Confirmed or not where the whole interval says so, else open."""
    if found.value - found.half > bound:
        return "confirmed"
    return "not confirmed" if found.value + found.half < bound else "open"
