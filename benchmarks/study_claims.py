"""What a study's differences say to the paper's claims: the claims, verdicts, p-values of claims that are made together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmat_ray.evaluation.intervals import Estimate

NEAR = 0.02  # of accuracies that count as comparable
UNSEEN = ("L2", "fog", "snow", "elastic", "gabor", "jpeg L1", "L1", "stadv")


@dataclass(frozen=True)
class Claim:
    """`better` has a larger accuracy than `than` in a column; with `comparable` one not smaller by more than NEAR."""

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


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of claims that are made together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(chances, kind="stable")
    together = np.empty(len(chances))
    together[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(chances)[order] * np.arange(len(chances), 0, -1)))
    return [float(p) for p in together]


def verdict(found: Estimate, bound: float) -> str:
    """Confirmed or not where the whole interval says so, else open."""
    if found.low > bound:
        return "confirmed"
    return "not confirmed" if found.high < bound else "open"
