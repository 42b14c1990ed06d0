"""Charts as SVG text that takes its colours from the page, so that they suit a light and a dark one: lines and points.

Models differ by colour, mark and dash. Values under a pointer are the marks' titles; nothing else moves.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 42
COLOURS = 6  # .s0 to .s5 of style.css
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 2")
MARKS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "M-3.3-3.3h6.6v6.6h-6.6z",
    "M0-4.4l4.2 7.3h-8.4z",
    "M0-4.8l4.8 4.8-4.8 4.8-4.8-4.8z",
    "M0 4.4l-4.2-7.3h8.4z",
    "M-4-1.3h2.7v-2.7h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7z",
)
LONGEST = 38  # letters of an axis's label
CHARACTER, LINE = 6.6, 14.0  # size of a letter of a label

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Series:
    """What is drawn for one model: `look` is its number on the page; low and high are those of each y, or missing."""

    name: str
    look: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis shows; without a range it is that of the values, and never beyond `within`."""

    label: str
    range: tuple[float, float] | None = None
    within: tuple[float, float] = (-math.inf, math.inf)
    whole: bool = False  # of counts: no ticks between whole numbers


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, 1, 2, 2.5 or 5 times a power of ten apart, about `most` of them."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if (high - low) / (unit * f) <= most)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def swatch(look: int) -> str:
    """A model's line and mark, for a legend."""
    line = f'<path class="line" d="M0 7H30" stroke-dasharray="{DASHES[look % len(DASHES)]}"/>'
    return f'<svg class="swatch s{look % COLOURS}" width="30" height="14" aria-hidden="true">{line}{_mark(look, 15, 7)}</svg>'


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], right: str = "") -> str:
    """Lines, and bands from low to high. `right` labels a second scale, of per cents that are missing to 100."""
    series = [_finite(s) for s in series]
    plot = Plot(x, y, series, right)
    drawn = []
    for s in series:
        at = [plot.at(*point) for point in zip(s.x, s.y, strict=True)]
        if s.low and len(at) > 1:
            edge = [plot.at(*p) for p in [*zip(s.x, s.high, strict=True), *reversed([*zip(s.x, s.low, strict=True)])]]
            drawn.append(f'<path class="band s{s.look % COLOURS}" d="M{_path(edge)}z"/>')
        if len(at) > 1:
            dash = DASHES[s.look % len(DASHES)]
            drawn.append(f'<path class="line s{s.look % COLOURS}" d="M{_path(at)}" stroke-dasharray="{dash}"/>')
        every = math.ceil(len(at) / 9)
        for k, (px, py) in enumerate(at):
            # those of several models stand at different places of long lines
            if k % every == s.look % every or len(at) == 1:
                drawn.append(f'<g class="s{s.look % COLOURS}">{_mark(s.look, px, py, _said(s, k))}</g>')
    return plot.svg(title, drawn)


def points(title: str, x: Axis, y: Axis, series: Sequence[Series], spans: Sequence[tuple[float, float]]) -> str:
    """A named point a series, with its interval (low, high) of y and, from `spans`, of x; and the front that none beats."""
    every = [Series(s.name, s.look, span, (s.low[0], s.high[0])) for s, span in zip(series, spans, strict=True)]
    plot = Plot(x, y, [*series, *every])
    places = [plot.at(s.x[0], s.y[0]) for s in series]
    front = sorted((s.x[0], s.y[0]) for s in series if not any(_beats(other, s) for other in series))
    drawn = [f'<path class="front" d="M{_path([plot.at(*p) for p in front])}"/>'] if len(front) > 1 else []
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    texts = []
    for s, span, (px, py) in zip(series, spans, places, strict=True):
        (left, low), (right, high) = plot.at(span[0], s.low[0]), plot.at(span[1], s.high[0])
        cross = f"M{_path([(left, py), (right, py)])}M{_path([(px, low), (px, high)])}"
        drawn.append(f'<path class="span s{s.look % COLOURS}" d="{cross}"/>')
        drawn.append(f'<g class="s{s.look % COLOURS}">{_mark(s.look, px, py, f"{s.name}: {s.x[0]:.1f} and {s.y[0]:.1f}")}</g>')
        name = s.name if len(s.name) <= 24 else f"{s.name[:23]}…"
        if box := plot.free(len(name) * CHARACTER, px, py, taken):
            taken.append(box)
            texts.append(f'<text class="label" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(name)}</text>')
    return plot.svg(title, [*drawn, *texts])


def _beats(a: Series, b: Series) -> bool:
    return a.x[0] >= b.x[0] and a.y[0] >= b.y[0] and (a.x[0], a.y[0]) != (b.x[0], b.y[0])


def _finite(s: Series) -> Series:
    """Without the points of a run that diverged."""
    keep = [k for k, value in enumerate(s.y) if math.isfinite(value)]
    return Series(s.name, s.look, *([values[k] for k in keep] if values else [] for values in (s.x, s.y, s.low, s.high)))


def _said(s: Series, k: int) -> str:
    interval = f" ({s.low[k]:.1f} to {s.high[k]:.1f})" if s.low else ""
    return f"{s.name}: {s.y[k]:.4g}{interval} at {s.x[k]:.4g}"


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _mark(look: int, x: float, y: float, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    shape = MARKS[(look + look // COLOURS) % len(MARKS)]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}">{title}</path>'


class Plot:
    """A frame with two axes, and where in it values stand."""

    def __init__(self, x: Axis, y: Axis, series: Sequence[Series], right: str = "") -> None:
        self.x, self.y, self.right = x, y, right
        self.x_range = x.range or _range([v for s in series for v in s.x], 0.03, x.within)
        self.y_range = y.range or _range([v for s in series for v in (*s.y, *s.low, *s.high)], 0.06, y.within)
        self.end = WIDTH - (LEFT if right else RIGHT)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point stands in the drawing."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        bottom = HEIGHT - BOTTOM
        return LEFT + (x - x0) / (x1 - x0) * (self.end - LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

    def free(self, width: float, x: float, y: float, taken: Sequence[Box]) -> Box | None:
        """A place for a label near a point where it covers nothing, or None."""
        beside, above, below = y - LINE / 2, y - 8 - LINE, y + 8
        lefts = (x + 8, x - 8 - width)
        for left, top in [
            *((left, top) for top in (above, below, beside) for left in lefts),
            (x - width / 2, above),
            (x - width / 2, below),
        ]:
            box = (left, top, left + width, top + LINE)
            inside = left > LEFT and box[2] < self.end and top > TOP and box[3] < HEIGHT - BOTTOM
            if inside and all(box[2] < t[0] or t[2] < left or box[3] < t[1] or t[3] < top for t in taken):
                return box
        return None

    def svg(self, title: str, drawn: Iterable[str]) -> str:
        """The whole drawing."""
        bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
        parts = []
        for value in ticks(*self.y_range):
            y = self.at(self.x_range[0], value)[1]
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.end}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
            if self.right:
                parts.append(f'<text x="{self.end + 6}" y="{y + 4:.1f}">{100 - value:g}</text>')
        for value in (v for v in ticks(*self.x_range) if v.is_integer() or not self.x.whole):
            x = self.at(value, self.y_range[0])[0]
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{self.end}"/>')
        parts.append(f'<text x="{(LEFT + self.end) / 2}" y="{HEIGHT - 7}" text-anchor="middle">{escape(self.x.label)}</text>')
        for label, x, turn in ((self.y.label, 13, -90), (self.right, WIDTH - 8, 90)):
            if label:
                place = f'transform="translate({x} {middle}) rotate({turn})"'
                short = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
                parts.append(f'<text {place} text-anchor="middle">{escape(short)}</text>')
        head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        return "\n".join([head, *parts, *drawn, "</svg>"])


def _range(values: Sequence[float], margin: float, within: tuple[float, float]) -> tuple[float, float]:
    """From the least to the largest, and some more; never nothing."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = (high - low) * margin or max(abs(high) * 0.05, 1e-3)
    return max(low - pad, within[0]), min(high + pad, within[1])
