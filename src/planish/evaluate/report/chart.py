"""Perplexity against keep, one line per method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

INK, MUTED, GRID = "#1a1a1a", "#767676", "#e6e6e6"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # apart for colour-blind eyes too
MARKERS = "osD^vP"
NAMED = len(COLOURS)  # so many of the best methods get a colour; the others are drawn thin and grey


class Point(NamedTuple):
    method: str
    keep: float
    perplexity: float


def draw_chart(points: Sequence[Point], dense: float, path: Path, title: str, subtitle: str = "") -> None:
    """Write a PNG: keep on the x axis from 1 (dense) downwards, perplexity on the y axis, methods named at their ends.

    Lines that leave the picture (more than ten times the dense perplexity) are cut at its upper edge and say so.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines: dict[str, list[Point]] = defaultdict(list)
    for p in points:
        lines[p.method].append(p)
    lines = {m: sorted(ps, key=lambda p: -p.keep) for m, ps in lines.items()}
    worst = sorted(lines, key=lambda m: log(lines[m][-1].perplexity / dense) / max(1 - lines[m][-1].keep, 1e-9))
    named = {m: i for i, m in enumerate(worst[:NAMED])}
    visible = [p.perplexity for p in points if p.perplexity <= 10 * dense] or [dense]
    top, bottom = max(max(visible) * 1.05, dense * 1.05), min([dense, *visible])
    logarithmic = top / bottom > 3
    bottom = bottom / (top / bottom) ** 0.08 if logarithmic else bottom - 0.08 * (top - bottom)
    keeps = sorted({round(p.keep, 2) for p in points} | {1.0}, reverse=True)
    ticks = [t / 10 for t in range(10, 0, -1) if t / 10 >= keeps[-1] - 0.01]

    figure, axes = plt.subplots(figsize=(9.6, 5.6), dpi=160)
    figure.subplots_adjust(left=0.075, right=0.78, top=0.85, bottom=0.115)
    axes.set_xlim(1.005, keeps[-1] - 0.004)
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_ylim(bottom, top)
    axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(f"dense {dense:.1f}", (1.0, dense), (2, -12), textcoords="offset points", color=INK, fontsize=9)

    ends = []
    for method in reversed(worst):
        run = [Point(method, 1.0, dense), *lines[method]]
        x, y = [p.keep for p in run], [min(p.perplexity, top * 2) for p in run]
        if method in named:
            i = named[method]
            style: dict[str, Any] = {
                "color": COLOURS[i],
                "linewidth": 2,
                "marker": MARKERS[i],
                "markersize": 5.5,
                "zorder": 4,
            }
        else:
            style = {"color": "#b4b4b4", "linewidth": 1.1, "marker": "o", "markersize": 2.5, "zorder": 3}
        axes.plot(x, y, markevery=slice(1, None), markeredgecolor="white", markeredgewidth=0.6, **style)
        last = lines[method][-1]
        off = "" if last.perplexity <= top else " ↑"
        ends.append((min(last.perplexity, top), f"{method}  {last.perplexity:,.1f}{off}", method))

    heights = spread_labels(
        [axes.transAxes.inverted().transform(axes.transData.transform((1, y)))[1] for y, _, _ in ends]
    )
    for height, (end, text, method) in zip(heights, ends, strict=True):
        at = axes.transAxes.inverted().transform(axes.transData.transform((1, end)))[1]
        bold = method in named
        colour = COLOURS[named[method]] if bold else MUTED
        axes.plot([1.0, 1.02], [at, height], transform=axes.transAxes, color=colour, linewidth=0.6, clip_on=False)
        axes.annotate(
            text, (1.026, height), xycoords="axes fraction", va="center", color=colour,
            fontsize=9 if bold else 8, fontweight="bold" if bold else "normal", annotation_clip=False,
        )  # fmt: skip

    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_xlabel("keep: share of the blocks' weights that stays", color=INK, fontsize=10)
    axes.set_ylabel("perplexity" + (" (log scale)" if logarithmic else ""), color=INK, fontsize=10)
    if logarithmic:
        heights = [m * 10**e for e in range(7) for m in (1, 1.5, 2, 3, 5, 7) if bottom <= m * 10**e <= top]
        axes.yaxis.set_major_locator(FixedLocator(heights))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bdbdbd")
    figure.text(0.075, 0.945, title, fontsize=14, fontweight="bold", color=INK)
    figure.text(0.075, 0.9, subtitle, fontsize=9.5, color=MUTED)
    figure.savefig(path)
    plt.close(figure)


def spread_labels(heights: Sequence[float], gap: float = 0.044) -> list[float]:
    """Heights (shares of the axis) moved apart as little as needed, so that neighbours are at least `gap` away."""
    gap = min(gap, 1.1 / max(len(heights), 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[Any]] = []  # [centre of the first label, indices]
    for i in order:
        groups.append([heights[i], [i]])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * len(groups[-2][1]):
            _, later = groups.pop()
            members = groups[-1][1] + later
            mean = sum(heights[j] - gap * n for n, j in enumerate(members)) / len(members)
            groups[-1] = [mean, members]
    found = list(heights)
    for first, members in groups:
        first = min(max(first, -0.05), 1.06 - gap * (len(members) - 1))
        for n, i in enumerate(members):
            found[i] = first + gap * n
    return found
