"""Bytes against divergence: plain rounding beside a result of one size, and the curves of a sweep over sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from planish.evaluate.report.svg import Mark, Quantity, Series, chart

PLAIN, CUTS, BOTH = "bits alone", "cuts at 16 bits", "both"
CURVES = {PLAIN: 0, CUTS: 1, BOTH: 2}  # and their colours
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
    error = "" if r.get("stderr") is None else f"{r['stderr']:.4f}"
    return [
        f"{describe(r)} ({name})",
        f"{r['bytes']:,}",
        f"{r['kl']:.4f}",
        error,
        "yes" if r["bytes"] <= size else "larger",
    ]


def describe(r: dict[str, Any]) -> str:
    return f"{r['bits']} bits" + ("" if r["keep"] == 1 else f", keep {r['keep']:.4f}")


def tell(name: str, r: dict[str, Any]) -> str:
    """What pointing at a mark shows."""
    return f"{describe(r)}, {name}\n{r['bytes']:,} bytes\nKL {r['kl']:.4f}"
