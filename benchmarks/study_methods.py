"""What a study trains: presets of the package, or entries of studies/methods.yaml or of a study's own such file.

And how it looks at the worst case of all of its test images.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dmat_ray.config import EvaluationConfig
from dmat_ray.evaluation.units import VERSION, group_of

METHODS = (
    "standard",
    "at",
    "om_at_fgsm",
    "om_at",
    "dmat",
    "trades",
    "dmat_trades",
    "joint",
    "joint_plus",
    "dmat_trades_plus",
    "dmat_trades_wide",
)
"""What every study trains, in the order of the main tables."""

TABLE = (*METHODS, "at_eps_20", "dmat_eps_20", "dmat_recolor", "dmat_fog_recolor", "dmat_fog_recolor_stadv")
"""The main tables' rows: those of METHODS, twice the radius of digits, and what a study's own file of methods adds."""

ABLATIONS = {
    "Share of the on-manifold term, from none to all": ("at", "dmat_latent_25", "dmat", "dmat_latent_75", "om_at"),
    "Latent budget η in training (half, as it is, twice)": ("dmat_eta_03", "dmat", "dmat_eta_12"),
    "Budget ε in training (half, as it is, twice)": ("dmat_eps_05", "dmat", "dmat_eps_20", "at", "at_eps_20"),
    "Steps of the attacks in training (1, 3, 10)": ("dmat_steps_1", "dmat", "dmat_steps_10"),
    "The manifold: of a generator stopped early, and as it is": ("dmat_early", "dmat"),
    "Data: projected images, and as many samples of the generator beside them": ("dmat", "dmat_sampled"),
    "An average of weights and adversarial weight perturbation": (
        "dmat",
        "dmat_plus",
        "dmat_trades",
        "dmat_trades_plus",
        "joint",
        "joint_plus",
    ),
}
"""Title -> the methods that a table sets side by side."""

KEPT_VERSIONS = frozenset({7, VERSION})
"""Versions whose rows are kept. Version 8 differs from 7 for networks that are surer than both studies' (docs/evaluation.md)."""

KINDS = ("rows", "clean", "worst", "autoattack")
"""Folders of rows in a study's."""

OF_VERSION, OF_MODEL, OF_SET = "rows_version", "model_sha256", "set_sha256"
"""Where a file of rows says of which version they are, and of which model and set; those of before say neither of the last."""


def told_by(rows: Path) -> dict[str, str]:
    """What a file of rows says of them; nothing if it is not there."""
    found = pq.read_schema(rows).metadata if rows.is_file() else None
    return {key.decode(): value.decode() for key, value in (found or {}).items()}


def versions_of(rows: Path) -> frozenset[int]:
    """Those of a file of rows, several of one that is packed; none if it does not say, or is not there."""
    return frozenset(int(version) for version in told_by(rows).get(OF_VERSION, "").split(",") if version)


def are_kept(rows: Path) -> bool:
    """Whether all that a file of rows holds are of versions that are kept."""
    return bool(versions_of(rows)) and versions_of(rows) <= KEPT_VERSIONS


WORST = "worst"
"""The summary over all attacks, and the group that `worst_case` makes of them."""
HARDEST = ("recolor", "stadv", "joint", "fog", "elastic")


def worst_case(evaluation: EvaluationConfig) -> list[dict[str, Any]]:
    """The attacks of the summary `worst` as one group: each meets what the ones before have left.

    Those come first that leave the fewest, so that all test images take no longer than a few of them under every attack.
    """
    (summary,) = (summary for summary in evaluation.summaries if summary.name == WORST)
    rows = [row for row in evaluation.attacks if row.name in summary.of or group_of(row) in summary.of]
    rows.sort(key=lambda row: HARDEST.index(row.name) if row.name in HARDEST else len(HARDEST))
    clean = {"threat": "clean", "name": "clean"}
    return [clean, *({**row.model_dump(mode="json"), "group": WORST, "curve": []} for row in rows)]
