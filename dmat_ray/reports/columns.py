"""The columns of an evaluation's tables, in words."""

from typing import Any

from dmat_ray.config import THREATS, AttackRow, AutoAttackRow, CleanRow, CorruptionRow
from dmat_ray.config.threats import named
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import applies

SET_NAMES = {"on_manifold": "on-manifold test images g(w)", "natural": "natural test images x"}
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


def in_levels(eps: float) -> str:
    """A distance of pixels in [0, 1] as people write it: in 255ths, where they are whole."""
    levels = eps * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{eps:.4g}"


def budget(row: AttackRow) -> str:
    """eps as people write it."""
    eps: float = row.eps  # type: ignore[union-attr]  # of rows that have one
    # a sum over pixels is no level of any
    of_pixels = row.eps_in_pixels and getattr(row, "norm", "linf") != "l1"  # type: ignore[union-attr]
    return f"eps {in_levels(eps) if of_pixels else f'{eps:.4g}'}"


def over(row: AttackRow) -> str:
    """What changes along the curve of a row, and what beside it does not."""
    of_w = getattr(row, "latent_eps", None)
    if of_w is None:
        return "eps"
    return f"eps of pixels (latent_eps stays {of_w:.4g}{' std' if getattr(row, 'scale', '') == 'std' else ''})"


def described(row: AttackRow) -> str:
    """A row in words."""
    if isinstance(row, CleanRow):
        return "no attack"
    if isinstance(row, CorruptionRow):
        return f"{row.kind.replace('_', ' ')} of severity {row.severity}, no attack"
    if isinstance(row, AutoAttackRow):
        return f"AutoAttack's {row.part}, {NORMS[row.norm]}, {budget(row)}"
    norm, unit = getattr(row, "norm", ""), " standard deviations" if getattr(row, "scale", "") == "std" else ""
    of_w = getattr(row, "latent_eps", None)
    words = [f"{row.threat}{f' {NORMS[norm]}' if norm else ''}", f"{budget(row)}{unit if of_w is None else ''}"]
    words += [] if of_w is None else [f"eps {of_w:.4g}{unit} in w"]
    words += [f"{name} {_shown(value)}" for name, value in _of_threat(row).items()]
    words.append(f"{row.steps} step{'s' if row.steps > 1 else ''} of {row.method}")
    words += [f"each of {row.step_size:.4g}"] if row.step_size is not None and row.method in ("pgd", "momentum") else []
    if row.method not in ("random", "square"):  # which draw every query
        words.append("from a random start" if row.random_start else "without a random start")
    words += [f"{row.restarts} restarts"] if row.restarts > 1 else []
    words += [f"loss {row.loss}"] if row.loss != "ce" else []
    words += [f"towards {row.targets} classes"] if row.targets else []
    return ", ".join(words)


def _of_threat(row: AttackRow) -> dict[str, Any]:
    """What a row says of its threat beside norm and budget, where it is not the default."""
    (fields,) = (threat.model_fields for threat in THREATS if named(threat) == row.threat)
    told = {name: getattr(row, name) for name in fields if name not in ("threat", "norm", "eps", "latent_eps", "scale")}
    return {name: value for name, value in told.items() if value != fields[name].default}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def columns_described(results: Results) -> dict[str, str]:
    """What each column of the tables is."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(c for set_name in results.config.sets for c in results.columns(set_name)):
        if name in results.groups:
            parts = "; ".join(f"{part} ({described(results.suite[part])})" for part in results.groups[name])
            found[name] = f"right on the clean image and under every one of: {parts}"
            for set_name in results.config.sets:
                absent = [part for part in results.groups[name] if not applies(results.suite[part], set_name)]
                if absent and name in results.columns(set_name):
                    found[name] += f" (on {SET_NAMES[set_name]} without {', '.join(absent)})"
        elif name in results.suite:
            found[name] = described(results.suite[name])
    how = {
        "worst": "right on the clean image and under every one of",
        "mean": "mean of",
        "uar": "sum, over that of models trained against each, of",
    }
    for summary in results.config.summaries:
        found[summary.name] = f"{how[summary.how]}: {', '.join(summary.of)}"
        for set_name in results.config.sets:
            absent = [name for name in summary.of if name not in results.columns(set_name)]
            if absent and summary.name in results.columns(set_name):
                found[summary.name] += f" (on {SET_NAMES[set_name]} without {', '.join(absent)})"
    return found
