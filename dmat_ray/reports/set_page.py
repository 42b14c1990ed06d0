"""What an inspection shows: one self-contained HTML page with checks, errors by class, histograms, and pairs to look at."""

from collections import Counter
from typing import Any

import numpy as np
import yaml

from dmat_ray.data.inspection import CHECKS, Chosen, Inspection, Manifest, Pair, Rows
from dmat_ray.reports import figures
from dmat_ray.storage import Location

AMPLIFIED = 5  # differences are shown this many times as large
MOST_PIXELS = 128  # of an image on the page
MOST_REJECTED = 100
BEST_PSNR = 100.0  # dB; of two equal images it would be infinite
UNKNOWN = "class unknown"


def psnr(l2: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of a mean squared error in [0, 1] units, at most BEST_PSNR."""
    return np.asarray(-10 * np.log10(np.maximum(l2.astype(np.float64), 10 ** (-BEST_PSNR / 10))))


def write(inspection: Inspection, path: Location) -> None:
    """Write the page of an inspection."""
    checks = [
        {"name": c.name, "about": CHECKS[c.name], "state": c.state, "detail": c.detail, "defects": c.defects, "more": c.more}
        for c in inspection.checks
    ]
    values: dict[str, Any] = {"place": inspection.place, "checks": checks, "sound": inspection.sound, "manifest": None}
    values["warnings"] = [warning.removeprefix("warning: ") for warning in inspection.warnings]
    manifest, rows = inspection.manifest, inspection.rows
    if manifest is not None and rows is not None and inspection.chosen is not None:
        fine = rows.valid(len(manifest.class_names))
        values |= {
            "manifest": manifest,
            "count": len(rows),
            "poor": int((~rows.ok).sum()),
            "measures": _statistics(rows, np.flatnonzero(fine)),
            "classes": _class_table(rows, manifest, fine),
            "histograms": _histograms(rows, manifest, fine),
            "amplified": AMPLIFIED,
            "best_psnr": BEST_PSNR,
            "pairs": _pairs_by_class(inspection.chosen, manifest, rows, inspection.pairs),
            "worst": [_pair(i, rows, inspection.pairs, manifest, "") for i in inspection.chosen.worst if i in inspection.pairs],
            "ranked_by": inspection.chosen.ranked_by,
            "rejected": sorted(manifest.rejected.items())[:MOST_REJECTED],
            "settings": yaml.safe_dump(
                {"data": manifest.data, "projection": manifest.projection.model_dump()}, sort_keys=False, allow_unicode=True
            ),
        }
    figures.write_page(path, "inspection.html", **values)


def _columns(rows: Rows, index: np.ndarray) -> list[tuple[str, str, np.ndarray, int]]:
    """(title, format, values, the percentile that only the worst exceed)."""
    return [
        ("LPIPS", "{:.4f}", rows.lpips[index], 95),
        ("L1", "{:.4f}", rows.l1[index], 95),
        ("PSNR", "{:.1f}", psnr(rows.l2[index]), 5),
    ]


def _statistics(rows: Rows, index: np.ndarray) -> list[str]:
    """Mean, median and bad tail of each error of these rows."""
    cells = []
    for _, form, values, tail in _columns(rows, index):
        found = (values.mean(dtype=np.float64), *np.percentile(values, [50, tail])) if len(values) else ()
        cells += [form.format(value) for value in found] or ["–"] * 3
    return cells


def _class_table(rows: Rows, manifest: Manifest, fine: np.ndarray) -> list[dict[str, Any]]:
    """A row for each class, and one for rejected images of which it is not known."""
    names = manifest.class_names
    # a rejected image has no row; in the ids of folders the class is the first part, or the second, after 'train'
    lost = Counter(next((part for part in id.split("/")[:-1] if part in names), UNKNOWN) for id in manifest.rejected)
    index = np.flatnonzero(fine)
    index = index[np.argsort(rows.label[index], kind="stable")]
    edges = np.searchsorted(rows.label[index], np.arange(len(names) + 1))
    table = []
    for label, name in enumerate(names):
        members = index[edges[label] : edges[label + 1]]
        poor = int((~rows.ok[members]).sum())
        table.append({"name": name, "numbers": [len(members), poor, lost[name]], "cells": _statistics(rows, members)})
    if lost[UNKNOWN]:
        table.append({"name": f"({UNKNOWN})", "numbers": [0, 0, lost[UNKNOWN]], "cells": ["–"] * 9})
    return table


def _histograms(rows: Rows, manifest: Manifest, fine: np.ndarray) -> list[dict[str, str]]:
    """Usable and poor images apart, with the threshold where there is one."""
    limits = manifest.projection
    wanted = [
        ("LPIPS", rows.lpips, limits.poor_lpips),
        ("L1: mean |g(w) − x|", rows.l1, limits.poor_l1),
        ("PSNR in dB", psnr(np.where(fine, rows.l2, 1.0)), None),
        ("steps", rows.steps, None),
    ]
    drawn = []
    for title, values, limit in wanted if fine.any() else ():
        usable, poor = values[fine & rows.ok], values[fine & ~rows.ok]
        with figures.axes(4.2, 2.6, title, "images by " + title.split(":")[0]) as (axes, svg):
            edges = np.histogram_bin_edges(values[fine].astype(np.float64), bins=40)
            axes.hist([usable, poor], bins=edges, stacked=True, label=["usable", "poor"], color=figures.INK[:2])
            if limit is not None and limit <= edges[-1]:
                axes.axvline(limit, color=figures.INK[3], linestyle="--", linewidth=1.2, label="threshold")
            if len(poor):
                axes.legend(fontsize=8, frameon=False)
        drawn.append({"title": title, "svg": svg[0]})
    return drawn


def _pairs_by_class(chosen: Chosen, manifest: Manifest, rows: Rows, pairs: dict[int, Pair]) -> list[dict[str, Any]]:
    blocks = []
    for label, picked in chosen.classes.items():
        shown = [_pair(i, rows, pairs, manifest, what) for what, i in picked.items() if i in pairs]
        blocks.append({"name": manifest.class_names[label], "pairs": shown})
    return blocks


def _pair(i: int, rows: Rows, pairs: dict[int, Pair], manifest: Manifest, what: str) -> dict[str, Any]:
    pair = pairs[i]
    gap = np.abs(pair.natural.astype(np.int16) - pair.on_manifold)
    images = [
        ("natural x", pair.natural),
        ("g(w)", pair.on_manifold),
        (f"{AMPLIFIED} · |g(w) − x|", np.minimum(AMPLIFIED * gap, 255).astype(np.uint8)),
    ]
    return {
        "what": what,
        "id": pair.id,
        "label": manifest.class_names[int(rows.label[i])],
        "poor": not rows.ok[i],
        "images": [{"title": title, "src": figures.png(pixels, MOST_PIXELS)} for title, pixels in images],
        "errors": f"LPIPS {rows.lpips[i]:.4f} · L1 {rows.l1[i]:.4f} · PSNR {psnr(rows.l2[i]):.1f} dB · {rows.steps[i]} steps",
    }
