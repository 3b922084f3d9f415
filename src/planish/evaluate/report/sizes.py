"""Bytes against divergence: plain rounding beside a result of one size, and the curves of a sweep over sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from markupsafe import Markup

from planish.evaluate.report.points import Point
from planish.evaluate.report.svg import Mark, Quantity, Series, chart

AXIS = "KL to the dense model, nats per token"


@dataclass
class Beside:
    """A section of a page: rows of what was compared, the picture, what to say above and below."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]  # class, cells
    chart: Markup
    lead: str
    note: str = ""
    keys: dict[str, int] = field(default_factory=dict)


def show_size(v: float) -> str:
    """Bytes, as short as they can be told apart on an axis."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if v >= size:
            return f"{v / size:.3g} {unit}"
    return f"{v:.0f} B"


def short(v: float) -> str:
    return f"{v:.3g}" if v == 0 or abs(v) >= 1e-3 else f"{v:.0e}".replace("e-0", "e-")


def read_ladder(ladder: dict[str, Any], choices: list[dict[str, Any]]) -> Beside | None:
    """The section of ladder.json and choices.json; None where nothing was measured."""
    rungs, result = [r for r in ladder.get("rungs", []) if r.get("kl") is not None], ladder.get("result")
    if not rungs or not result or result.get("kl") is None:
        return None
    cuts = [c for c in choices if c.get("kl") is not None and c["keep"] < 1]
    plans = {
        "plain rounding": rungs,
        "other plans of this size": [c for c in cuts if not c["chosen"]],
        "the result": [result],
    }
    keys = {name: n for n, (name, found) in enumerate(plans.items()) if found}
    series = [
        Series(name, n, [Mark(r["bytes"], r["kl"], tell(name, r)) for r in plans[name]], joined=n == 0)
        for name, n in keys.items()
    ]
    rows = [
        ("best" if name == "the result" else "", cells(name, r, ladder["size"])) for name in keys for r in plans[name]
    ]
    rows.sort(key=lambda row: -int(row[1][1].replace(",", "")))
    lead = f"Plans of at most {ladder['size']:,} bytes and plain rounding of the dense model, each made from three quarters of the "
    lead += f"calibration windows and measured on the {ladder['windows']} others."
    note = {
        "result": "The result is nearer to the dense model than every plain type of its size.",
        "alike": "The result and the best plain type of its size are alike within two standard errors.",
        "plain": "Plain rounding of no more bytes is as near to the dense model as the result, or nearer.",
    }.get(ladder.get("verdict", ""), "No plain type is of this size.")
    picture = Markup(
        chart(series, Quantity("bytes of the files", show_size, log=False), Quantity(AXIS, short, log=True))
    )
    return Beside(["plan", "bytes", "KL", "±", "fits"], rows, picture, lead, note, keys)


def cells(name: str, r: dict[str, Any], size: int) -> list[str]:
    """A row of the table: the plan, its bytes, its divergence."""
    name = "another plan" if name.startswith("other") else name
    error = "" if r.get("stderr") is None else f"{r['stderr']:.4f}"
    return [
        f"{describe(r)} ({name})",
        f"{r['bytes']:,}",
        f"{r['kl']:.4f}",
        error,
        "yes" if r["bytes"] <= size else "larger",
    ]


def describe(r: dict[str, Any]) -> str:
    head = f", embedding and head {r['head']}" if r.get("head") else ""
    return f"{r['bits']} bits{head}" + ("" if r["keep"] == 1 else f", keep {r['keep']:.4f}")


def tell(name: str, r: dict[str, Any]) -> str:
    """What pointing at a mark shows."""
    return f"{describe(r)}, {name}\n{r['bytes']:,} bytes\nKL {r['kl']:.4f}"


# ------------------------------------------------------------------ of a sweep


def find_sizes(points: Sequence[Point]) -> list[int]:
    """The sizes that were asked for, the largest first."""
    return sorted({int(p.asked["max_bytes"]) for p in points if p.curve and "max_bytes" in p.asked}, reverse=True)


def find_tiles(points: Sequence[Point]) -> list[tuple[str, str, list[str]]]:
    """The plan nearest to the dense model within every size: heading, figure, lines; what the best of each other curve is."""
    tiles = []
    for size in find_sizes(points):
        held = sorted(
            (p for p in points if p.bytes <= size and isfinite(p.kl)), key=lambda p: (p.kl, p.curve != "both")
        )
        if not held:
            continue
        best, lines = (
            held[0],
            ["KL to the dense model, nats per token", f"{describe_point(held[0])}, {held[0].bytes:,} bytes"],
        )
        others = {p.label: p for p in reversed(held) if p.label != best.label}
        lines += [f"{p.label}: {p.kl:.4f} ({describe_point(p)})" for p in sorted(others.values(), key=lambda p: p.kl)]
        tiles.append((f"{show_size(size)} · {best.label}", f"{best.kl:.4f}", lines))
    return tiles


def find_curves(points: Sequence[Point], dense: Point, colours: dict[str, int]) -> tuple[list[tuple[str, Markup]], str]:
    """Divergence and excess loss against bytes, a line for each curve; a note on both."""

    chosen = {p.label for p in points if p.curve == "both"}

    def plot(value: Callable[[Point], float], name: str) -> Markup:
        series = [
            Series(m, colours[m], [Mark(p.bytes, value(p), hover(p)) for p in points if p.label == m and value(p) > 0])
            for m in sorted(colours, key=lambda m: m not in chosen)  # on top: a chosen plan may be one of another curve
        ]
        return Markup(
            chart(series, Quantity("bytes of the files", show_size, log=True), Quantity(name, short, log=True))
        )

    cards = [("Divergence and size", plot(lambda p: p.kl, AXIS)),
             ("Loss over dense and size", plot(lambda p: p.excess, "log(perplexity / dense), nats"))]  # fmt: skip
    note = (
        f"The dense model takes {show_size(dense.bytes)}. Logarithmic axes; down and left is better. "
        if dense.bytes
        else ""
    )
    if below := sum(p.excess <= 0 for p in points):
        note += f"No worse than dense in its loss, so not in the second picture: {below} point{'s' * (below != 1)}. "
    note += "Point at a mark for its values, or reach it by Tab and the arrow keys. "
    return cards, note + tell_losers(points)


def tell_losers(points: Sequence[Point]) -> str:
    """At which sizes a plan of the other curves, no larger, is nearer to the dense model than the one that was chosen."""
    behind = []
    for p in points:
        if p.curve != "both" or not isfinite(p.kl):
            continue
        size = int(p.asked["max_bytes"])
        held = [o for o in points if o.curve != "both" and o.bytes <= size and isfinite(o.kl)]
        best = min(held, key=lambda o: o.kl, default=p)
        if best.kl < p.kl:
            behind.append(f"at {size:,} bytes {best.label} by {p.kl - best.kl:.4f} nats")
    return f"Nearer to the dense model than the plan that was chosen: {'; '.join(behind)}." if behind else ""


def describe_point(p: Point) -> str:
    parts = [f"{p.bits or p.asked_bits} bits"] * (p.curve != "cuts") + [f"keep {p.keep:.3f}"] * (p.keep < 1)
    return ", ".join(parts) or "all weights"


def hover(p: Point) -> str:
    lines = [f"{p.label}: {describe_point(p)}", f"{p.bytes:,} bytes", f"KL {p.kl:.4f}"]
    return "\n".join([*lines, f"loss over dense {p.excess:.4f}"])
