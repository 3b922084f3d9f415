"""Charts as inline SVG: no scripts, colours from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, isfinite, log10

COLOURS = 8  # the style sheet has --c0 … --c7


@dataclass
class Mark:
    x: float
    y: float
    text: str  # what hovering shows
    strong: bool = True  # filled; hollow otherwise


@dataclass
class Series:
    label: str
    number: int  # which colour and shape
    marks: list[Mark] = field(default_factory=list)
    joined: bool = True


@dataclass
class Axis:
    """From values to positions. `logarithmic` where the values' range asks for it."""

    label: str
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    show: Callable[[float], str] = field(default=lambda v: f"{v:g}")

    def at(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.logarithmic:
            low, high, v = log10(low), log10(high), log10(max(v, 1e-300))
        return self.start + (v - low) / (high - low or 1) * (self.end - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        if self.logarithmic:
            return ticks_log(self.low, self.high, n)
        step = nice((self.high - self.low) / n)
        found = [step * k for k in range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)]
        return [0.0 if abs(v) < step * 1e-9 else v for v in found]


def ticks_log(low: float, high: float, n: int) -> list[float]:
    """Round values at about even distances on a logarithmic axis."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,)):
        found = [m * 10**e for e in decades for m in steps if low <= m * 10**e <= high]
        if len(found) <= n + 2:
            return found
    return found[:: ceil(len(found) / n)]


def nice(step: float) -> float:
    """The next step of 1, 2, 2.5, 5 · 10ⁿ."""
    if step <= 0 or not isfinite(step):
        return 1.0
    scale = 10 ** floor(log10(step))
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= step * (1 - 1e-9))


def shape(x: float, y: float, number: int, size: float = 4.2) -> str:
    """A marker; the shape goes with the colour, for eyes that do not tell the colours apart."""
    s = size
    kind = number % 4
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}"'
    points = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        3: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
    }[kind]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in points)}"'


def chart(
    series: Sequence[Series],
    x: tuple[str, Callable[[float], str]],
    y: tuple[str, Callable[[float], str]],
    *,
    level: tuple[float, str] | None = None,
    diagonal: bool = False,
    log_x: bool | None = None,
    log_y: bool | None = None,
    top: float | None = None,
) -> str:
    """Points, joined by lines. `level`: a named horizontal line. `top`: values above it are drawn at the upper edge.

    Logarithmic where not told otherwise and the values span more than a factor of four.
    """
    width, height, left, right, upper, lower = 460, 330, 64, 16, 14, 46
    xs = [m.x for s in series for m in s.marks if isfinite(m.x)]
    ys = [m.y for s in series for m in s.marks if isfinite(m.y) and (top is None or m.y <= top)]
    ys += [level[0]] if level else []
    if not xs or not ys:
        return '<p class="none">nothing measured</p>'
    if diagonal:
        xs = ys = [*xs, *ys]
    axes = []
    for values, label, show, logarithmic, start, end in (
        (xs, *x, log_x, left, width - right),
        (ys, *y, log_y, height - lower, upper),
    ):
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low > 4 if logarithmic is None else logarithmic and low > 0
        if logarithmic:
            pad = max(high / low, 1.05) ** 0.07
            low, high = low / pad, high * pad
        else:
            pad = 0.07 * (high - low or abs(high) or 1)
            low, high = (low - pad if low < 0 or low > 3 * pad else 0), high + pad
        axes.append(Axis(label, low, high, start, end, logarithmic, show))
    ax, ay = axes
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y[0])} against {escape(x[0])}">']
    for v in ay.ticks():
        at = ay.at(v)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{escape(ay.show(v))}</text>')
    for v in ax.ticks():
        at = ax.at(v)
        out.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{height - lower}" y2="{height - lower + 4}"/>')
        out.append(
            f'<text class="tick" x="{at:.1f}" y="{height - lower + 17}" text-anchor="middle">{escape(ax.show(v))}</text>'
        )
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - lower}" y2="{height - lower}"/>')
    out.append(
        f'<text class="name" x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x[0])}</text>'
    )
    middle = (upper + height - lower) / 2
    out.append(
        f'<text class="name" transform="rotate(-90 13 {middle})" x="13" y="{middle}" text-anchor="middle">{escape(y[0])}</text>'
    )
    if diagonal:
        a, b = max(ax.low, ay.low), min(ax.high, ay.high)
        out.append(
            f'<line class="level" x1="{ax.at(a):.1f}" y1="{ay.at(a):.1f}" x2="{ax.at(b):.1f}" y2="{ay.at(b):.1f}"/>'
        )
    if level:
        at = ay.at(level[0])
        out.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick halo" x="{left + 5}" y="{at - 5:.1f}">{escape(level[1])}</text>')
    for s in reversed(series):  # the first ones lie on top
        colour = f'style="--c:var(--c{s.number % COLOURS})"'
        marks = sorted((m for m in s.marks if isfinite(m.x) and m.y == m.y), key=lambda m: m.x)
        cut = [top is not None and m.y > top for m in marks]
        at_y = [ay.at(ay.high) if c else ay.at(m.y) for m, c in zip(marks, cut, strict=True)]
        out.append(f"<g {colour}>")
        places = [f"{ax.at(m.x):.1f},{v:.1f}" for m, v in zip(marks, at_y, strict=True)]
        dash = ' stroke-dasharray="6 4"' if s.number >= COLOURS else ""
        for n in range(1, len(marks) if s.joined else 0):
            if not (cut[n - 1] and cut[n]):  # both lie above the picture
                out.append(f'<polyline class="line"{dash} points="{places[n - 1]} {places[n]}"/>')
        for m, v, off in zip(marks, at_y, cut, strict=True):
            if off:
                mark = f'<text class="off" x="{ax.at(m.x):.1f}" y="{v + 10:.1f}" text-anchor="middle">↑'
                out.append(f"{mark}<title>{escape(m.text)}</title></text>")
                continue
            kind = "mark" if m.strong else "mark hollow"
            out.append(
                f'{shape(ax.at(m.x), v, s.number)} class="{kind}"><title>{escape(m.text)}</title></{tag(s.number)}>'
            )
        out.append("</g>")
    return "".join([*out, "</svg>"])


def tag(number: int) -> str:
    return "circle" if number % 4 == 0 else "polygon"


def heat_map(rows: Sequence[str], cells: Sequence[Sequence[tuple[float, str] | None]]) -> str:
    """Rows × blocks; a cell is (share that stays, what hovering shows), the darker the more is gone. None: no such cell."""
    n = max(map(len, cells), default=0)
    left, lower, high = 40, 20, 21
    wide = min(46.0, (460 - left) / max(n, 1))
    width, height = left + wide * n, high * len(rows) + lower
    out = [
        f'<svg viewBox="0 0 {width:.0f} {height}" style="max-width:{1.2 * width:.0f}px" role="img" aria-label="kept weights">'
    ]
    for r, (name, row) in enumerate(zip(rows, cells, strict=True)):
        y = r * high
        out.append(f'<text class="tick" x="{left - 6}" y="{y + 14.5}" text-anchor="end">{escape(name)}</text>')
        for i, cell in enumerate(row):
            if cell is None:
                continue
            share, text = cell
            gone = min(max(1 - share, 0.0), 1.0)
            x = left + i * wide
            out.append(
                f'<g><rect class="cell" x="{x:.1f}" y="{y}" width="{max(wide - 1.5, 0.8):.1f}" height="{high - 1.5}"/>'
                f'<rect class="gone" x="{x:.1f}" y="{y}" width="{max(wide - 1.5, 0.8):.1f}" height="{high - 1.5}" '
                f'fill-opacity="{gone**0.8:.3f}"/>'
            )
            if wide >= 22:
                kind = "dark" if gone > 0.55 else "pale"
                out.append(
                    f'<text class="share {kind}" x="{x + wide / 2 - 0.7:.1f}" y="{y + 13.5}" '
                    f'text-anchor="middle">{100 * share:.0f}</text>'
                )
            out.append(f"<title>{escape(text)}</title></g>")
    every = max(1, ceil(18 / wide))
    for i in range(0, n, every):
        x = left + (i + 0.5) * wide
        out.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{i}</text>')
    return "".join([*out, "</svg>"])
