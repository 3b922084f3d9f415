"""Charts as inline SVG: colours come from the page's style sheet, so that they follow light and dark, and every mark carries
its values as `<title>`. Without a script browsers show those themselves; page.js makes them answer to the keyboard too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, inf, isfinite, log10
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = 8  # the style sheet has --c0 … --c7
NEAR = 12.0  # as wide as two marks: lines that end no further apart end at the same place


class Mark(NamedTuple):
    x: float
    y: float
    text: str  # what hovering shows: its name, then lines of values
    strong: bool = True  # filled; hollow otherwise


@dataclass
class Series:
    label: str
    number: int | None  # which colour and shape; None: thin and grey
    marks: list[Mark] = field(default_factory=list)
    joined: bool = True


class Quantity(NamedTuple):
    """What an axis shows. `log`: where not told, if the values span more than a factor of four. `falling`: from right to left."""

    label: str
    show: Callable[[float], str] = "{:g}".format
    log: bool | None = None
    falling: bool = False


@dataclass
class Axis:
    """From values to positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def fit(cls, values: Sequence[float], quantity: Quantity, start: float, end: float) -> Axis:
        low, high = min(values), max(values)
        log = low > 0 and (high / low > 4 if quantity.log is None else quantity.log)
        if log:
            pad = max(high / low, 1.05) ** 0.07
            low, high = low / pad, high * pad
        else:
            pad = 0.07 * (high - low or abs(high) or 1)
            low, high = (low - pad if low < 0 or low > 3 * pad else 0), high + pad
        return cls(low, high, *((end, start) if quantity.falling else (start, end)), log)

    def at(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = log10(low), log10(high), log10(max(v, 1e-300))
        return self.start + (v - low) / (high - low or 1) * (self.end - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        if self.log:
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


def tag(name: str, kind: str, inside: str = "", **attributes: Any) -> str:
    """An element of class `kind`; x1=3.14 → x1="3.1", text_anchor="end" → text-anchor="end"."""
    words = "".join(
        f' {k.replace("_", "-")}="{f"{v:.1f}" if isinstance(v, float) else v}"' for k, v in attributes.items()
    )
    return f'<{name} class="{kind}"{words}>{inside}</{name}>'


def shape(x: float, y: float, number: int | None, kind: str = "mark", text: str = "") -> str:
    """A marker; the shape goes with the colour, for eyes that do not tell the colours apart."""
    title = f"<title>{escape(text)}</title>" if text else ""
    s = 4.2 if number is not None else 1.8
    n = (number or 0) % 4
    if n == 0:
        return tag("circle", kind, title, cx=float(x), cy=float(y), r=s)
    points = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        3: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
    }[n]
    return tag("polygon", kind, title, points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in points))


def chart(
    series: Sequence[Series],
    x: Quantity,
    y: Quantity,
    *,
    level: tuple[float, str] | None = None,
    diagonal: bool = False,
    top: float | None = None,
    names: bool = False,
) -> str:
    """Points, joined by lines. `level`: a named horizontal line. `top`: values above it are drawn at the upper edge.
    `names`: every line is named at its last point, on a wide picture."""
    width, height, right, upper, lower = (960, 520, 230, 20, 50) if names else (460, 330, 16, 14, 46)
    xs = [m.x for s in series for m in s.marks if isfinite(m.x)]
    ys = [m.y for s in series for m in s.marks if isfinite(m.y) and (top is None or m.y <= top)]
    ys += [level[0]] if level else []
    if not xs or not ys:
        return '<p class="none">nothing measured</p>'
    if diagonal:
        xs = ys = [*xs, *ys]
    ay = Axis.fit(ys, y, height - lower, upper)
    left = max(
        64.0, 28 + 9 * max((len(y.show(v)) for v in ay.ticks()), default=0)
    )  # digits of the largest size in page.css
    ax = Axis.fit(xs, x, left, width - right)
    out = draw_frame(ax, ay, x, y, width - right)
    if diagonal:
        a, b = max(ax.low, ay.low), min(ax.high, ay.high)
        out.append(tag("line", "level", x1=ax.at(a), y1=ay.at(a), x2=ax.at(b), y2=ay.at(b)))
    if level:
        at = ay.at(level[0])
        out.append(tag("line", "level", x1=left, x2=width - right, y1=at, y2=at))
        out.append(tag("text", "tick halo", escape(level[1]), x=left + 5, y=at - 5 if not names else at + 14))
    named = draw_names(series, ax, ay, top, width - right) if names else {}
    for n, s in reversed([*enumerate(series)]):  # the first ones lie on top
        out += [
            f'<g class="series" style="--c:{colour(s.number)}">',
            named.get(n, ""),
            *draw_series(s, ax, ay, top),
            "</g>",
        ]
    label = f"{escape(y.label)} against {escape(x.label)}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(out)}</svg>'


def colour(number: int | None) -> str:
    return "var(--soft)" if number is None else f"var(--c{number % COLOURS})"


def draw_frame(ax: Axis, ay: Axis, x: Quantity, y: Quantity, right: float) -> list[str]:
    """Grid, ticks and the axes' names."""
    left, bottom = min(ax.start, ax.end), ay.start
    out = []
    for v in ay.ticks():
        at = ay.at(v)
        out.append(tag("line", "grid", x1=left, x2=right, y1=at, y2=at))
        out.append(tag("text", "tick", escape(y.show(v)), x=left - 7, y=at + 4, text_anchor="end"))
    free = -inf  # where the last label ends
    for at, text in sorted((ax.at(v), x.show(v)) for v in ax.ticks()):
        out.append(tag("line", "axis", x1=at, x2=at, y1=bottom, y2=bottom + 4))
        half = 4.5 * len(text)
        if at - half > free:
            out.append(tag("text", "tick", escape(text), x=at, y=bottom + 17, text_anchor="middle"))
            free = at + half
    out.append(tag("line", "axis", x1=left, x2=right, y1=bottom, y2=bottom))
    out.append(tag("text", "name", escape(x.label), x=(left + right) / 2, y=bottom + 38, text_anchor="middle"))
    middle = (ay.end + bottom) / 2
    turned = {"transform": f"rotate(-90 13 {middle})", "x": 13, "y": middle, "text_anchor": "middle"}
    return [*out, tag("text", "name", escape(y.label), **turned)]


def draw_series(s: Series, ax: Axis, ay: Axis, top: float | None) -> list[str]:
    """Lines and markers; an arrow stands for what lies above the picture."""
    marks = sorted((m for m in s.marks if isfinite(m.x) and m.y == m.y), key=lambda m: m.x)
    above = [top is not None and m.y > top for m in marks]
    places = [(ax.at(m.x), ay.at(ay.high if a else m.y)) for m, a in zip(marks, above, strict=True)]
    more = {"stroke_dasharray": "6 4"} if (s.number or 0) >= COLOURS else {}
    out = []
    for n in range(1, len(marks) if s.joined else 0):
        if not (above[n - 1] and above[n]):
            ends = " ".join(f"{a:.1f},{b:.1f}" for a, b in places[n - 1 : n + 1])
            out.append(tag("polyline", "line" if s.number is not None else "line thin", points=ends, **more))
    for m, a, (at_x, at_y) in zip(marks, above, places, strict=True):
        if a:
            title = f"↑<title>{escape(m.text)}</title>"
            out.append(tag("text", "off", title, x=at_x, y=at_y + 10, text_anchor="middle"))
        else:
            out.append(shape(at_x, at_y, s.number, "mark" if m.strong else "mark hollow", m.text))
    return out


def draw_names(series: Sequence[Series], ax: Axis, ay: Axis, top: float | None, right: float) -> dict[int, str]:
    """Which series → its label and last value, and where it lies if others go on, moved apart, with a thin line to its end."""
    found = {n: max(s.marks, key=lambda m: ax.at(m.x)) for n, s in enumerate(series) if s.marks}
    ends = [(ax.at(m.x), ay.at(m.y if top is None or m.y <= top else ay.high)) for m in found.values()]
    last = max((x for x, _ in ends), default=0.0)
    out = {}
    for (n, m), (x, y), at in zip(found.items(), ends, spread([y for _, y in ends], 15), strict=True):
        s = series[n]
        kind = "tick" if s.number is None else "tick strong"
        off = " ↑" if top is not None and m.y > top else ""
        off += f" at {m.x:.3g}" if last - x > NEAR else ""
        line = tag("line", "leader", x1=x + 6, y1=y, x2=right + 14, y2=at)
        text = tag("text", kind, f"{escape(s.label)} {m.y:,.1f}{off}", x=right + 18, y=at + 4)
        out[n] = line + text
    return out


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart as little as needed, so that neighbours are at least `gap` away."""
    groups: list[tuple[float, list[int]]] = []  # height of the first, members in order
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        groups.append((heights[i], [i]))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * len(groups[-2][1]):
            members = groups[-2][1] + groups[-1][1]
            first = sum(heights[j] - gap * n for n, j in enumerate(members)) / len(members)
            groups[-2:] = [(max(first, gap), members)]
    found = {i: first + gap * n for first, members in groups for n, i in enumerate(members)}
    return [found[i] for i in range(len(heights))]


def heat_map(rows: Sequence[str], cells: Sequence[Sequence[tuple[float, str] | None]]) -> str:
    """Rows × blocks; a cell is (share that stays, what hovering shows), the redder the more is gone. None: no such cell."""
    n = max(map(len, cells), default=0)
    left, lower, high = max(46, 6 + 10 * max(map(len, rows), default=0)), 20, 21
    wide = min(46.0, (460 - left) / max(n, 1))
    width, height = left + wide * n, high * len(rows) + lower
    out = []
    for r, (name, row) in enumerate(zip(rows, cells, strict=True)):
        y = r * high
        out += ["<g>", tag("text", "tick", escape(name), x=left - 6, y=y + 14.5, text_anchor="end")]
        for i, cell in enumerate(row):
            if cell is None:
                continue
            share, text = cell
            gone, x = min(max(1 - share, 0.0), 1.0), left + i * wide
            box: dict[str, Any] = {"x": x, "y": y, "width": max(wide - 1.5, 0.8), "height": high - 1.5}
            out += ["<g>", tag("rect", "cell", **box), tag("rect", "gone", **box, fill_opacity=f"{gone**0.8:.3f}")]
            if wide >= 22:
                place = {"x": x + wide / 2 - 0.7, "y": y + 13.5, "text_anchor": "middle"}
                out.append(tag("text", "share", f"{100 * share:.0f}", **place))
            out.append(f"<title>{escape(text)}</title></g>")
        out.append("</g>")
    for i in range(0, n, max(1, ceil(24 / wide))):
        out.append(tag("text", "tick", str(i), x=left + (i + 0.5) * wide, y=height - 6, text_anchor="middle"))
    style = f'viewBox="0 0 {width:.0f} {height}" style="max-width:{1.2 * width:.0f}px"'
    kind = "map many" if width > 320 else "map"  # on a narrow screen numbers would be too small
    return f'<svg class="{kind}" {style} role="img" aria-label="kept weights">{"".join(out)}</svg>'


def stand_alone(picture: str) -> str:
    """A chart as a file of its own."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8") + "svg { background: var(--card) }"
    opened = picture.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"', 1)
    return opened.replace(">", f"><style>{escape(style)}</style>", 1) + "\n"
