"""How much of the loss to spend in image space: alpha * AT + (1 - alpha) * OM-AT. DMAT's own alpha is 0.5."""

from typing import Any

from ray import tune

PRESET = "dmat"
"""Layered over the job's presets before the samples."""


def space() -> dict[str, Any]:
    """What Ray Tune draws from."""
    return {"alpha": tune.grid_search([0.2, 0.4, 0.6, 0.8])}


def settings(sample: dict[str, Any]) -> dict[str, Any]:
    """Config values, by dotted name, of one draw."""
    return {"objective.image.weight": sample["alpha"], "objective.latent.weight": 1.0 - sample["alpha"]}
