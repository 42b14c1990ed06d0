"""Drawings of a search, in the style of `charts`: trials across their knobs, trade-offs, and how much each knob mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dmat_ray.reports.charts import Axis, Plot, Series, ticks

WIDE, HIGH = 860, 300
TOP, BOTTOM, SIDE = 34, 30, 60


@dataclass(frozen=True)
class Scale:
    """One axis of parallel coordinates: a number's, or one of choices, which then stand evenly apart."""

    label: str
    values: Sequence[Any]

    @property
    def choices(self) -> list[str]:
        """Empty for numbers."""
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.values):
            return []
        return list(dict.fromkeys(map(str, self.values)))

    def ends(self) -> tuple[float, float]:
        """The least and the largest, never the same."""
        if self.choices:
            return 0.0, max(len(self.choices) - 1, 1)
        low, high = min(self.values), max(self.values)
        pad = 0.0 if high > low else max(abs(high), 1.0) * 0.05
        return low - pad, high + pad

    def share(self, value: Any) -> float:
        """Where a value stands, from 0 at the foot to 1."""
        low, high = self.ends()
        number = self.choices.index(str(value)) if self.choices else value
        return float((number - low) / (high - low))

    def marks(self) -> list[tuple[float, str]]:
        """Labels of the axis, each with its place in [0, 1]."""
        if self.choices:
            return [(self.share(choice), choice) for choice in self.choices]
        low, high = self.ends()
        return [(self.share(value), f"{value:g}") for value in ticks(low, high, 4)]


def parallel(title: str, scales: Sequence[Scale], strengths: Sequence[float], names: Sequence[str], best: int) -> str:
    """A line for each trial across all scales; the stronger (in [0, 1]) the clearer, and `best` stands out."""
    across = [SIDE + k * (WIDE - 2 * SIDE) / max(len(scales) - 1, 1) for k in range(len(scales))]
    room = HIGH - TOP - BOTTOM
    parts, drawn = [], []
    for number, (x, scale) in enumerate(zip(across, scales, strict=True)):
        parts.append(f'<path class="axis" d="M{x:.1f} {TOP}V{HIGH - BOTTOM}"/>')
        # two heights, so that long names of neighbours do not meet
        y = TOP - 20 + 12 * (number % 2)
        anchor = "start" if number == 0 else "end" if number == len(scales) - 1 else "middle"
        place = x - SIDE + 4 if number == 0 else x + SIDE - 4 if number == len(scales) - 1 else x
        parts.append(f'<text class="label" x="{place:.1f}" y="{y}" text-anchor="{anchor}">{escape(scale.label[:34])}</text>')
        for share, text in scale.marks():
            parts.append(f'<text x="{x + 4:.1f}" y="{HIGH - BOTTOM - share * room + 4:.1f}">{escape(text[:16])}</text>')
    order = sorted(range(len(names)), key=lambda k: (k == best, strengths[k]))
    for k in order:
        places = [f"{x:.1f} {HIGH - BOTTOM - s.share(s.values[k]) * room:.1f}" for x, s in zip(across, scales, strict=True)]
        look = 'class="line s1"' if k == best else f'class="line s0" style="opacity:{0.12 + 0.6 * strengths[k] ** 2:.2f}"'
        drawn.append(f'<path {look} d="M{"L".join(places)}"><title>{escape(names[k])}</title></path>')
    head = f'<svg class="chart" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, *drawn, *parts, "</svg>"])


def trade_off(title: str, x: Axis, y: Axis, points: Sequence[tuple[str, float, float]], front: Sequence[str], best: str) -> str:
    """A point for each trial; those of the front are joined, and the best stands out. Values that are not finite are left out."""
    points = [p for p in points if math.isfinite(p[1]) and math.isfinite(p[2])]
    plot = Plot(x, y, [Series("", 0, [p[1] for p in points], [p[2] for p in points])])
    at = {name: plot.at(px, py) for name, px, py in points}
    joined = sorted((at[name] for name in front if name in at), key=lambda place: place[0])
    drawn = [f'<path class="front" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in joined)}"/>'] if len(joined) > 1 else []
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in at.values()]
    for name, px, py in sorted(points, key=lambda p: p[0] == best):
        a, b = at[name]
        look = "s1" if name == best else "s0"
        faint = "" if name in front or name == best else ' style="opacity:.4"'
        size = 5 if name == best else 4
        said = f"{name}: {px:.1f} and {py:.1f}"
        drawn.append(
            f'<g class="{look}"{faint}><circle class="mark" cx="{a:.1f}" cy="{b:.1f}" r="{size}">'
            f"<title>{escape(said)}</title></circle></g>"
        )
        if name in front or name == best:
            label = name.rsplit("_", 1)[-1]
            if box := plot.free(len(label) * 6.6, a, b, taken):
                taken.append(box)
                drawn.append(f'<text class="label" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(label)}</text>')
    return plot.svg(title, drawn)


def bars(title: str, shares: Sequence[tuple[str, float]]) -> str:
    """A bar for each name, as long as its share of 1."""
    row, name_room, width = 26, 180, 420
    high = row * len(shares) + 8
    parts = [f'<svg class="chart" viewBox="0 0 {width} {high}" role="img" aria-label="{escape(title)}">']
    for number, (name, share) in enumerate(shares):
        y, long = 4 + number * row, share * (width - name_room - 50)
        parts.append(f'<text class="label" x="{name_room - 8}" y="{y + 15}" text-anchor="end">{escape(name[:28])}</text>')
        parts.append(f'<rect class="bar" x="{name_room}" y="{y + 3}" width="{max(long, 1):.1f}" height="{row - 8}" rx="2"/>')
        parts.append(f'<text x="{name_room + long + 6:.1f}" y="{y + 15}">{100 * share:.0f} %</text>')
    return "\n".join([*parts, "</svg>"])
